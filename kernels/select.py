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

Shapes   keys (N, 3, buckets) int32: the bits of u, with the place in the bucket in the lowest
         log2(G); where SCORED (N, 4, buckets), the last the bits of lower bounds. margin (N), norm
         (n_latents) and b_enc (F), of which m is made; places (N, room) int32: positions among the
         latents; counts (N) int32.
Order    One program a token, no atomics, nothing of a token depends on another.
Bytes    A token's keys: its first ones 22 times (they stay in L1), the others once.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae.kernels.checks import Variant


@triton.jit
def _place(bucket, slot, n_tiles, BUCKETS: tl.constexpr):
    """Which latent: the tile of kernels/encode.py that the bucket is in, and its column there."""
    return bucket // BUCKETS + n_tiles * (slot * BUCKETS + bucket % BUCKETS)


@triton.jit
def _unpack(keys, bucket, n_tiles, BUCKETS: tl.constexpr, G: tl.constexpr):
    """Upper bounds (rounded down by less than G·2⁻²³ of them) and places of packed keys."""
    slot = G - 1 - (keys & (G - 1))
    upper = (keys & -G).to(tl.float32, bitcast=True)
    return upper, _place(bucket, slot, n_tiles, BUCKETS)


@triton.jit
def _select_kernel(
    keys_ptr,  # (N, 3, n_buckets) int32; (N, 4, n_buckets) where SCORED
    margin_ptr,  # (N) fp32
    norm_ptr,  # (n_latents) fp32
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
    BUCKETS: tl.constexpr,  # of a tile
    G: tl.constexpr,
    BLOCK: tl.constexpr,
    SCORED: tl.constexpr = False,
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
    margin = tl.load(margin_ptr + n)
    tau = tl.full([BLOCK], float("inf"), tl.float32)
    for start in range(0, n_buckets, BLOCK):
        keys = tl.load(ranked_ptr + start + lane, mask=start + lane < n_buckets, other=0)
        taken = (keys >= t) & (keys > 0)
        if SCORED:
            lower = keys.to(tl.float32, bitcast=True)
        else:
            upper, place = _unpack(keys, start + lane, n_tiles, BUCKETS, G)
            m = margin * tl.load(norm_ptr + place, mask=taken, other=0.0)
            if HAS_BIAS:
                latent = place
                if HAS_LATENTS:
                    latent = tl.load(latents_ptr + place, mask=taken, other=0)
                b = tl.load(bias_ptr + latent, mask=taken, other=0.0).to(tl.float32)
                m += tl.abs(b) * 2.0**-21
            lower = upper * (1 - G * 2.0**-21) - 2 * m * (1 + 2.0**-10)
            lower = tl.where(lower == lower, lower, float("-inf"))
        tau = tl.minimum(tau, tl.where(taken, lower, float("inf")))
    # Without K first ones nothing is certain, and every positive pair is a candidate.
    threshold = tl.min(tau, 0)
    bits = tl.where((t > 0) & (threshold > 0), threshold.to(tl.int32, bitcast=True), 1)

    count = 0
    places_ptr += n * ROOM
    for start in range(0, n_buckets, BLOCK):
        bucket = start + lane
        mask = bucket < n_buckets
        first = tl.load(keys_ptr + bucket, mask=mask, other=0)
        second = tl.load(keys_ptr + n_buckets + bucket, mask=mask, other=0)
        third = tl.load(keys_ptr + 2 * n_buckets + bucket, mask=mask, other=0)
        flagged = third >= bits
        kept = (first >= bits).to(tl.int32) + (second >= bits).to(tl.int32)
        entries = tl.where(flagged, G, kept)
        at = count + tl.cumsum(entries, 0) - entries
        _, place1 = _unpack(first, bucket, n_tiles, BUCKETS, G)
        _, place2 = _unpack(second, bucket, n_tiles, BUCKETS, G)
        tl.store(places_ptr + at, place1, mask=(kept > 0) & (flagged == 0) & (at < ROOM))
        tl.store(places_ptr + at + 1, place2, mask=(kept > 1) & (flagged == 0) & (at + 1 < ROOM))
        if tl.max(flagged.to(tl.int32), 0) > 0:
            for slot in range(G):
                place = _place(bucket, slot, n_tiles, BUCKETS)
                place = tl.where(place < n_latents, place, -1)
                tl.store(places_ptr + at + slot, place, mask=flagged & (at + slot < ROOM))
        count += tl.sum(entries, 0)
    tl.store(counts_ptr + n, tl.where(margin == margin, count, -1))


def candidates(
    keys: Tensor,
    margin: Tensor,
    norm: Tensor,
    b_enc: Tensor | None,
    latents: Tensor | None,
    k: int,
    n_tiles: int,
    config: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """places and counts: as many candidates of a token as counts says, where there is room.

    counts is -1 where the token is not finite. config is the one that the screen ran with.
    """
    n, n_keys, n_buckets = keys.shape
    places = torch.empty(n, room_for(k), dtype=torch.int32, device=keys.device)
    counts = torch.empty(n, dtype=torch.int32, device=keys.device)
    has = b_enc is not None, latents is not None
    _select_kernel[(n,)](
        *(keys, margin, norm, b_enc, latents, places, counts),
        *(len(norm), n_buckets, n_tiles, k, places.shape[1]),
        **select_config(n_buckets, *has, config["BN"], config["LOG2_G"], n_keys == 4),
    )
    return places, counts


def room_for(k: int) -> int:
    """Of a token: what repairs and wide margins may add to the k best before it is streamed."""
    return 4 * k + 256


def select_config(
    n_buckets: int, has_bias: bool, has_latents: bool, bn: int, log2_g: int, scored: bool = False
) -> dict[str, Any]:
    block = min(2048, triton.next_power_of_2(n_buckets))
    return {
        "HAS_BIAS": has_bias,
        "HAS_LATENTS": has_latents,
        "BUCKETS": bn >> log2_g,
        "G": 1 << log2_g,
        "BLOCK": block,
        "SCORED": scored,
        "num_warps": max(2, min(8, block // 256)),
    }


def variants() -> dict[str, Variant]:
    """What the launcher ships, by name: numbers of buckets and their sizes."""
    found = {}
    for buckets, log2_g in ((768, 5), (4096, 5), (8192, 7), (192, 2)):
        for bias, latents, scored in (
            (False, False, False),
            (True, False, False),
            (True, True, False),
            (True, True, True),
        ):
            b = "*fp32:16" if bias else "None"
            ids = "*i32:16" if latents else "None"
            name = f"select-{buckets}-{1 << log2_g}" + "-bias" * bias + "-latents" * latents
            found[name + "-scored" * scored] = Variant(
                _select_kernel,
                f"*i32:16, *fp32:16, *fp32:16, {b}, {ids}, *i32:16, *i32:16"
                ", i32:16, i32:16, i32:16, i32:16, i32:16",
                select_config(buckets, bias, latents, 128, log2_g, scored),
            )
    return found
