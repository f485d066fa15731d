"""Rescan: for a token with more candidates than room, the k best of all latents.

Equal latents and hostile norms make such tokens. Every score is computed (kernels/score.py), and
the places of the k best positive ones become the token's candidates. Other tokens end it at once.

Shapes   As kernels/score.py; places (N, room) and counts (N) are read and written.
Not finite  Where a value is not finite, counts is -1.
Order    One program a token; of equal scores the lower latent.
Bytes    W_enc once a token, with a guide also W_dec.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastsae.kernels.checks import Variant
from fastsae.kernels.score import SCORE_CONFIG, Score, forms, scores


@triton.jit
def _rescan_kernel(
    x_ptr,  # (N, D) any float
    W_ptr,  # (F, D) any float
    bias_ptr,  # (F) any float, or None
    latents_ptr,  # (n_latents) int32, or None
    places_ptr,  # (out) (N, ROOM) int32
    counts_ptr,  # (in, out) (N) int32
    D,
    n_latents,
    K,
    ROOM,
    stride_x,
    stride_W,
    scale_ptr,  # (F) fp32, or None
    guide_ptr,  # (N, D_out) fp32, or None
    W_dec_ptr,  # (F, D_out) any float, or None
    D_out,
    stride_guide,
    stride_W_dec,
    HAS_BIAS: tl.constexpr,
    HAS_LATENTS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    HAS_GUIDE: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,  # at least K
):
    n = tl.program_id(0).to(tl.int64)
    if tl.load(counts_ptr + n) > ROOM:
        lane = tl.arange(0, BLOCK)
        # Score and place in one integer, larger the better; distinct, so that one gives way.
        never = tl.full([C], -1, tl.int64) << 62
        best = tl.where(
            lane < K, (-1 - lane).to(tl.int64), tl.full([BLOCK], 0x7FFFFFFFFFFFFFFF, tl.int64)
        )
        least = tl.min(best, 0)
        bad = 0
        for start in range(0, n_latents, C):
            place = start + tl.arange(0, C)
            there = place < n_latents
            h, score = scores(
                x_ptr, W_ptr, bias_ptr, latents_ptr, scale_ptr, guide_ptr, W_dec_ptr, n,
                tl.where(there, place, -1),
                D, D_out, stride_x, stride_W, stride_guide, stride_W_dec,
                HAS_BIAS, HAS_LATENTS, HAS_SCALE, ABSOLUTE, HAS_GUIDE, C,
            )  # fmt: skip
            bad |= tl.max(tl.where(tl.abs(h) < float("inf"), 0, 1), 0)
            score = tl.where(there & (score > 0), score, 0.0)
            fresh = score.to(tl.int32, bitcast=True).to(tl.int64) << 32 | (0x7FFFFFFF - place)
            fresh = tl.where(score > 0, fresh, never)
            largest = tl.max(fresh, 0)
            while largest > least:
                best = tl.where(best == least, largest, best)
                least = tl.min(best, 0)
                fresh = tl.where(fresh == largest, never, fresh)
                largest = tl.max(fresh, 0)
        place = (0x7FFFFFFF - (best & 0x7FFFFFFF)).to(tl.int32)
        tl.store(places_ptr + n * ROOM + lane, tl.where(best > 0, place, -1), mask=lane < K)
        tl.store(counts_ptr + n, tl.where(bad > 0, -1, K))


def rescan(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    latents: Tensor | None,
    places: Tensor,
    counts: Tensor,
    k: int,
    n_latents: int,
    score: Score,
) -> None:
    """Writes places and counts of the tokens whose counts exceed their room. k is at most that."""
    has = {"HAS_BIAS": b_enc is not None, "HAS_LATENTS": latents is not None} | score.constexprs
    _rescan_kernel[(len(x),)](
        *(x, W_enc, b_enc, latents, places, counts, x.shape[1], n_latents, k, places.shape[1]),
        *(x.stride(0), W_enc.stride(0), *score.arguments),
        **has,
        **rescan_config(k),
    )


def rescan_config(k: int) -> dict[str, Any]:
    return {"BLOCK": max(128, triton.next_power_of_2(k))} | SCORE_CONFIG


def variants() -> dict[str, Variant]:
    """What the launcher ships, by name."""
    found = {}
    for name, inputs, score, config in forms():
        for k in (64, 1024):
            found[f"rescan-{name}-{k}"] = Variant(
                _rescan_kernel,
                f"{inputs}, *i32:16, *i32:16" + ", i32:16" * 6 + f", {score}",
                config | rescan_config(k),
            )
    return found
