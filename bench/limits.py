"""What this machine can do, measured before anything is compared with it, and what follows.

    python bench/limits.py

Rates: of some torch products of each dtype the fastest (FLOP/s), and of a copy between buffers that
no cache holds, which moves its bytes twice. An operation takes at least its products at their rate,
or at the copy's rate the bytes of all its arrays, each once, whichever is longer: its limit. A row
that is named by several pairs is read again for each of them, from caches where they hold it; with
all these bytes at the copy's rate, as without caches, it is the uncached limit.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

PRODUCTS = ((2048, 2048, 2048), (2048, 768, 4096), (2048, 768, 24576))
"""Rows, the width that is summed over, columns."""
GPU_PRODUCTS = ((8192, 8192, 8192),)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Cost:
    """What an operation must do at least."""

    flops: int = 0
    dtype: str = "fp32"
    """Of these products."""
    moved: int = 0
    """Bytes of the arrays, each once."""
    named: int = 0
    """Bytes with every row as often as a pair names it, where that is more."""


@dataclass(frozen=True)
class Rates:
    """FLOP/s by dtype, and bytes/s."""

    memory: float
    flops: dict[str, float] = field(default_factory=dict)

    def limit(self, cost: Cost) -> tuple[float, str]:
        """Milliseconds, and what bounds them."""
        bounds = {
            f"{cost.dtype} products": cost.flops / self.flops[cost.dtype],
            "memory": cost.moved / self.memory,
        }
        what = max(bounds, key=lambda name: bounds[name])
        return bounds[what] * 1e3, what

    def uncached(self, cost: Cost) -> float:
        """Milliseconds."""
        return max(self.limit(cost)[0], cost.named / self.memory * 1e3)

    def columns(self) -> dict[str, float]:
        """For the rows of a run: so that every limit can be computed again."""
        rates = {f"{name}_gflop_s": rate / 1e9 for name, rate in self.flops.items()}
        return rates | {"memory_gb_s": self.memory / 1e9}

    def text(self) -> str:
        columns = self.columns().items()
        return "rates: " + ", ".join(f"{name} {rate:.0f}" for name, rate in columns)


def measure_rates(device: torch.device, repeats: int = 5, small: bool = False) -> Rates:
    """The rates of this machine, with torch's threads. small: of little work, to try the code."""

    def seconds(work: Callable[[], object]) -> float:
        best = float("inf")
        for _ in range(repeats + 1):  # the first one touches the memory
            _wait(device)
            start = time.perf_counter()
            work()
            _wait(device)
            best = min(best, time.perf_counter() - start)
        return best

    shapes = ((512, 512, 512),) if small else GPU_PRODUCTS if device.type == "cuda" else PRODUCTS
    flops = {}
    for name, dtype in DTYPES.items():
        found = []
        for n, d, f in shapes:
            a, b = torch.ones(n, d, dtype=dtype), torch.ones(f, d, dtype=dtype)
            a, b = a.to(device), b.to(device)
            out = torch.zeros(n, f, dtype=dtype, device=device)
            run = seconds(lambda a=a, b=b, out=out: torch.mm(a, b.T, out=out))  # type: ignore[misc]
            found.append(2 * n * d * f / run)
        flops[name] = max(found)
    n_bytes = 1 << (20 if small else 28)
    source = torch.ones(n_bytes // 4, device=device)
    target = torch.zeros_like(source)
    return Rates(2 * n_bytes / seconds(lambda: target.copy_(source)), flops)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(measure_rates(where).text(), file=sys.stderr)
