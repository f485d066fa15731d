"""Builds the C++ extension ``fastsae._C``; pyproject.toml holds all else about the package.

The build is a ninja file with the dependency lists that the compiler writes, so an edited header
recompiles the files that include it and nothing else. It needs Linux or macOS with gcc or clang.
CXX, CPPFLAGS, CXXFLAGS and LDFLAGS are respected. Without any compiler the package is built
without the extension and works on its reference path.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

OPS = (
    "encode",
    "encode_batch",
    "encode_columns",
    "encode_threshold",
    "decode",
    "index",
    "rows",
    "adam",
)  # csrc/<op>.cpp, compiled once per instruction set
COMMON = ("bindings", "pool", "auction")  # csrc/<name>.cpp, compiled once

# Each set contains the one before it. The objects are linked in this order because a linker keeps
# the first copy of an inline function that several of them contain: the copy that runs anywhere.
ISAS = {"base": ""}
X86 = platform.machine() in ("x86_64", "AMD64")
if X86:
    ISAS["avx2"] = "-mavx2 -mfma -mf16c"
    ISAS["avx512"] = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mprefer-vector-width=512"
    ISAS["avx512bf16"] = ISAS["avx512"] + " -mavx512bf16"

# Contracting a*b + c where the compiler likes would make results depend on the instruction set.
COMPILE = "-std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Wextra -pthread"
LINK = "-pthread -shared"
if sys.platform == "darwin":
    LINK = "-pthread -bundle -undefined dynamic_lookup"

NINJA = """\
builddir = {folder}

rule compile
  command = {compile} $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = compile $out

rule link
  command = {link} $in -o $out
  description = link $out
"""


def environment(name: str) -> list[str]:
    return shlex.split(os.environ.get(name, ""))


def find_compiler() -> list[str] | None:
    """The command of the C++ compiler: CXX where it is set, else the first usual name that runs."""
    if named := environment("CXX"):
        return named if shutil.which(named[0]) else None
    for name in filter(shutil.which, ("c++", "g++", "clang++")):
        # macOS without its developer tools has a c++ that only fails, so being there is not enough.
        if subprocess.run([name, "--version"], capture_output=True).returncode == 0:
            return [name]
    return None


def build_file(folder: Path, compiler: list[str], includes: list[str]) -> str:
    """The ninja file that builds folder/_C.so; only bindings.cpp sees the includes."""

    def quote(words: list[str]) -> str:
        return shlex.join(words).replace("$", "$$")

    x86 = ["-DFASTSAE_HAS_X86_ISAS=1"] if X86 else []
    jobs = [(name, "common", x86 + includes * (name == "bindings")) for name in COMMON]
    for isa, flags in ISAS.items():
        jobs += [(name, isa, [f"-DFASTSAE_ISA={isa}", *flags.split()]) for name in OPS]

    cxx = [*compiler, *COMPILE.split(), *environment("CPPFLAGS"), *environment("CXXFLAGS")]
    link = [*compiler, *LINK.split(), *environment("CXXFLAGS"), *environment("LDFLAGS")]
    lines = [NINJA.format(folder=folder, compile=quote(cxx), link=quote(link))]
    objects = []
    for name, isa, flags in jobs:
        objects.append(f"{folder}/{name}.{isa}.o")
        lines += [f"build {objects[-1]}: compile csrc/{name}.cpp", f"  flags = {quote(flags)}"]
    lines += [f"build {folder}/_C.so: link {' '.join(objects)}", ""]
    return "\n".join(lines)


class NinjaBuildExt(build_ext):
    def run(self) -> None:
        self.cxx = find_compiler()
        if self.cxx is None:
            tried = os.environ.get("CXX") or "c++, g++, clang++"
            print(
                f"fastsae: found no C++ compiler ({tried}), so this build has no fastsae._C: it "
                "runs on the slow reference path. Install gcc or clang, or set CXX, and reinstall.",
                file=sys.stderr,
            )
            self.extensions = []
        super().run()

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        # Not self.build_temp: an editable install makes that a new folder each time, and the
        # objects must still be there at the next one.
        folder = Path("build", f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}")
        folder.mkdir(parents=True, exist_ok=True)
        ninja = folder / "build.ninja"
        includes = [f"-I{path}" for path in [*self.include_dirs, pybind11.get_include()]]
        ninja.write_text(build_file(folder, self.cxx, includes))
        try:
            subprocess.run([sys.executable, "-m", "ninja", "-f", str(ninja)], check=True)
        except subprocess.CalledProcessError:
            raise CompileError("the C++ build failed; its messages are above") from None
        target = self.get_ext_fullpath(ext.name)
        self.mkpath(os.path.dirname(target))
        self.copy_file(f"{folder}/_C.so", target)


setup(
    ext_modules=[
        Extension(
            "fastsae._C",
            sources=[f"csrc/{name}.cpp" for name in (*COMMON, *OPS)],
            depends=sorted(map(str, Path("csrc").glob("*.h"))),
        )
    ],
    cmdclass={"build_ext": NinjaBuildExt},
)
