"""Encode with a budget for each latent: the largest values of its column, without an (N, F) matrix.

    h[n, i] = <x[n], W_enc[i]> + b_enc[i]
    vals, idx, row_ptr = for each latent i the budgets[i] largest h[n, i] > 0, as rows of tokens

Shapes   x (N, D), W_enc (F, D), b_enc (F), budgets (F); vals, idx (room); row_ptr (N + 1).
Dtypes   x, W_enc, b_enc fp32, bf16 or fp16; vals fp32; idx, budgets int32; row_ptr int64.
Order    Equal values of a latent by token. The values are fixed-order dot products
         (kernels/dot.py), so results have the same bits as the CPU's.

Screen   kernels/keys.py with the roles changed: a row is a latent, its buckets are of tokens. One
         product in two launches: the F/32 latents with the largest budgets, found on the device,
         get buckets of 4 tokens, since budgets are often a few large ones and many small ones.
Bound    What budgets[i] pairs of latent i reach for certain, by two histograms of the lower bounds
         of its buckets' first pairs (kernels/radix.py). Pairs with u ≥ that are listed, given
         their exact values, ranked within the latent and cut.
Room     2·budgets[i] + 2 candidates, and 4·room + SLACK for what some latents have beyond; those
         for which that does not last are for kernels/stream_columns.py, which is slow. No host
         synchronisation either way.
Not finite  If a number or a value is not, or `room` is less than the budgets need, the first value
         is NaN, so that the loss is.

Bytes    x, W_enc and the keys twice, D elements for each candidate: `encode_columns_cost`.
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
from fastsae.kernels.radix import cut
from fastsae.kernels.stream_columns import stream_columns
from fastsae.reference import _check_budgets

SLACK = 1 << 16
HOT = 32  # one in so many latents has small buckets


@triton.jit
def _digit(
    keys_ptr, bias_ptr, x_bound_ptr, i, W_bound, prefix, wanted, n_buckets, n_tiles,
    ABOVE: tl.constexpr, SHIFT: tl.constexpr, HAS_BIAS: tl.constexpr,
    BUCKETS: tl.constexpr, LOG2_G: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As kernels/radix.py has it, of the lower bounds of one latent."""
    hist = bound_histogram(
        keys_ptr, bias_ptr, None, x_bound_ptr, i, W_bound, prefix, n_buckets, n_tiles,
        ABOVE, SHIFT, True, HAS_BIAS, False, BUCKETS, LOG2_G, BLOCK,
    )  # fmt: skip
    return cut(hist, wanted)


