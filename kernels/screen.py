"""Screen: bounds of all scores by tensor-core products, and of each bucket the largest three.

    t = x W_encᵀ        u = t + b + m ≥ h        or, SCORED, u ≥ score

Shapes   x (N, D), W_enc (F, D), b_enc (F), latents (n_latents) as kernels/encode.py has them, and
         scale (F), guide (N, D_out), W_dec (F, D_out); x_bound (N) and W_bound (n_latents) as
         kernels/operands.py makes m of them; keys (N, 3 or 4, n_buckets) int32, as
         kernels/buckets.py has them: 12 bytes for the G pairs of a bucket, with scores 16.
Scores   The score rises with h or |h| and with |<guide, W_dec>|, also as rounded. So its bounds are
         the score of theirs: the products' sums and differences with their margins. The largest
         lower bound of a bucket is its fourth key. A pair that is not finite has u = inf, and no
         lower bound.
Order    No atomics; a bound is never a result.
"""

import itertools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae.kernels.buckets import Buckets, log2_bucket, store_keys
from fastsae.kernels.checks import Variant
from fastsae.kernels.operands import aligned
from fastsae.kernels.score import FORMS, PLAIN, Score
from fastsae.kernels.tile import is_long, products, tile_at, tile_config


@triton.jit
def _screen_kernel(
    x_ptr,  # (N, D) what the screen multiplies
    W_ptr,  # (F, D) likewise
    bias_ptr,  # (F) any float, or None
    latents_ptr,  # (n_latents) int32, or None for all
    x_bound_ptr,  # (N) fp32
    W_bound_ptr,  # (n_latents) fp32
    keys_ptr,  # (out) (N, 3, n_buckets) int32; (N, 4, n_buckets) where SCORED
    N,
    D,
    n_latents,
    n_tiles,
    stride_x,
    stride_W,
    guide_bound_ptr,  # (N) fp32, or None
    W_dec_bound_ptr,  # (n_latents) fp32, or None
    scale_ptr,  # (F) fp32, or None
    guide_ptr,  # (N, D_out) what the screen multiplies, or None
    W_dec_ptr,  # (F, D_out) likewise
    D_out,
    stride_guide,
    stride_W_dec,
    HAS_BIAS: tl.constexpr,
    HAS_LATENTS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    HAS_GUIDE: tl.constexpr,
    MULTIPLY: tl.constexpr,
    UPCAST: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    LOG2_G: tl.constexpr,
    GROUP: tl.constexpr,
):
    G: tl.constexpr = 1 << LOG2_G
    BUCKETS: tl.constexpr = BN // G
    SCORED: tl.constexpr = HAS_SCALE or ABSOLUTE or HAS_GUIDE
    tile_n, tile = tile_at(tl.program_id(0), N, n_tiles, BM, GROUP)
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

    b_bound = tl.load(W_bound_ptr + place, mask=there, other=0.0)[None, :]
    a_bound = tl.load(x_bound_ptr + n, mask=n < N, other=0.0)[:, None]
    if SCORED:
        slack = tl.zeros([BN], tl.float32)
        if HAS_BIAS:
            b = tl.load(bias_ptr + latent, mask=there, other=0.0).to(tl.float32)
            slack = tl.abs(b) * 2.0**-21
            acc += b[None, :]
        if ABSOLUTE:
            acc = tl.abs(acc)
        low = tl.maximum(tl.fma(-a_bound, b_bound, acc - slack[None, :]), 0.0)
        u = tl.fma(a_bound, b_bound, acc + slack[None, :])
        if HAS_SCALE:
            scale = tl.load(scale_ptr + latent, mask=there, other=0.0)
            low, u = low * scale[None, :], u * scale[None, :]
        if HAS_GUIDE:
            b_bound = tl.load(W_dec_bound_ptr + place, mask=there, other=0.0)[None, :]
            a_bound = tl.load(guide_bound_ptr + n, mask=n < N, other=0.0)[:, None]
            guided = tl.abs(guided)
            least = tl.maximum(tl.fma(-a_bound, b_bound, guided), 0.0)
            low, u = low * (1 + least), u * (1 + tl.fma(a_bound, b_bound, guided))
        reached = tl.max(tl.reshape(low, [BM, G, BUCKETS]), 1)
        reached = tl.where((reached > 0) & (reached < float("inf")), reached, 0.0)
    else:
        u = acc + a_bound * b_bound
        if HAS_BIAS:
            b = tl.load(bias_ptr + latent, mask=there, other=0.0).to(tl.float32)
            u += (b + tl.abs(b) * 2.0**-21)[None, :]
    u = tl.where(tl.abs(u) < float("inf"), u, float("inf"))  # kept
    at, mask = store_keys(
        keys_ptr, u, there, n, n < N, tile, n_tiles, 4 if SCORED else 3, BM, BN, LOG2_G
    )
    if SCORED:
        tl.store(at + 3 * n_tiles * BUCKETS, reached.to(tl.int32, bitcast=True), mask=mask)


def screen(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    latents: Tensor | None,
    bounds: tuple[Tensor, Tensor],
    k: int,
    multiply: str,
    score: Score,
    guide_bounds: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Buckets]:
    """keys, and how they lie. x and the guide as the screen multiplies them, with their bounds."""
    n_latents, d = len(W_enc) if latents is None else len(latents), x.shape[1]
    strides = x.stride(0), W_enc.stride(0)
    guided = score.arguments
    even = aligned(d, *strides, *(size for size in guided[3:] if isinstance(size, int)))
    has = b_enc is not None, latents is not None
    config = screen_config(n_latents, k, multiply, *has, d, even, score.constexprs)
    of = Buckets(n_latents, config["BN"], config["LOG2_G"])
    planes = 4 if score.changes else 3
    keys = torch.empty(len(x), planes, of.n_buckets, dtype=torch.int32, device=x.device)
    _screen_kernel[(triton.cdiv(len(x), config["BM"]) * of.n_tiles,)](
        *(x, W_enc, b_enc, latents, *bounds, keys, len(x), d, n_latents, of.n_tiles, *strides),
        *(guide_bounds or (None, None)),
        *guided,
        **config,
    )
    return keys, of


MAX_BUCKETS = 8192  # of a token, beyond which buckets grow to more than 32


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
    """score: `Score.constexprs`."""
    score = score or PLAIN.constexprs
    log2_g = log2_bucket(f, k, MAX_BUCKETS)
    # Gathered rows need registers for addresses, scores for lower bounds and perhaps a second
    # product.
    large, wide = not has_latents, not has_latents and log2_g >= 5
    if any(score.values()):
        large, wide = wide and is_long(d) and not score["HAS_GUIDE"], False
    return {
        "HAS_BIAS": has_bias,
        "HAS_LATENTS": has_latents,
        "LOG2_G": log2_g,
        **score,
        **tile_config(multiply, d, aligned, large, wide),
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
        guided = "*fp32:16, *fp32:16", f"*{x}:16, *{w}:16" + f", {i32}" * 3
        if not score["HAS_GUIDE"]:
            guided = "None, None", "None" + ", None" * 4
        name = w.removeprefix("fp32") or multiply
        name += f"-{1 << config['LOG2_G']}" + "-bias" * bias + "-latents" * latents + form
        found[name + kind] = Variant(
            _screen_kernel,
            f"{inputs}, {guided[0]}, {scale}, {guided[1]}",
            config | {"UPCAST": False},
        )
    return found
