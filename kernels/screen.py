"""Screen: bounds of all scores by tensor-core products, and of each bucket the largest three.

    t = x W_encᵀ        u = t + b + m ≥ h        or, SCORED, u ≥ score

Shapes   x (N, D), W_enc (F, D), b_enc (F), latents (n_latents) as kernels/encode.py has them, and
         scale (F), guide (N, D_out), W_dec (F, D_out); margin (N) and norm (n_latents), m their
         product; keys (N, 3 or 4, n_tiles · BN/G) int32.
Keys     The latents of a tile fall into buckets of G. Of each bucket and token the three largest u
         are written, 12/G bytes for each pre-activation. Their lowest log2(G) bits, by as much as
         which u is first raised, give way to the place in the bucket.
Latents  Tile j of T holds the latents j, j + T, j + 2T, …, so that neighbours, which fire alike
         where a dictionary is sorted, are spread over all buckets.
Scores   The score rises with h or |h| and with |<guide, W_dec>|, also as rounded. So its bounds are
         the score of theirs: the products' sums and differences with their margins. The largest
         lower bound of a bucket is its fourth key. A pair that is not finite has u = inf.
Order    No atomics; a bound is never a result.
"""

import itertools
from typing import Any

import torch
import triton
import triton.language as tl

from fastsae.kernels.checks import Variant
from fastsae.kernels.score import FORMS, PLAIN


@triton.jit
def halves(m, BM: tl.constexpr, HALF: tl.constexpr, BUCKETS: tl.constexpr):
    """The first and the second half of each bucket of m (BM, 2·HALF, BUCKETS)."""
    return tl.split(tl.permute(tl.reshape(m, [BM, 2, HALF, BUCKETS]), [0, 2, 3, 1]))


@triton.jit
def products(
    a_ptr, n, in_n, stride_a, b_ptr, latent, there, stride_b, D,
    MULTIPLY: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """(BM, BN): rows n of a times rows `latent` of b, 0 for rows that are not there."""
    d = tl.arange(0, BK)
    a_ptrs = a_ptr + n.to(tl.int64)[:, None] * stride_a + d[None, :]
    b_ptrs = b_ptr + latent.to(tl.int64)[:, None] * stride_b + d[None, :]
    acc = tl.zeros([BM, BN], tl.float32)
    for d0 in range(0, D, BK):
        in_row = d[None, :] < D - d0
        a = tl.load(a_ptrs + d0, mask=in_row & in_n[:, None], other=0.0)
        b = tl.load(b_ptrs + d0, mask=in_row & there[:, None], other=0.0)
        if MULTIPLY != "bf16" or UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, tl.trans(b), acc, input_precision="tf32" if MULTIPLY == "tf32" else "ieee")
    return acc


