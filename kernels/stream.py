"""Stream: exact selection from all pairs, where there are more candidates than room.

Equal tokens or latents, or bounds wider than what values differ by, may make nearly all pairs
candidates. Then nothing is screened: the exact score of every pair is computed, once for each digit
of the last selected score (kernels/radix.py) and once or twice more for the list, which then has no
other pairs than the selected ones. Of equal scores those of the lowest column are selected.

The last score is that of the whole batch; tokens share its equals by a scan in their order. Five
launches, which end at once where the list had room. kernels/stream_columns.py does it for a latent.

Not finite  `bad` becomes 1 where a value is not finite.
Order    Histograms are summed by integer atomics, the rest has one writer.
Cost     5·2·N·F·D FLOPs without tensor cores: rare, and slow.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae.kernels.candidates import Pairs, pointers
from fastsae.kernels.checks import Variant
from fastsae.kernels.dot import dots
from fastsae.kernels.operands import Operands
from fastsae.kernels.radix import LEVELS, Search, add, histogram


@triton.jit
def scores(
    x_ptr, W_ptr, bias_ptr, scale_ptr, bad_ptr, row, start, n_cols, D, stride_x, stride_W,
    BY_LATENT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr,
    ABSOLUTE: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The bits of the scores of a row's columns from `start`; 0 of what is not positive."""
    col = start + tl.arange(0, C)
    there = col < n_cols
    col = tl.where(there, col, -1)
    token, latent = tl.zeros([1], tl.int64) + row, col
    if BY_LATENT:
        token, latent = col, tl.zeros([1], tl.int64) + row
    h = dots(x_ptr, W_ptr, bias_ptr, token, latent, D, stride_x, stride_W, HAS_BIAS, C)
    if tl.max((there & ((tl.abs(h) < float("inf")) == 0)).to(tl.int32), 0) > 0:
        tl.store(bad_ptr, 1)
    if ABSOLUTE:
        h = tl.abs(h)
    if HAS_SCALE:
        h *= tl.load(scale_ptr + latent, mask=there, other=0.0)
    return tl.where(there & (h > 0), h, 0.0).to(tl.int32, bitcast=True)


