"""Encode with one budget: the largest positive scores of a whole batch, without an (N, F) matrix.

    h[n, i] = <x[n], W_enc[i]> + b_enc[i]      score = h or |h|, times scale[i]
    vals, idx, row_ptr = the `budget` pairs (n, i) with the largest score > 0, as rows of tokens

Shapes   x (N, D), W_enc (F, D), b_enc (F), scale (F); vals, idx (room), room = min(budget, N·F);
         row_ptr (N + 1).
Dtypes   x, W_enc, b_enc fp32, bf16 or fp16; scale, vals fp32; idx int32; row_ptr int64.
Order    Equal scores by token, then by latent. The values are fixed-order dot products
         (kernels/dot.py), so results have the same bits as the CPU's.

Screen   kernels/keys.py: one product in two launches, the three largest upper bounds of each bucket
         of latents. The N/16 tokens of the largest norms, which may take most of the budget, get
         smaller buckets: where a simulation with heavy-tailed tokens had 10 candidates for each
         pair of the budget, it then had 1.1.
Bound    τ is what `budget` pairs score for certain: the budget-th largest lower bound of the
         buckets' first pairs, by two histograms (kernels/radix.py). Pairs with u ≥ τ are listed
         (kernels/candidates.py), given their exact values, sorted and cut (kernels/pairs.py).
Room     4·budget + SLACK candidates; more than that (equal latents, bounds wider than values
         differ by) are for kernels/stream.py, which is slow. No host synchronisation either way.
Not finite  If a number or a value is not, the first value is NaN, so that the loss is.

Bytes    x, W_enc and the keys twice, D elements for each candidate: `encode_batch_cost`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae.kernels.buckets import KINDS
from fastsae.kernels.candidates import (
    bound_histogram,
    candidates_cost,
    count_pairs,
    list_pairs,
    pointers,
)
from fastsae.kernels.checks import Cost, Variant, expect
from fastsae.kernels.keys import Keys, keys_of_groups
from fastsae.kernels.operands import check_inputs, norms_cost, operands
from fastsae.kernels.pairs import as_rows, mark, no_rows, pairs_cost, place, ranks, values
from fastsae.kernels.radix import ROUGH, Search, add
from fastsae.kernels.stream import stream_batch

SLACK = 1 << 16
HOT = 16  # one in so many tokens has small buckets


@triton.jit
def _bound_kernel(
    keys_ptr,  # (R, 3, n_buckets) int32
    which_ptr,  # (R) int32: which tokens
    bias_ptr,  # (F) any float, or None
    scale_ptr,  # (F) fp32, or None
    x_bound_ptr,  # (N) fp32
    W_bound_ptr,  # (F) fp32
    state_ptr,  # (2) int64
    hist_ptr,  # (in, out) (2048) int64
    n_buckets,
    n_tiles,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    ABOVE: tl.constexpr,
    SHIFT: tl.constexpr,
    BUCKETS: tl.constexpr,
    LOG2_G: tl.constexpr,
    BLOCK: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    keys_ptr += r * 3 * n_buckets
    n = tl.load(which_ptr + r)
    prefix = tl.load(state_ptr).to(tl.int32)
    x_bound = tl.load(x_bound_ptr + n)
    hist = bound_histogram(
        keys_ptr, bias_ptr, scale_ptr, W_bound_ptr, n, x_bound, prefix, n_buckets, n_tiles,
        ABOVE, SHIFT, False, HAS_BIAS, HAS_SCALE, BUCKETS, LOG2_G, BLOCK,
    )  # fmt: skip
    add(hist_ptr, hist)


def encode_batch(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    budget: int,
    precision: str = "screened",
    *,
    scale: Tensor | None = None,
    absolute: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`fastsae.reference.encode_batch`, but for what it does about non-finite numbers."""
    check_inputs(x, W_enc, b_enc, precision)
    n, f = len(x), len(W_enc)
    if scale is not None:
        expect("scale", scale, (f,), (torch.float32,), W_enc)
    if budget < 0:
        raise ValueError(f"budget: expected at least 0, got {budget}")
    with torch.cuda.device_of(x):
        of = operands(x, W_enc, b_enc, precision)
        budget = min(budget, n * f)
        if not n * f:
            return no_rows(n, budget, x.device)
        order = of.x_bound.argsort(descending=True).int()
        ks = 4 * HOT * budget / n, budget / n
        parts = keys_of_groups(of, order, n // HOT, ks, False, scale, absolute)
        threshold = _bound(parts, budget)
        counts = torch.empty(n, dtype=torch.int64, device=x.device)
        count_pairs(parts, threshold, of.bad, counts)
        pairs = list_pairs(parts, threshold, of.bad, counts, pointers(counts), 4 * budget + SLACK)
        room = len(pairs.col)
        pairs = stream_batch(of, scale, absolute, budget, pairs, counts)

        value = values(of, pairs, by_latent=False)
        latent = pairs.col.clamp(min=0)
        score = value.abs() if absolute else value
        score = score if scale is None else score * scale[latent]
        score = score.where((pairs.col >= 0) & (score > 0), -torch.inf)
        # By token, score, latent: then equal scores are in their order.
        at, kept = pairs.ptr[pairs.row] + ranks(pairs, score), score > -torch.inf
        token, latent = (place(at, kept, t, room, 0) for t in (pairs.row, latent))
        rows = as_rows(
            token, latent.int(), place(at, kept, value, room, 0.0),
            place(at, kept, score, room, -torch.inf), n, budget,
        )  # fmt: skip
        return mark(rows, value, of.bad)


def _bound(parts: list[Keys], budget: int) -> Tensor:
    """(1) int32: the bits of a score that `budget` pairs reach for certain."""
    search = Search(budget, parts[0].keys.device)
    for above, shift in ROUGH:
        for of in parts:
            r, _, n_buckets = of.keys.shape
            _bound_kernel[(r,)](
                *(of.keys, of.which, of.bias, of.scale, of.a_bound, of.b_bound),
                *(search.state, search.hist, n_buckets, of.buckets.n_tiles),
                **bound_config(of.bias is not None, of.scale is not None, above, shift),
                **of.buckets.constexprs,
            )
        search.cut(shift)
    return search.bits()


def bound_config(has_bias: bool, has_scale: bool, above: int, shift: int) -> dict[str, Any]:
    return {
        "HAS_BIAS": has_bias,
        "HAS_SCALE": has_scale,
        "ABOVE": above,
        "SHIFT": shift,
        "BLOCK": 1024,
        "num_warps": 8,
    }


def variants() -> dict[str, Variant]:
    """What the launcher ships, by name."""
    found = {}
    for size, buckets in KINDS.items():
        for bias, scale in ((False, False), (True, False), (True, True)):
            b, s = ("*fp32:16" if has else "None" for has in (bias, scale))
            pointers = f"*i32:16, *i32:16, {b}, {s}, *fp32:16, *fp32:16, *i64:16, *i64:16"
            config = bound_config(bias, scale, *ROUGH[1]) | buckets.constexprs
            found[f"bound-{size}" + "-bias" * bias + "-scale" * scale] = Variant(
                _bound_kernel, f"{pointers}, i32:16, i32", config
            )
    return found


def encode_batch_cost(
    n: int, d: int, f: int, budget: int, itemsize: int, candidates: float
) -> dict[str, Cost]:
    """By stage: x (n, d) fp32, f latents of itemsize, `candidates` for each pair of the budget."""
    hot, listed = n // HOT, round(candidates * budget)
    groups = (hot, 4 * HOT * budget / n), (n - hot, budget / n)
    return {
        "norms": norms_cost(n, d, f, itemsize),
        **candidates_cost(groups, f, d, itemsize, listed, 0),
        **pairs_cost(listed, 4 * budget + SLACK, budget, d, itemsize, 4),
    }
