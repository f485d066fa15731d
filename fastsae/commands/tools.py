"""``fastsae convert | bench | info``."""

from __future__ import annotations

import importlib.util
import platform
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import torch
import tyro

import fastsae
from fastsae import bench, cpu, formats, ops


@dataclass(frozen=True)
class Convert:
    """Write an SAE in another library's format."""

    src: tyro.conf.Positional[Path]
    """File or folder to read."""
    dst: tyro.conf.Positional[Path]
    """Folder to write; there must be nothing in it."""
    source: Annotated[
        str | None,
        tyro.conf.arg(
            name="from", help=f"Format of SRC, guessed if not given: {', '.join(formats.FORMATS)}."
        ),
    ] = None
    target: Annotated[
        str, tyro.conf.arg(name="to", help=f"Format of DST: {', '.join(formats.WRITABLE)}.")
    ] = "fastsae"
    normalized: bool = False
    """Read the SAE of a file that wants each token normalised: its inputs will be, already."""

    def run(self) -> None:
        source = self.source or formats.guess(self.src)
        sae = formats.read(self.src, source, normalized=self.normalized)
        formats.write(sae, self.dst, self.target)
        c = sae.config
        print(f"{self.src} ({source}) → {self.dst} ({self.target})")
        print(f"{c.selection}, D {c.d_in}, F {c.d_sae}, {c.dtype}")


@dataclass(frozen=True)
class Bench:
    """Run the benchmarks of a checkout: ops, step, peers, scaling, integrations."""

    arguments: tyro.conf.Positional[tuple[str, ...]] = ()
    """What to run, and options: fastsae bench --help."""

    def run(self) -> None:
        sys.exit(bench.run(self.arguments))


@dataclass(frozen=True)
class Info:
    """Print versions and which backends work here."""

    def run(self) -> None:
        print(info())


def info() -> str:
    """Versions, threads and the state of each backend: what works, or why not and what to do."""
    lines = [
        f"fastsae   {fastsae.__version__}",
        f"python    {platform.python_version()} on {platform.platform()}",
        f"torch     {torch.__version__}, {torch.get_num_threads()} threads",
        "reference works: any device, float64, float32, bfloat16, float16",
    ]
    if cpu.available():
        lines.append(
            "cpu       works: float32 and bfloat16 (float16 and float64 run on reference), "
            f"instruction set {cpu.isas()[0]}, encoder screened in {cpu.screen()}"
        )
    else:
        lines.append(
            f"cpu       is missing: fastsae._C, {cpu.missing}; install a C++ compiler "
            "(gcc or clang) and reinstall fastsae-engine"
        )
    if importlib.util.find_spec("triton") is None:
        lines.append("triton    is missing: pip install 'fastsae-engine[gpu]'")
    elif not torch.cuda.is_available():
        lines.append(
            f"triton    {version('triton')} finds no CUDA or ROCm device; its kernels run here "
            "only in Triton's interpreter, as in the tests"
        )
    else:
        lines.append(
            f"triton    {version('triton')} works on {torch.cuda.get_device_name()}: "
            f"{', '.join(str(d).removeprefix('torch.') for d in ops.TRITON_DTYPES)}"
        )
    return "\n".join(lines)