@triton.jit
def score_histogram(
    x_ptr, W_ptr, bias_ptr, scale_ptr, bad_ptr, row, prefix, n_cols, D, stride_x, stride_W,
    ABOVE: tl.constexpr, SHIFT: tl.constexpr, BY_LATENT: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr, ABSOLUTE: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """As kernels/radix.py has it, of the scores of a row."""
    hist = tl.zeros([2048], tl.int32)
    for start in range(0, n_cols, C):
        bits = scores(
            x_ptr, W_ptr, bias_ptr, scale_ptr, bad_ptr, row, start, n_cols, D, stride_x, stride_W,
            BY_LATENT, HAS_BIAS, HAS_SCALE, ABSOLUTE, C,
        )  # fmt: skip
        hist += histogram(bits, prefix, ABOVE, SHIFT)
    return hist


@triton.jit
def _histogram_kernel(
    x_ptr,  # (N, D) any float
    W_ptr,  # (F, D) any float
    bias_ptr,  # (F) any float, or None
    scale_ptr,  # (F) fp32, or None
    bad_ptr,  # (out) (1) int32
    ptr_ptr,  # (N + 1) int64
    state_ptr,  # (2) int64
    hist_ptr,  # (in, out) (2048) int64
    N,
    F,
    D,
    ROOM,
    stride_x,
    stride_W,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    ABOVE: tl.constexpr,
    SHIFT: tl.constexpr,
    C: tl.constexpr,
):
    if tl.load(ptr_ptr + N) > ROOM:
        n = tl.program_id(0).to(tl.int64)
        prefix = tl.load(state_ptr).to(tl.int32)
        hist = score_histogram(
            x_ptr, W_ptr, bias_ptr, scale_ptr, bad_ptr, n, prefix, F, D, stride_x, stride_W,
            ABOVE, SHIFT, False, HAS_BIAS, HAS_SCALE, ABSOLUTE, C,
        )  # fmt: skip
        add(hist_ptr, hist)


@triton.jit
def _list_kernel(
    x_ptr,  # (N, D) any float
    W_ptr,  # (F, D) any float
    bias_ptr,  # (F) any float, or None
    scale_ptr,  # (F) fp32, or None
    bad_ptr,  # (out) (1) int32
    ptr_ptr,  # (N + 1) int64: of the list that had no room
    state_ptr,  # (2) int64
    above_ptr,  # (N) int64: pairs above the last score; (out) without FILL
    equal_ptr,  # (N) int64: pairs that have it, (out); with FILL how many of them are taken
    new_ptr_ptr,  # (N + 1) int64, with FILL
    row_ptr,  # (out) (ROOM) int32, with FILL
    col_ptr,  # (out) (ROOM) int32, with FILL
    N,
    F,
    D,
    ROOM,
    stride_x,
    stride_W,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    FILL: tl.constexpr,
    C: tl.constexpr,
):
    if tl.load(ptr_ptr + N) > ROOM:
        n = tl.program_id(0).to(tl.int64)
        last = tl.load(state_ptr).to(tl.int32)
        n_above, n_equal = tl.zeros([], tl.int64), tl.zeros([], tl.int64)
        if FILL:
            begin, quota = tl.load(new_ptr_ptr + n), tl.load(equal_ptr + n)
        for start in range(0, F, C):
            bits = scores(
                x_ptr, W_ptr, bias_ptr, scale_ptr, bad_ptr, n, start, F, D, stride_x, stride_W,
                False, HAS_BIAS, HAS_SCALE, ABSOLUTE, C,
            )  # fmt: skip
            if FILL:
                n_above, n_equal = store(
                    bits, last, n_above, n_equal, quota, begin, n, start, row_ptr, col_ptr, C
                )
            else:
                n_above += tl.sum((bits > last).to(tl.int32), 0)
                n_equal += tl.sum(((bits == last) & (bits > 0)).to(tl.int32), 0)
        if not FILL:
            tl.store(above_ptr + n, n_above)
            tl.store(equal_ptr + n, n_equal)


@triton.jit
def store(
    bits, last, n_above, n_equal, quota, begin, row, start, row_ptr, col_ptr, C: tl.constexpr
):
    """Lists the selected ones of a block; returns what the row has listed and seen so far."""
    equal = ((bits == last) & (bits > 0)).to(tl.int32)
    seen = n_equal + tl.cumsum(equal, 0)
    selected = (bits > last) | ((equal > 0) & (seen <= quota))
    count = selected.to(tl.int32)
    at = begin + n_above + tl.cumsum(count, 0) - count
    tl.store(row_ptr + at, (tl.zeros([C], tl.int32) + row).to(tl.int32), mask=selected)
    tl.store(col_ptr + at, start + tl.arange(0, C), mask=selected)
    return n_above + tl.sum(count, 0), n_equal + tl.sum(equal, 0)


def stream_batch(
    of: Operands, scale: Tensor | None, absolute: bool, budget: int, pairs: Pairs, counts: Tensor
) -> Pairs:
    """The pairs as they are; or, where they had no room, the `budget` best of the batch."""
    (n, d), f, room = of.x.shape, len(of.W), len(pairs.col)
    inputs = of.x, of.W, of.b, scale, of.bad, pairs.ptr
    sizes = n, f, d, room, of.x.stride(0), of.W.stride(0)
    has = {"HAS_BIAS": of.b is not None, "HAS_SCALE": scale is not None, "ABSOLUTE": absolute}
    search = Search(budget, of.x.device)
    for above, shift in LEVELS:
        digits = {"ABOVE": above, "SHIFT": shift}
        _histogram_kernel[(n,)](
            *inputs, search.state, search.hist, *sizes, **has, **digits, **CONFIG
        )
        search.cut(shift)
    equal = torch.zeros_like(counts)
    counted = *inputs, search.state, counts, equal
    _list_kernel[(n,)](*counted, None, None, None, *sizes, **has, FILL=False, **CONFIG)
    taken = (search.state[1] - equal.cumsum(0) + equal).clamp(min=0).minimum(equal)
    ptr = pointers(counts + taken)
    _list_kernel[(n,)](
        *(*inputs, search.state, counts, taken, ptr, pairs.row, pairs.col),
        *sizes,
        **has,
        FILL=True,
        **CONFIG,
    )
    return pairs._replace(ptr=ptr)


# Every product is rounded before it is added.
CONFIG: dict[str, Any] = {"C": 64, "num_warps": 8, "enable_fp_fusion": False}


def variants() -> dict[str, Variant]:
    """What the launchers ship, by name."""
    found = {}
    sizes = ", i32:16" * 6
    for w in ("bf16", "fp32"):
        for bias, scale in ((False, False), (True, True)):
            b, s = ("*fp32:16" if has else "None" for has in (bias, scale))
            inputs = f"*fp32:16, *{w}:16, {b}, {s}, *i32:16, *i64:16, *i64:16"
            has = {"HAS_BIAS": bias, "HAS_SCALE": scale, "ABSOLUTE": scale} | CONFIG
            name = f"{w}" + "-bias-scale-absolute" * bias
            found[f"histogram-{name}"] = Variant(
                _histogram_kernel, f"{inputs}, *i64:16{sizes}", has | {"ABOVE": 20, "SHIFT": 9}
            )
            for fill in (False, True):
                out = "*i64:16, *i32:16, *i32:16" if fill else "None, None, None"
                found[f"list-{name}" + "-fill" * fill] = Variant(
                    _list_kernel,
                    f"{inputs}, *i64:16, *i64:16, {out}{sizes}",
                    has | {"FILL": fill},
                )
    return found
