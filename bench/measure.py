"""What every provider is measured with, in fastsae's own interpreter and in a peer's.

Needs torch and the standard library alone, because a peer's interpreter has neither fastsae nor the
rest of what it depends on.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

Shape = tuple[int, int, int, int]
"""N tokens a step, D width, F latents, K of them active."""
Step = Callable[[torch.Tensor], torch.Tensor]
"""Trains on a batch [N, D] and returns the loss before the update."""


class Start(NamedTuple):
    """Initial weights for every provider."""

    W_enc: torch.Tensor
    """[F, D]; biases are 0."""
    W_dec: torch.Tensor
    """[F, D]"""


class Model(NamedTuple):
    """A provider's model with its optimiser."""

    step: Step
    W_enc: Callable[[], torch.Tensor]
    """Its encoder's weights now, [F, D]."""
    load: Callable[[Start], None]
    reconstruct: Callable[[torch.Tensor], torch.Tensor]
    """[N, D] → [N, D], as at inference."""


Build = Callable[[Shape, torch.Tensor, float | None], Model]
"""Makes the model, given the first batch and the learning rate: None is the provider's default,
with its schedule; a number is kept from the first step on."""


class Side(NamedTuple):
    """A library with or without fastsae, in bench/integrations.py."""

    step: Callable[[torch.Tensor], Any]
    probe: Callable[[torch.Tensor], torch.Tensor]
    """What both sides must agree on, given a batch."""
    on: Callable[[], AbstractContextManager[Any]] = nullcontext
    """While it is entered, this is the side."""


Case = Callable[[Shape], Iterator[Side]]
"""Yields the side before, and once that was measured and forgotten, the side after."""


def tokens(batch: torch.Tensor, n: int) -> torch.Tensor:
    """n rows, of the batch and once more of it as long as they do not suffice."""
    return batch.repeat(-(-n // len(batch)), 1)[:n]


ROOT = Path(__file__).resolve().parent.parent


def _load(path: Path) -> ModuleType:
    """A file of fastsae by its path: a peer's interpreter does not have the package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


product_seconds = _load(ROOT / "fastsae" / "timing.py").product_seconds


def memory(key: str) -> int:
    """Bytes of VmRSS or VmHWM of this process (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


STAT = Path("/proc/stat")


class Watch:
    """What else the machine did while a block ran, as two columns of its row.

    load: the load average at the end; others: the cores that other processes took, on average
    (what Linux counts as work in /proc/stat, that of this process and its children taken away;
    elsewhere there is no such column).
    """

    def __enter__(self) -> Watch:
        self.start = time.perf_counter()
        self.own, self.all = self._own(), self._busy()
        return self

    def __exit__(self, *error: object) -> None:
        own, work = self._own() - self.own, self._busy() - self.all
        self.others = max(0.0, (work - own) / max(time.perf_counter() - self.start, 1e-3))

    def columns(self) -> dict[str, float]:
        load = {"load": round(os.getloadavg()[0], 2)}
        return load | ({"others": round(self.others, 2)} if STAT.exists() else {})

    @staticmethod
    def _own() -> float:
        return sum(os.times()[:4])

    @staticmethod
    def _busy() -> float:
        """Seconds of work of all cores: all that is not idle or waiting for a disk."""
        if not STAT.exists():
            return 0.0
        ticks = [int(n) for n in STAT.read_text().splitlines()[0].split()[1:9]]
        user, nice, system, _, _, *interrupts = ticks
        return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


def spread(ms: list[float]) -> dict[str, float | int]:
    """The figures of some runs: their median and range."""
    return {
        "ms": statistics.median(ms),
        "min_ms": min(ms),
        "max_ms": max(ms),
        "runs": len(ms),
    }


def timed(
    step: Callable[[torch.Tensor], Any], batches: list[torch.Tensor], steps: int, seconds: float
) -> tuple[list[float], Watch]:
    """Milliseconds of each step, on batches in turn, and what else ran meanwhile.

    As many steps as `seconds` allow, three at least and `steps` at most.
    """
    ms: list[float] = []
    with Watch() as watch:
        for i in range(steps):
            start = time.perf_counter()
            step(batches[i % len(batches)])
            ms.append((time.perf_counter() - start) * 1e3)
            if i >= 2 and sum(ms) > seconds * 1e3:
                break
    return ms, watch


def measure(build: Build, shape: Shape, steps: int, seconds: float = 5.0) -> dict[str, Any]:
    """The figures of a row: ms of a step (`timed`) and of a product, their ratio, peak_bytes."""
    n, d = shape[:2]
    torch.manual_seed(1)  # not the seed of anyone's weights: tokens must not be rows of W_enc
    batches = [torch.randn(n, d) for _ in range(4)]  # taken in turn, so that no cache is flattered
    before = memory("VmRSS")
    model = build(shape, batches[0], None)
    step = model.step
    first = step(batches[0])
    step(batches[1])
    # The layout of fastsae's weights, so that every provider has the same unit.
    product = product_seconds(batches[0], model.W_enc().contiguous())
    Path("/proc/self/clear_refs").write_text("5")  # starts VmHWM anew
    ms, watch = timed(step, batches, steps, seconds)
    peak = memory("VmHWM") - before
    last = step(batches[0])
    product = min(product, product_seconds(batches[0], model.W_enc().contiguous())) * 1e3
    if not torch.isfinite(last) or last == first:
        raise RuntimeError(f"this step does not train: the loss was {first} and is {last}")
    return {
        **dict(zip("ndfk", shape, strict=True)),
        **spread(ms),
        "product_ms": product,
        "ratio": statistics.median(ms) / product,
        "peak_bytes": peak,
        "threads": torch.get_num_threads(),
        **watch.columns(),
    }


def parse_shape(text: str) -> Shape:
    try:
        n, d, f, k = (int(part) for part in text.split(","))
        if min(n, d, f, k) < 1 or k > f:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected N,D,F,K (positive, K at most F), got {text!r}"
        ) from None
    return n, d, f, k