@triton.jit
def _bound_kernel(
    keys_ptr,  # (R, 3, n_buckets) int32
    which_ptr,  # (R) int32
    bias_ptr,  # (F) any float, or None
    W_bound_ptr,  # (F) fp32
    x_bound_ptr,  # (N) fp32
    budget_ptr,  # (F) int32
    threshold_ptr,  # (out) (F) int32 bits
    n_buckets,
    n_tiles,
    HAS_BIAS: tl.constexpr,
    BUCKETS: tl.constexpr,
    LOG2_G: tl.constexpr,
    BLOCK: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    keys_ptr += r * 3 * n_buckets
    i = tl.load(which_ptr + r)
    W_bound = tl.load(W_bound_ptr + i)
    wanted = tl.load(budget_ptr + i)
    high, wanted = _digit(
        keys_ptr, bias_ptr, x_bound_ptr, i, W_bound, 0, wanted, n_buckets, n_tiles,
        31, 20, HAS_BIAS, BUCKETS, LOG2_G, BLOCK,
    )  # fmt: skip
    low, wanted = _digit(
        keys_ptr, bias_ptr, x_bound_ptr, i, W_bound, high << 20, wanted, n_buckets, n_tiles,
        20, 9, HAS_BIAS, BUCKETS, LOG2_G, BLOCK,
    )  # fmt: skip
    tl.store(threshold_ptr + i, (high << 20) + (low << 9))


def encode_columns(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    budgets: Tensor,
    room: int,
    precision: str = "screened",
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`fastsae.reference.encode_columns`, but for what it does about non-finite numbers."""
    check_inputs(x, W_enc, b_enc, precision)
    n, f = len(x), len(W_enc)
    expect("budgets", budgets, (f,), (torch.int32,), W_enc)
    _check_budgets(budgets, n, room)
    with torch.cuda.device_of(x):
        of = operands(x, W_enc, b_enc, precision)
        room = room if n else 0
        if not n * f:
            return no_rows(n, room, x.device)
        wanted = budgets.clamp(0, n).long()
        lacking = wanted.sum() > room
        of = of._replace(bad=of.bad | lacking.int())
        spare = 4 * room + SLACK
        counts = torch.zeros(f, dtype=torch.int64, device=x.device)
        threshold = torch.zeros(f, dtype=torch.int32, device=x.device)
        order = budgets.argsort(descending=True, stable=True).int()
        parts = keys_of_groups(of, order, f // HOT, (n, 4 * room / f), by_latent=True)
        for part in parts:
            _bound(part, budgets, threshold)
        count_pairs(parts, threshold, of.bad, counts)
        beyond = (counts - 2 * wanted - 2).clamp(min=0)
        fits = (beyond == 0) | (beyond.cumsum(0) <= spare)
        ptr = pointers(counts.where(fits, wanted))
        room_of_all = 2 * room + 2 * f + spare
        pairs = list_pairs(parts, threshold, of.bad, counts, ptr, room_of_all)
        stream_columns(of, budgets, pairs, counts)

        value = values(of, pairs, by_latent=True)
        score = value.where((pairs.col >= 0) & (value > 0), -torch.inf)
        kept = (score > -torch.inf) & (ranks(pairs, score) < wanted[pairs.row])
        # In their order, by latent, without those between them.
        at = kept.cumsum(0) - 1
        token, latent = (place(at, kept, t, room, 0) for t in (pairs.col, pairs.row))
        score = place(at, kept, score, room, -torch.inf)
        rows = as_rows(token, latent, score, score, n, room)
        return mark(rows, value, of.bad)


def _bound(keys: Keys, budgets: Tensor, threshold: Tensor) -> None:
    """Writes the bits of a value that budgets[i] pairs of a latent reach for certain."""
    r, _, n_buckets = keys.keys.shape
    _bound_kernel[(r,)](
        *(keys.keys, keys.which, keys.bias, keys.a_bound, keys.b_bound, budgets, threshold),
        *(n_buckets, keys.buckets.n_tiles),
        **bound_config(n_buckets, keys.bias is not None),
        **keys.buckets.constexprs,
    )


def bound_config(n_buckets: int, has_bias: bool) -> dict[str, Any]:
    block = min(1024, max(128, triton.next_power_of_2(n_buckets)))
    return {"HAS_BIAS": has_bias, "BLOCK": block, "num_warps": max(4, block // 128)}


def variants() -> dict[str, Variant]:
    """What the launcher ships, by name."""
    found = {}
    for size, buckets in KINDS.items():
        for bias in (False, True):
            for n_buckets in (256, 2048) if size == 32 else (2048,):
                b = "*fp32:16" if bias else "None"
                pointers = f"*i32:16, *i32:16, {b}, *fp32:16, *fp32:16, *i32:16, *i32:16"
                found[f"bound-{size}-{n_buckets}" + "-bias" * bias] = Variant(
                    _bound_kernel,
                    f"{pointers}, i32:16, i32",
                    bound_config(n_buckets, bias) | buckets.constexprs,
                )
    return found


def encode_columns_cost(
    n: int, d: int, f: int, room: int, itemsize: int, candidates: float
) -> dict[str, Cost]:
    """By stage: x (n, d) fp32, f latents of itemsize, `candidates` for each pair of the room."""
    hot, listed = f // HOT, round(candidates * room)
    groups = (hot, n), (f - hot, 4 * room / f)
    return {
        "norms": norms_cost(n, d, f, itemsize),
        **candidates_cost(groups, n, d, itemsize, listed, 96 * f),
        **pairs_cost(listed, 6 * room + 2 * f + SLACK, room, d, 4, itemsize),
    }
