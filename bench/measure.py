"""What every provider is measured with, in fastsae's own interpreter and in a peer's.

Needs torch and the standard library alone, because a peer's interpreter has neither fastsae nor the
rest of what it depends on.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
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
Weights = Callable[[], torch.Tensor]
"""The encoder's weights, [F, D]."""
Build = Callable[[Shape, torch.Tensor], tuple[Step, Weights]]
"""Makes the model, given the first batch."""


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


def measure(build: Build, shape: Shape, steps: int) -> dict[str, Any]:
    """The figures of a row: seconds of a step and of a product, their ratio, peak_bytes."""
    n, d, f, k = shape
    torch.manual_seed(1)  # not the seed of anyone's weights: tokens must not be rows of W_enc
    batches = [torch.randn(n, d) for _ in range(4)]  # taken in turn, so that no cache is flattered
    before = memory("VmRSS")
    step, weights = build(shape, batches[0])
    first = step(batches[0])
    step(batches[1])
    # The layout of fastsae's weights, so that every provider has the same unit.
    product = product_seconds(batches[0], weights().contiguous())
    Path("/proc/self/clear_refs").write_text("5")  # starts VmHWM anew
    seconds = []
    for i in range(steps):
        start = time.perf_counter()
        step(batches[i % 4])
        seconds.append(time.perf_counter() - start)
    peak = memory("VmHWM") - before
    last = step(batches[0])
    product = min(product, product_seconds(batches[0], weights().contiguous()))
    if not torch.isfinite(last) or last == first:
        raise RuntimeError(f"this step does not train: the loss was {first} and is {last}")
    return {
        "n": n,
        "d": d,
        "f": f,
        "k": k,
        "step_s": statistics.median(seconds),
        "step_min_s": min(seconds),
        "step_max_s": max(seconds),
        "product_s": product,
        "ratio": statistics.median(seconds) / product,
        "peak_bytes": peak,
        "threads": torch.get_num_threads(),
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


def write_json(rows: list[Any], where: str | None) -> None:
    """Rows as JSON to a file, or to stdout for "-"; nothing for None."""
    text = json.dumps(rows, indent=1)
    if where == "-":
        print(text)
    elif where:
        Path(where).write_text(text + "\n")
