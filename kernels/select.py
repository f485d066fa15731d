"""Select: which pairs can be among the k best of a token, by what the screen kept of them.

A pair's value h lies in u - 2m ≤ h ≤ u (kernels/encode.py), and of each bucket of G latents the
three largest u are known.

Threshold  τ is what k values reach for certain: of the k (or a few more) largest u among the
           buckets' first ones, the smallest u - 2m. Only pairs with u ≥ τ can be among the k best.
           Of scores, the k-th largest of the buckets' largest lower bounds, their fourth keys.
Repair     A bucket whose third u is below τ has kept all of those. Any other is flagged, and all
           its G latents become candidates. It holds three pairs that reach τ, so about k/3 buckets
           at most are flagged where bounds are tight, and about k³/6·buckets² of them on random
           data: 0.003 a token at F = 131072, k = 64.

Shapes   keys (N, 3, n_buckets) int32 (kernels/buckets.py), where SCORED (N, 4, n_buckets), the last
         the bits of lower bounds; x_bound (N), W_bound (n_latents) and b_enc (F), of which
         kernels/operands.py makes m; places (N, room) int32: positions among the latents; counts
         (N) int32.
Order    One program a token, no atomics, nothing of a token depends on another.
Bytes    A token's keys: its first ones 22 times (they stay in L1), the others once.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae.kernels.buckets import (
    KINDS,
    Buckets,
    certain,
    column_of,
    listed,
    listed_column,
    most_listed,
)
from fastsae.kernels.checks import Variant


@triton.jit
def _select_kernel(
    keys_ptr,  # (N, 3, n_buckets) int32; (N, 4, n_buckets) where SCORED
    x_bound_ptr,  # (N) fp32
    W_bound_ptr,  # (n_latents) fp32
    bias_ptr,  # (F) any float, or None
    latents_ptr,  # (n_latents) int32, or None
    places_ptr,  # (out) (N, ROOM) int32, -1 for a place that no latent has
    counts_ptr,  # (out) (N) int32: how many there are, also beyond ROOM; -1: x is not finite
    n_latents,
    n_buckets,
    n_tiles,
    K,
    ROOM,
    HAS_BIAS: tl.constexpr,
    HAS_LATENTS: tl.constexpr,
    SCORED: tl.constexpr,
    BUCKETS: tl.constexpr,  # of a tile
    LOG2_G: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    keys_ptr += n * (4 if SCORED else 3) * n_buckets
    ranked_ptr = keys_ptr
    if SCORED:
        ranked_ptr += 3 * n_buckets
    # The largest t, to 20 of its bits, that K of the first ones reach: bits order positive floats.
    t = 0
    for i in range(20):
        candidate = t + (1 << (30 - i))
        reached = tl.zeros([BLOCK], tl.int32)
        for start in range(0, n_buckets, BLOCK):
            keys = tl.load(ranked_ptr + start + lane, mask=start + lane < n_buckets, other=0)
            reached += (keys >= candidate).to(tl.int32)
        t = tl.where(tl.sum(reached, 0) >= K, candidate, t)
    x_bound = tl.load(x_bound_ptr + n)
    # What all of these score for certain.
    tau = tl.full([BLOCK], 0x7FFFFFFF, tl.int32)
    for start in range(0, n_buckets, BLOCK):
        bucket = start + lane
        keys = tl.load(ranked_ptr + bucket, mask=bucket < n_buckets, other=0)
        taken = (keys >= t) & (keys > 0)
        lower = keys
        if not SCORED:
            place = column_of(keys, bucket, n_tiles, BUCKETS, LOG2_G)
            m = x_bound * tl.load(W_bound_ptr + place, mask=taken, other=0.0)
            if HAS_BIAS:
                latent = place
                if HAS_LATENTS:
                    latent = tl.load(latents_ptr + place, mask=taken, other=0)
                b = tl.load(bias_ptr + latent, mask=taken, other=0.0).to(tl.float32)
                m += tl.abs(b) * 2.0**-21
            lower = certain(keys, m, LOG2_G)
        tau = tl.minimum(tau, tl.where(taken, lower, 0x7FFFFFFF))
    # Without K first ones nothing is certain, and every positive pair is a candidate.
    bits = tl.where(t > 0, tl.maximum(tl.min(tau, 0), 1), 1)

    count = 0
    places_ptr += n * ROOM
    for start in range(0, n_buckets, BLOCK):
        bucket = start + lane
        first, second, flagged, entries = listed(keys_ptr, bucket, n_buckets, bits, LOG2_G)
        at = count + tl.cumsum(entries, 0) - entries
        for which in range(most_listed(flagged, LOG2_G)):
            place = listed_column(
                first, second, flagged, which, bucket, n_latents, n_tiles, BUCKETS, LOG2_G
            )
            stored = (which < entries) & (at + which < ROOM)
            tl.store(places_ptr + at + which, place, mask=stored)
        count += tl.sum(entries, 0)
    tl.store(counts_ptr + n, tl.where(x_bound == x_bound, count, -1))


def candidates(
    keys: Tensor,
    x_bound: Tensor,
    W_bound: Tensor,
    b_enc: Tensor | None,
    latents: Tensor | None,
    k: int,
    of: Buckets,
) -> tuple[Tensor, Tensor]:
    """places and counts: as many candidates of a token as counts says, where there is room.

    counts is -1 where the token is not finite.
    """
    n, planes, n_buckets = keys.shape
    places = torch.empty(n, room_for(k), dtype=torch.int32, device=keys.device)
    counts = torch.empty(n, dtype=torch.int32, device=keys.device)
    has = b_enc is not None, latents is not None, planes == 4
    _select_kernel[(n,)](
        *(keys, x_bound, W_bound, b_enc, latents, places, counts),
        *(len(W_bound), n_buckets, of.n_tiles, k, places.shape[1]),
        **select_config(n_buckets, *has),
        **of.constexprs,
    )
    return places, counts


def room_for(k: int) -> int:
    """Of a token: what repairs and wide margins may add to the k best before it is streamed."""
    return 4 * k + 256


def select_config(
    n_buckets: int, has_bias: bool, has_latents: bool, scored: bool
) -> dict[str, Any]:
    block = min(2048, triton.next_power_of_2(n_buckets))
    return {
        "HAS_BIAS": has_bias,
        "HAS_LATENTS": has_latents,
        "SCORED": scored,
        "BLOCK": block,
        "num_warps": max(2, min(8, block // 256)),
    }


def variants() -> dict[str, Variant]:
    """What the launcher ships, by name: numbers of buckets and their sizes."""
    found = {}
    for n_buckets, size in ((768, 32), (4096, 32), (8192, 128), (192, 4)):
        for has in (
            (False, False, False),
            (True, False, False),
            (True, True, False),
            (True, True, True),
        ):
            bias, latents, scored = has
            b = "*fp32:16" if bias else "None"
            ids = "*i32:16" if latents else "None"
            name = f"select-{n_buckets}-{size}" + "-bias" * bias + "-latents" * latents
            found[name + "-scored" * scored] = Variant(
                _select_kernel,
                f"*i32:16, *fp32:16, *fp32:16, {b}, {ids}, *i32:16, *i32:16"
                ", i32:16, i32:16, i32:16, i32:16, i32:16",
                select_config(n_buckets, *has) | KINDS[size].constexprs,
            )
    return found
