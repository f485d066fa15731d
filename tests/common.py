"""What the tests of the operations share: the promised arithmetic, bits, threads, processes."""

import functools
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsae import _C, cpu

NAN, INF = float("nan"), float("inf")
ISAS = cpu.isas()
# Where the CPU does not multiply bf16, "bf16" is the fp32 screen.
VARIANTS = [(isa, "fp32") for isa in ISAS]
VARIANTS += [(isa, "bf16") for isa in ISAS if isa == "avx512bf16"]
WEIGHTS = (torch.float32, torch.bfloat16)

isas = pytest.mark.parametrize("isa", ISAS)
variants = pytest.mark.parametrize(("isa", "screen"), VARIANTS, ids=["-".join(v) for v in VARIANTS])
backends = pytest.mark.parametrize("backend", ["reference", "cpu"])


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


weights = pytest.mark.parametrize("dtype", WEIGHTS, ids=name_of)


def refusals(arguments: str, cases: list[tuple]) -> pytest.MarkDecorator:
    """Parametrises a test of what is refused; a case ends in the exception and its message."""
    ids = [f"{i}: {case[-1]}" for i, case in enumerate(cases)]
    return pytest.mark.parametrize(arguments, cases, ids=ids)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randint(high: int, *shape: int, low: int = 0, seed: int = 0) -> Tensor:
    """Integers in [low, high), as float32: their sums and products are exact in any order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator).float()


def random_codes(
    n: int, k: int, n_latents: int, seed: int = 0, padding: float = 0.25
) -> tuple[Tensor, Tensor]:
    """vals and idx (n, k) with duplicates in a row; padding holds NaN, which nothing may read."""
    generator = torch.Generator().manual_seed(seed)
    vals = torch.randn(n, k, generator=generator)
    idx = torch.randint(0, n_latents, (n, k), generator=generator, dtype=torch.int32)
    idx[torch.rand(n, k, generator=generator) < padding] = -1
    return vals.masked_fill(idx < 0, NAN), idx


def ragged(vals: Tensor, idx: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same codes as (nnz) with row_ptr; only every third row keeps its padding."""
    kept = idx >= 0
    kept[::3] = True
    row_ptr = torch.zeros(len(idx) + 1, dtype=torch.int64)
    row_ptr[1:] = kept.sum(1).cumsum(0)
    return vals[kept], idx[kept], row_ptr


def far_apart(file: Path, rows: Tensor) -> Tensor:
    """Three rows so far apart that offsets pass 2³¹ elements, in a file that is mostly a hole."""
    apart = 2**30 + 8
    size = 2 * apart + rows.shape[1]
    memory = torch.from_file(str(file), shared=True, size=size, dtype=rows.dtype)
    file.unlink()
    return memory.as_strided(rows.shape, (apart, 1)).copy_(rows)


# ---- bits ----


def bits(t: Tensor) -> Tensor:
    t = t.detach()
    return t.view(torch.int32 if t.dtype == torch.float32 else torch.int16)


def assert_bits(got: Tensor, expected: Tensor) -> None:
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    if got.is_floating_point():
        got, expected = bits(got), bits(expected)
    assert torch.equal(got, expected)


def assert_within_eager(
    got: Tensor, eager: Tensor, exact: Tensor, atol: float = 0.0, rtol: float = 0.0
) -> None:
    """The error against float64 is at most that of eager torch in the same dtypes.

    On top comes one rounding of the result: eager may be luckier than it is right.
    """
    assert got.shape == exact.shape
    assert exact.isfinite().all()
    if not got.numel():
        return
    ulp = max(torch.finfo(got.dtype).eps, rtol) * float(exact.abs().max())
    error, allowed = (float((t.double() - exact).abs().max()) for t in (got, eager))
    assert error <= allowed + ulp + atol


def fixed_order_dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """<a[n], b[f]> in float32 as csrc/simd.h promises: 64 running sums, then a halving tree."""
    pad = -a.shape[1] % 64
    a, b = (np.pad(m, ((0, 0), (0, pad))) for m in (a, b))
    sums = np.zeros((len(a), len(b), 64), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for i in range(0, a.shape[1], 64):
            sums += a[:, None, i : i + 64] * b[None, :, i : i + 64]
        while sums.shape[2] > 1:
            half = sums.shape[2] // 2
            sums = sums[..., :half] + sums[..., half:]
    return sums[..., 0]


def fixed_order_encode(
    x: Tensor, W: Tensor, b: Tensor | None, k: int, latents: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """vals and idx that encode promises to the bit, by a full sort of all pre-activations."""
    ids = np.arange(len(W)) if latents is None else latents.numpy()
    vals, idx = np.zeros((len(x), k), np.float32), np.full((len(x), k), -1, np.int32)
    h = fixed_order_dot(x.float().numpy(), W.float().numpy()[ids])
    if b is not None:
        h = h + b.float().numpy()[ids]
    for n, row in enumerate(h):
        best = np.lexsort((ids, -row))[:k]
        best = best[row[best] > 0]
        vals[n, : len(best)], idx[n, : len(best)] = row[best], ids[best]
    return torch.from_numpy(vals), torch.from_numpy(idx)


# ---- surroundings ----


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def instruction_set(isa: str, count: int) -> Iterator[None]:
    """The launchers of fastsae.cpu on another instruction set and number of threads."""

    class Forced:
        def __getattr__(self, name: str) -> functools.partial:
            return functools.partial(getattr(_C, name), isa=isa)

    before, cpu._C = cpu._C, Forced()
    try:
        with threads(count):
            yield
    finally:
        cpu._C = before


@contextmanager
def poisoned_empties() -> Iterator[None]:
    """New memory is NaN, or the largest integer: an entry that nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def run_child(code: str, *args: str, timeout: float = 120) -> str:
    """Runs a Python program in a process of its own and returns what it printed."""
    command = [sys.executable, "-c", textwrap.dedent(code), *args]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, stdout=-1, stderr=-2, timeout=timeout)
    output = done.stdout.decode()
    assert done.returncode == 0, f"exit {done.returncode}\n{output[-4000:]}"
    return output
