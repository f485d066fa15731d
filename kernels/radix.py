"""Radix: the bits of the w-th largest of many positive numbers, eleven at a time.

A histogram of the highest 11 bits says in which bin the w-th largest lies, and how many of that bin
are wanted; then the next 11 bits of the numbers in that bin, then the last 9. Bits order positive
floats. Where there are fewer than w numbers, the result is 0.

Shapes   hist (2048), a bin for each digit; wanted a count.
Order    Counts are integers: their sums have no order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae.kernels.checks import Variant

BINS = 2048
LEVELS = ((31, 20), (20, 9), (9, 0))  # the bits of a digit: below the first, from the second
ROUGH = LEVELS[:2]  # 22 bits of a bound are enough


@triton.jit
def histogram(bits, prefix, ABOVE: tl.constexpr, SHIFT: tl.constexpr):
    """(2048) int32: how many positive ones of `bits` that agree with prefix have each digit."""
    counted = (bits > 0) & (((bits ^ prefix) >> ABOVE) == 0)
    digit = (bits >> SHIFT) & ((1 << (ABOVE - SHIFT)) - 1)
    return tl.histogram(digit, 2048, mask=counted)


@triton.jit
def add(hist_ptr, hist):
    """A program's counts, added to those of all."""
    bins = hist_ptr + tl.arange(0, 2048)
    tl.atomic_add(bins, hist.to(tl.int64), mask=hist > 0, sem="relaxed")


@triton.jit
def cut(hist, wanted):
    """The digit of the `wanted`-th largest, and how many of that digit are wanted."""
    reached = tl.sum(hist, 0) - tl.cumsum(hist, 0) + hist  # by a digit or a larger one
    digit = tl.maximum(tl.sum((reached >= wanted).to(tl.int32), 0) - 1, 0)
    larger = tl.sum(tl.where(tl.arange(0, 2048) > digit, hist, 0), 0)
    return digit, wanted - larger


@triton.jit
def _cut_kernel(
    hist_ptr,  # (in, out) (2048) int64; (out) zeros
    state_ptr,  # (in, out) (2) int64: the bits so far, how many are wanted
    SHIFT: tl.constexpr,
):
    lane = tl.arange(0, 2048)
    hist = tl.load(hist_ptr + lane)
    digit, wanted = cut(hist, tl.load(state_ptr + 1))
    tl.store(hist_ptr + lane, tl.zeros_like(hist))
    tl.store(state_ptr, tl.load(state_ptr) + (digit.to(tl.int64) << SHIFT))
    tl.store(state_ptr + 1, wanted)


class Search:
    """The state of one search by kernels that add to `hist`: after each, `cut`."""

    def __init__(self, wanted: int, device: torch.device) -> None:
        self.hist = torch.zeros(BINS, dtype=torch.int64, device=device)
        self.state = torch.zeros(2, dtype=torch.int64, device=device)
        self.state[1:].fill_(wanted)

    def cut(self, shift: int) -> None:
        _cut_kernel[(1,)](self.hist, self.state, SHIFT=shift, **CONFIG)

    def bits(self) -> Tensor:
        """(1) int32."""
        return self.state[:1].int()


CONFIG = {"num_warps": 8}


def variants() -> dict[str, Variant]:
    """What is launched, by name."""
    return {"cut": Variant(_cut_kernel, "*i64:16, *i64:16", {"SHIFT": 9} | CONFIG)}
