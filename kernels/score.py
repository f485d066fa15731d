"""Score: the values of a token's candidates, and the k best of them in order.

    h[n, i] = dot(x[n], W_enc[i]) + b_enc[i]

The dot product has the one summation order of csrc/simd.h: 64 running sums, product and sum rounded
apart, then halves added to halves. So all backends emit the same bits.

_score_kernel   h of the candidates.
_finish_kernel  A candidate's rank is the number of candidates above it in the order (h descending,
                latent ascending). Those with rank < k and h > 0 are stored at their rank.
_stream_kernel  Where a token has more candidates than room (equal latents, hostile norms): h of all
                latents, of which the k best stay candidates. Other tokens end it at once.

Shapes   x (N, D), W_enc (F, D), b_enc (F), latents (n_latents) or None; places (N, room), counts
         (N) as kernels/select.py gives them; vals, idx (N, k).
Dtypes   x, W_enc, b_enc fp32, bf16 or fp16, each on its own; vals fp32; the rest int32.
Not finite  A token with a value that is not finite gets NaN as its first one.
Order    No atomics; a program reads nothing that it wrote.
Bytes    D·itemsize for each candidate: those of k and a few more; all else is small.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae.kernels.checks import Variant

MAX_K = 1024


@triton.jit
def _values(
    x_row, W_ptr, bias_ptr, latents_ptr, place, there, D, stride_W,
    HAS_BIAS: tl.constexpr, HAS_LATENTS: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """h of one token and the latents at C places; 0 where not there."""
    latent = place
    if HAS_LATENTS:
        latent = tl.load(latents_ptr + place, mask=there, other=0)
    W_rows = W_ptr + latent.to(tl.int64) * stride_W
    lane = tl.arange(0, 64)
    sums = tl.zeros([C, 64], tl.float32)
    for d0 in range(0, D, 64):
        d = d0 + lane
        x = tl.load(x_row + d, mask=d < D, other=0.0).to(tl.float32)
        mask = there[:, None] & (d < D)[None, :]
        W = tl.load(W_rows[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
        sums += x[None, :] * W  # enable_fp_fusion=False keeps the two roundings apart
    for level in tl.static_range(6):
        sums = tl.sum(tl.reshape(sums, [C, 2, 32 >> level]), axis=1)
    h = tl.reshape(sums, [C])
    if HAS_BIAS:
        h += tl.load(bias_ptr + latent, mask=there, other=0.0).to(tl.float32)
    return h


@triton.jit
def _score_kernel(
    x_ptr,  # (N, D) any float
    W_ptr,  # (F, D) any float
    bias_ptr,  # (F) any float, or None
    latents_ptr,  # (n_latents) int32, or None
    places_ptr,  # (N, ROOM) int32
    counts_ptr,  # (N) int32
    values_ptr,  # (out) (N, ROOM) fp32
    D,
    ROOM,
    stride_x,
    stride_W,
    HAS_BIAS: tl.constexpr,
    HAS_LATENTS: tl.constexpr,
    C: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    count = tl.load(counts_ptr + n)
    count = tl.where(count > ROOM, 0, count)
    for start in range(0, count, C):
        at = start + tl.arange(0, C)
        place = tl.load(places_ptr + n * ROOM + at, mask=at < count, other=-1)
        h = _values(
            x_ptr + n * stride_x, W_ptr, bias_ptr, latents_ptr, place, place >= 0, D, stride_W,
            HAS_BIAS, HAS_LATENTS, C,
        )  # fmt: skip
        tl.store(values_ptr + n * ROOM + at, tl.where(place >= 0, h, 0.0), mask=at < count)


@triton.jit
def _finish_kernel(
    places_ptr,  # (N, ROOM) int32
    values_ptr,  # (N, ROOM) fp32
    counts_ptr,  # (N) int32
    latents_ptr,  # (n_latents) int32, or None
    vals_ptr,  # (out) (N, K) fp32, zeros before
    idx_ptr,  # (out) (N, K) int32, -1 before
    K,
    ROOM,
    HAS_LATENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    count = tl.load(counts_ptr + n)
    finite = tl.where(count >= 0, 1, 0)
    places_ptr += n * ROOM
    values_ptr += n * ROOM
    for start in range(0, count, BLOCK):
        j = start + tl.arange(0, BLOCK)
        h = tl.load(values_ptr + j, mask=j < count, other=0.0)
        finite &= tl.min((tl.abs(h) < float("inf")).to(tl.int32), 0)
    room = tl.where(finite == 1, K, 0)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        h = tl.load(values_ptr + i, mask=i < count, other=0.0)
        place = tl.load(places_ptr + i, mask=i < count, other=0)
        rank = tl.zeros([BLOCK], tl.int32)
        for other in range(0, count, BLOCK):
            j = other + tl.arange(0, BLOCK)
            rival = tl.load(values_ptr + j, mask=j < count, other=0.0)[None, :]
            rival_place = tl.load(places_ptr + j, mask=j < count, other=0)[None, :]
            above = (rival > h[:, None]) | ((rival == h[:, None]) & (rival_place < place[:, None]))
            rank += tl.sum(above.to(tl.int32), 1)
        latent = place
        if HAS_LATENTS:
            latent = tl.load(latents_ptr + place, mask=(i < count) & (place >= 0), other=0)
        stored = (h > 0) & (rank < room)
        tl.store(vals_ptr + n * K + rank, h, mask=stored)
        tl.store(idx_ptr + n * K + rank, latent, mask=stored)
    if finite == 0:
        tl.store(vals_ptr + n * K, float("nan"))
        tl.store(idx_ptr + n * K, 0)


@triton.jit
def _stream_kernel(
    x_ptr,  # (N, D) any float
    W_ptr,  # (F, D) any float
    bias_ptr,  # (F) any float, or None
    latents_ptr,  # (n_latents) int32, or None
    places_ptr,  # (out) (N, ROOM) int32
    values_ptr,  # (out) (N, ROOM) fp32
    counts_ptr,  # (in, out) (N) int32
    D,
    n_latents,
    K,
    ROOM,
    stride_x,
    stride_W,
    HAS_BIAS: tl.constexpr,
    HAS_LATENTS: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,  # at least K
):
    n = tl.program_id(0).to(tl.int64)
    if tl.load(counts_ptr + n) > ROOM:
        lane = tl.arange(0, BLOCK)
        # Value and place in one integer, larger the better; distinct, so that one gives way.
        never = tl.full([C], -1, tl.int64) << 62
        best = tl.where(
            lane < K, (-1 - lane).to(tl.int64), tl.full([BLOCK], 0x7FFFFFFFFFFFFFFF, tl.int64)
        )
        least = tl.min(best, 0)
        bad = 0
        for start in range(0, n_latents, C):
            place = start + tl.arange(0, C)
            there = place < n_latents
            h = _values(
                x_ptr + n * stride_x, W_ptr, bias_ptr, latents_ptr, place, there, D, stride_W,
                HAS_BIAS, HAS_LATENTS, C,
            )  # fmt: skip
            bad |= tl.max(tl.where(tl.abs(h) < float("inf"), 0, 1), 0)
            h = tl.where(there & (h > 0), h, 0.0)
            fresh = h.to(tl.int32, bitcast=True).to(tl.int64) << 32 | (0x7FFFFFFF - place)
            fresh = tl.where(h > 0, fresh, never)
            largest = tl.max(fresh, 0)
            while largest > least:
                best = tl.where(best == least, largest, best)
                least = tl.min(best, 0)
                fresh = tl.where(fresh == largest, never, fresh)
                largest = tl.max(fresh, 0)
        h = (best >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        h = tl.where(best > 0, h, 0.0)
        h = tl.where(bad > 0, float("nan"), h)
        place = (0x7FFFFFFF - (best & 0x7FFFFFFF)).to(tl.int32)
        tl.store(values_ptr + n * ROOM + lane, h, mask=lane < K)
        tl.store(places_ptr + n * ROOM + lane, place, mask=lane < K)
        tl.store(counts_ptr + n, K)


def best(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    latents: Tensor | None,
    places: Tensor,
    counts: Tensor,
    k: int,
    n_latents: int,
) -> tuple[Tensor, Tensor]:
    """vals and idx; 0 and -1 pad where fewer than k are positive. k ≤ MAX_K."""
    (n, d), room = x.shape, places.shape[1]
    values = torch.empty(n, room, dtype=torch.float32, device=x.device)
    vals = torch.zeros(n, k, dtype=torch.float32, device=x.device)
    idx = torch.full((n, k), -1, dtype=torch.int32, device=x.device)
    inputs, strides = (x, W_enc, b_enc, latents), (x.stride(0), W_enc.stride(0))
    has = {"HAS_BIAS": b_enc is not None, "HAS_LATENTS": latents is not None}
    _score_kernel[(n,)](*inputs, places, counts, values, d, room, *strides, **has, **SCORE_CONFIG)
    sizes = d, n_latents, k, room
    _stream_kernel[(n,)](
        *inputs, places, values, counts, *sizes, *strides, **has, **stream_config(k)
    )
    _finish_kernel[(n,)](
        *(places, values, counts, latents, vals, idx, k, room),
        HAS_LATENTS=latents is not None,
        **FINISH_CONFIG,
    )
    return vals, idx


# Every product is rounded before it is added.
SCORE_CONFIG = {"C": 16, "num_warps": 4, "enable_fp_fusion": False}
FINISH_CONFIG = {"BLOCK": 64, "num_warps": 4}


def stream_config(k: int) -> dict[str, Any]:
    return {"BLOCK": max(128, triton.next_power_of_2(k))} | SCORE_CONFIG


def variants() -> dict[str, Variant]:
    """What the launchers ship, by name."""
    found = {}
    for w in ("bf16", "fp32"):
        for bias, latents in ((False, False), (True, False), (True, True)):
            b = "*fp32:16" if bias else "None"
            ids = "*i32:16" if latents else "None"
            name = w + "-bias" * bias + "-latents" * latents
            has = {"HAS_BIAS": bias, "HAS_LATENTS": latents}
            inputs = f"*fp32:16, *{w}:16, {b}, {ids}"
            signature = f"{inputs}, *i32:16, *i32:16, *fp32:16" + ", i32:16" * 4
            found[f"score-{name}"] = Variant(_score_kernel, signature, has | SCORE_CONFIG)
            for k in (64, 1024):
                signature = f"{inputs}, *i32:16, *fp32:16, *i32:16" + ", i32:16" * 6
                config = has | stream_config(k)
                found[f"stream-{name}-{k}"] = Variant(_stream_kernel, signature, config)
            found[f"finish-{name}"] = Variant(
                _finish_kernel,
                f"*i32:16, *fp32:16, *i32:16, {ids}, *fp32:16, *i32:16, i32:16, i32:16",
                {"HAS_LATENTS": latents} | FINISH_CONFIG,
            )
    return found