@triton.jit
def _screen_kernel(
    x_ptr,  # (N, D) what the screen multiplies
    W_ptr,  # (F, D) likewise
    bias_ptr,  # (F) any float, or None
    latents_ptr,  # (n_latents) int32, or None for all
    margin_ptr,  # (N) fp32
    norm_ptr,  # (n_latents) fp32
    keys_ptr,  # (out) (N, 3, n_tiles · BN/G) int32; (N, 4, …) where SCORED
    N,
    D,
    n_latents,
    n_tiles,
    stride_x,
    stride_W,
    HAS_BIAS: tl.constexpr,
    HAS_LATENTS: tl.constexpr,
    MULTIPLY: tl.constexpr,  # what of: "bf16", "tf32" or "ieee"
    UPCAST: tl.constexpr,  # the interpreter multiplies the bits of bf16 numbers
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    LOG2_G: tl.constexpr,
    GROUP: tl.constexpr,  # token tiles that share the latent tiles in L2
    HAS_SCALE: tl.constexpr = False,
    ABSOLUTE: tl.constexpr = False,
    HAS_GUIDE: tl.constexpr = False,
    scale_ptr=None,  # (F) fp32
    guide_ptr=None,  # (N, D_out) what the screen multiplies
    W_dec_ptr=None,  # (F, D_out) likewise
    guide_margin_ptr=None,  # (N) fp32
    guide_norm_ptr=None,  # (n_latents) fp32
    D_out=None,
    stride_guide=None,
    stride_W_dec=None,
):
    G: tl.constexpr = 1 << LOG2_G
    BUCKETS: tl.constexpr = BN // G
    SCORED: tl.constexpr = HAS_SCALE or ABSOLUTE or HAS_GUIDE
    pid = tl.program_id(0)
    first = pid // (GROUP * n_tiles) * GROUP
    group = min(tl.cdiv(N, BM) - first, GROUP)
    tile_n = first + pid % (GROUP * n_tiles) % group
    tile = pid % (GROUP * n_tiles) // group

    n = tile_n * BM + tl.arange(0, BM)
    place = tile + n_tiles * tl.arange(0, BN)
    there = place < n_latents
    latent = place
    if HAS_LATENTS:
        latent = tl.load(latents_ptr + place, mask=there, other=0)
    acc = products(
        x_ptr, n, n < N, stride_x, W_ptr, latent, there, stride_W, D, MULTIPLY, UPCAST, BM, BN, BK
    )
    if HAS_GUIDE:
        guided = products(
            guide_ptr, n, n < N, stride_guide, W_dec_ptr, latent, there, stride_W_dec, D_out,
            MULTIPLY, UPCAST, BM, BN, BK,
        )  # fmt: skip

    norm = tl.load(norm_ptr + place, mask=there, other=0.0)
    margin = tl.load(margin_ptr + n, mask=n < N, other=0.0)
    if SCORED:
        slack = tl.zeros([BN], tl.float32)
        if HAS_BIAS:
            b = tl.load(bias_ptr + latent, mask=there, other=0.0).to(tl.float32)
            slack = tl.abs(b) * 2.0**-21
            acc += b[None, :]
        if ABSOLUTE:
            acc = tl.abs(acc)
        low = tl.maximum(tl.fma(-margin[:, None], norm[None, :], acc - slack[None, :]), 0.0)
        u = tl.fma(margin[:, None], norm[None, :], acc + slack[None, :])
        if HAS_SCALE:
            scale = tl.load(scale_ptr + latent, mask=there, other=0.0)
            low, u = low * scale[None, :], u * scale[None, :]
        if HAS_GUIDE:
            norm = tl.load(guide_norm_ptr + place, mask=there, other=0.0)
            margin = tl.load(guide_margin_ptr + n, mask=n < N, other=0.0)
            guided = tl.abs(guided)
            least = tl.maximum(tl.fma(-margin[:, None], norm[None, :], guided), 0.0)
            low, u = low * (1 + least), u * (1 + tl.fma(margin[:, None], norm[None, :], guided))
        reached = tl.max(tl.reshape(low, [BM, G, BUCKETS]), 1)
        reached = tl.where(reached > 0, reached, 0.0)
        u = tl.where(tl.abs(u) < float("inf"), u, float("inf"))  # kept
    else:
        u = acc + margin[:, None] * norm[None, :]
        if HAS_BIAS:
            b = tl.load(bias_ptr + latent, mask=there, other=0.0).to(tl.float32)
            u += (b + tl.abs(b) * 2.0**-21)[None, :]
        u = tl.where(tl.abs(u) < float("inf"), u * (1 + G * 2.0**-22), float("inf"))  # kept
    u = tl.where((u > 0) & there[None, :], u, 0.0)
    bits = u.to(tl.int32, bitcast=True) + (G - 1 if SCORED else 0)  # rounds up, denormals too
    slot = (G - 1 - tl.arange(0, BN) // BUCKETS).to(tl.int32)  # of equals the lower latent first
    m1 = (bits & -G) | tl.where(u > 0, slot[None, :], 0)

    # The three largest of each bucket, by merging sorted triples.
    m1 = tl.reshape(m1, [BM, G, BUCKETS])
    a, b = halves(m1, BM, G // 2, BUCKETS)
    m1, m2, m3 = tl.maximum(a, b), tl.minimum(a, b), tl.zeros_like(a)
    for level in tl.static_range(2, LOG2_G + 1):
        a1, b1 = halves(m1, BM, G >> level, BUCKETS)
        a2, b2 = halves(m2, BM, G >> level, BUCKETS)
        a3, b3 = halves(m3, BM, G >> level, BUCKETS)
        low, high = tl.minimum(a1, b1), tl.maximum(a2, b2)
        m1, m2 = tl.maximum(a1, b1), tl.maximum(low, high)
        rest = tl.maximum(tl.maximum(a3, b3), tl.minimum(a2, b2))
        m3 = tl.maximum(tl.minimum(low, high), rest)

    n_buckets = n_tiles * BUCKETS
    bucket = tile * BUCKETS + tl.arange(0, BUCKETS)
    at = keys_ptr + n.to(tl.int64)[:, None] * (4 if SCORED else 3) * n_buckets + bucket[None, :]
    mask = (n < N)[:, None] & (bucket >= 0)[None, :]
    tl.store(at, tl.reshape(m1, [BM, BUCKETS]), mask=mask)
    tl.store(at + n_buckets, tl.reshape(m2, [BM, BUCKETS]), mask=mask)
    tl.store(at + 2 * n_buckets, tl.reshape(m3, [BM, BUCKETS]), mask=mask)
    if SCORED:
        tl.store(at + 3 * n_buckets, reached.to(tl.int32, bitcast=True), mask=mask)


WIDE_FROM = 1024  # elements of a row
MAX_BUCKETS = 8192  # of a token, beyond which buckets grow


def screen_config(
    f: int,
    k: int,
    multiply: str,
    has_bias: bool,
    has_latents: bool,
    d: int,
    aligned: bool,
    score: dict[str, bool] | None = None,
) -> dict[str, Any]:
    """Buckets so large that a token has 2k of them or more, and MAX_BUCKETS at most.

    Two small tiles share an SM, so that the end of one hides behind the other's products. Where
    rows are long there is little to hide, and a wide tile, for which an MI300 has too little shared
    memory, reads a third less from L2. score: `Score.constexprs`.
    """
    score = score or PLAIN.constexprs
    log2_g = 2
    while log2_g < 5 and f >> (log2_g + 1) >= 2 * k:
        log2_g += 1
    while log2_g < 7 and f >> log2_g > MAX_BUCKETS:
        log2_g += 1
    # Gathered or unaligned rows need registers for addresses, sums of products of fp32 for factors,
    # scores for lower bounds and perhaps a second product.
    plain = aligned and not has_latents and multiply != "ieee"
    wide = plain and d >= WIDE_FROM and log2_g >= 5 and torch.version.hip is None
    scored = any(score.values())
    large = wide and not score["HAS_GUIDE"] if scored else plain
    return {
        "HAS_BIAS": has_bias,
        "HAS_LATENTS": has_latents,
        "MULTIPLY": multiply,
        "UPCAST": triton.knobs.runtime.interpret,
        "BM": 128 if large else 64,
        "BN": 256 if wide and not scored else 128,
        "BK": (64 if multiply == "bf16" else 32) >> (not aligned),
        "LOG2_G": log2_g,
        "GROUP": 8,
        **score,
        "num_warps": 8,
        "num_stages": 3,
    }


def variants() -> dict[str, Variant]:
    """What the launcher ships, by name; ragged: no size or stride is a multiple of 16."""
    found = {}
    dtypes = (("bf16", "bf16"), ("fp32", "tf32"), ("fp32", "ieee"), ("fp16", "tf32"))
    sizes = ((131072, 64), (1 << 20, 64), (4096, 512))
    biases = ((False, False), (True, False), (True, True))
    kinds = (("", 768, "i32:16"), ("-wide", 4096, "i32:16"), ("-ragged", 3, "i32"))
    every = itertools.product(dtypes, FORMS.items(), sizes, biases, kinds)
    for (w, multiply), (form, score), (f, k), (bias, latents), (kind, d, i32) in every:
        if (form or w == "fp16") and (not bias or f != 131072):
            continue
        how = f, k, multiply, bias, latents
        config = screen_config(*how, d, kind != "-ragged", score)
        if kind == "-wide" and config == screen_config(*how, 768, True, score):
            continue
        x = w if multiply == "bf16" else "fp32"
        b, ids = "*fp32:16" if bias else "None", "*i32:16" if latents else "None"
        inputs = f"*{x}:16, *{w}:16, {b}, {ids}, *fp32:16, *fp32:16, *i32:16" + f", {i32}" * 6
        scale = "*fp32:16" if score["HAS_SCALE"] else "None"
        guide = f"*{x}:16, *{w}:16, *fp32:16, *fp32:16" + f", {i32}" * 3
        guide = guide if score["HAS_GUIDE"] else ", ".join(["None"] * 7)
        name = w.removeprefix("fp32") or multiply
        name += f"-{1 << config['LOG2_G']}" + "-bias" * bias + "-latents" * latents + form
        found[name + kind] = Variant(
            _screen_kernel, f"{inputs}, {scale}, {guide}", config | {"UPCAST": False}
        )
    return found
