"""Triton kernels without a GPU: run them in Triton's interpreter, compile them ahead of time.

`@triton.jit` reads TRITON_INTERPRET when it decorates, also where triton decorates functions of its
own, so a process can interpret or compile but not both. Each is therefore done in a child process
that lives as long as the tests do, and the flag never reaches the tests' own process. A request is
a function (pickled, so by name) and its arguments; the answer is its result, or its exception,
which is raised here.

    xhat = interpreted(decode.decode_fwd, vals, idx, W_dec)           # strides arrive as they are
    used = compiled("fastsae.kernels.decode", "fwd-bf16-512", H100)   # registers, spills, …

`run_all` parametrises a test over the interpreter and, where there is one, the GPU; called as
`run(function, *args)`. Under either, `torch.empty` gives NaN, which shows outputs left unwritten.

A kernel file lists the compiled forms it ships in `variants() -> dict[name, Variant]`; a Variant is
    kernel     the jitted function
    signature  its parameters, as triton.tools.compile has them: "*bf16:16" and "i32:16" divide by
               16, "i32" by nothing, "1" and "None" are those constants
    config     what the launcher passes by keyword: constexprs and options such as num_warps
"""

import atexit
import functools
import importlib
import os
import pickle
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

Target = tuple[str, int | str, int]
A100: Target = ("cuda", 80, 32)
H100: Target = ("cuda", 90, 32)
B200: Target = ("cuda", 100, 32)
MI300: Target = ("hip", "gfx942", 64)
TARGETS = {"A100": A100, "H100": H100, "B200": B200, "MI300": MI300}


def interpreted(function: Callable, *args: Any, **kwargs: Any) -> Any:
    return worker(interpret=True)(function, *args, **kwargs)


def compiled(module: str, variant: str, target: Target) -> dict[str, int]:
    """What `module.variants()[variant]` uses on the target: see `resources`."""
    return worker(interpret=False)(resources, module, variant, target)


def on_gpu(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """The call with its tensors on the GPU; the result, a tensor or several, back from there."""

    def there(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        # The whole storage: strides, offset and what lies between the rows stay as they are.
        flat = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage()).cuda()
        return flat.as_strided(value.shape, value.stride(), value.storage_offset())

    with poisoned_empty():
        found = function(*map(there, args), **{key: there(arg) for key, arg in kwargs.items()})
    return found.cpu() if isinstance(found, Tensor) else type(found)(t.cpu() for t in found)


run_all = pytest.mark.parametrize(
    "run",
    [
        pytest.param(interpreted, id="interpreter"),
        pytest.param(on_gpu, id="gpu", marks=pytest.mark.gpu),
    ],
)


@contextmanager
def poisoned_empty() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # torch.utils.deterministic fills what is allocated
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@functools.cache
def worker(interpret: bool) -> "Worker":
    return Worker(interpret)


class Worker:
    def __init__(self, interpret: bool) -> None:
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        env["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
        if interpret:
            env["TRITON_INTERPRET"] = "1"
        self.process = subprocess.Popen(
            [sys.executable, __file__], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        atexit.register(self.process.communicate)

    def __call__(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        assert self.process.stdin and self.process.stdout
        request = pickle.dumps((function, args, kwargs))
        try:
            self.process.stdin.write(request)
            self.process.stdin.flush()
            result, error, trace = pickle.load(self.process.stdout)
        except (EOFError, BrokenPipeError) as lost:
            raise RuntimeError(f"the worker died: exit status {self.process.wait()}") from lost
        if error is not None:
            raise error from RuntimeError(trace)
        return result


def serve() -> None:
    """The child: answers requests until its input ends."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a kernel prints must not end up among the answers
    while True:
        try:
            function, args, kwargs = pickle.load(requests)
        except EOFError:
            return
        try:
            with poisoned_empty():
                answer = pickle.dumps((function(*args, **kwargs), None, ""))
        except Exception as error:
            answer = pickle.dumps((None, portable(error), traceback.format_exc()))
        answers.write(answer)
        answers.flush()


def portable(error: Exception) -> Exception:
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def resources(module: str, variant: str, target: Target) -> dict[str, int]:
    """registers: of a thread. spills: bytes and registers that went to memory, 0 if none.
    shared: bytes. load_bytes: the widest load from global memory. atomics: instructions."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, signature, config = importlib.import_module(module).variants()[variant]
    names = kernel.arg_names
    given = dict(zip([n for n in names if n not in config], signature.split(", "), strict=True))
    constants = {name: config[name] for name in names if name in config}
    constants |= {
        name: {"1": 1, "None": None}[w] for name, w in given.items() if w in ("1", "None")
    }
    types = {n: "constexpr" if n in constants else given[n].partition(":")[0] for n in names}
    divisible = {
        (names.index(name),): [["tt.divisibility", int(word.partition(":")[2])]]
        for name, word in given.items()
        if ":" in word
    }
    options = {name: value for name, value in config.items() if name not in names}
    source = ASTSource(kernel, types, constants, divisible)
    binary = triton.compile(source, target=GPUTarget(*target), options=options)

    if target[0] == "hip":
        listing = binary.asm["amdgcn"]
        fields = (
            "vgpr_count",
            "vgpr_spill_count",
            "sgpr_spill_count",
            "private_segment_fixed_size",
        )
        registers, *spills = (int(re.search(rf"\.{f}:\s+(\d+)", listing)[1]) for f in fields)
        loads = re.findall(r"(?:global|buffer)_load_dwordx(\d)", listing)
        load_bytes = max((4 * int(words) for words in loads), default=4)
        atomics = re.findall(r"\b(?:global|buffer|flat)_atomic", listing)
    else:
        listing = binary.asm["ptx"]
        registers, *spills = cubin_usage(binary.asm["cubin"])
        loads = re.findall(r"\bld\.global\S*\.v(\d)\.b(\d+)", listing)
        load_bytes = max((int(n) * int(bits) // 8 for n, bits in loads), default=4)
        atomics = re.findall(r"\b(?:atom|red)\.", listing)
    return {
        "registers": registers,
        "spills": sum(spills),
        "shared": binary.metadata.shared,
        "load_bytes": load_bytes,
        "atomics": len(atomics),
    }


def cubin_usage(cubin: bytes) -> tuple[int, int, int]:
    """Registers, bytes of stack and bytes of local memory of a thread, by triton's cuobjdump."""
    from triton.backends import nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "-res-usage", file.name]
        listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return tuple(int(re.search(rf"\b{f}:(\d+)", listing)[1]) for f in ("REG", "STACK", "LOCAL"))


if __name__ == "__main__":
    import aot  # pickled functions name this module so, not __main__

    aot.serve()
