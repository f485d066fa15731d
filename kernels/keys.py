"""Keys: of each bucket of a product's columns the three largest upper bounds.

    u = (|t + b| + m)·scale, without ABSOLUTE (t + b + m)·scale, is at least the score of a pair

kernels/buckets.py has the keys, kernels/tile.py t and kernels/operands.py m. A row is a token and a
column a latent; or, BY_LATENT, a row is a latent and a column a token.

Shapes   a (R, D), b (C, D); scale (F) fp32; keys (R, 3, n_buckets) int32.
Order    No atomics; a bound is never a result.
Bytes    Tiles through L2 as kernels/tile.py has them, and 12 for the G pairs of a bucket.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae.kernels.buckets import Buckets, log2_bucket, store_keys
from fastsae.kernels.checks import Cost, Variant
from fastsae.kernels.operands import Operands
from fastsae.kernels.tile import product_cost, products, tile_at, tile_config

MAX_BYTES = 1 << 30  # of keys, beyond which buckets grow to more than 32


@triton.jit
def _keys_kernel(
    a_ptr,  # (R, D) what the screen multiplies
    b_ptr,  # (C, D) likewise
    bias_ptr,  # (F) any float, or None
    scale_ptr,  # (F) fp32, or None
    which_ptr,  # (R) int32: the rows of a to take
    a_bound_ptr,  # (rows of a) fp32
    b_bound_ptr,  # (C) fp32
    keys_ptr,  # (out) (R, 3, n_buckets) int32
    R,
    D,
    C,
    n_tiles,
    stride_a,
    stride_b,
    BY_LATENT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    MULTIPLY: tl.constexpr,
    UPCAST: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    LOG2_G: tl.constexpr,
    GROUP: tl.constexpr,
):
    tile_r, tile = tile_at(tl.program_id(0), R, n_tiles, BM, GROUP)
    r = tile_r * BM + tl.arange(0, BM)
    row = tl.load(which_ptr + r, mask=r < R, other=0)
    col = tile + n_tiles * tl.arange(0, BN)
    there = col < C
    u = products(
        a_ptr, row, r < R, stride_a, b_ptr, col, there, stride_b, D, MULTIPLY, UPCAST, BM, BN, BK
    )
    a_bound = tl.load(a_bound_ptr + row, mask=r < R, other=0.0)
    b_bound = tl.load(b_bound_ptr + col, mask=there, other=0.0)
    if HAS_BIAS:
        if BY_LATENT:
            b = tl.load(bias_ptr + row, mask=r < R, other=0.0).to(tl.float32)[:, None]
        else:
            b = tl.load(bias_ptr + col, mask=there, other=0.0).to(tl.float32)[None, :]
        if ABSOLUTE:
            u = tl.abs(u + b)
            b = tl.abs(b) * 2.0**-21
        else:
            b += tl.abs(b) * 2.0**-21
    elif ABSOLUTE:
        u = tl.abs(u)
    u += a_bound[:, None] * b_bound[None, :]
    if HAS_BIAS:
        u += b
    u = tl.where(tl.abs(u) < float("inf"), u, float("inf"))  # kept
    if HAS_SCALE:
        # inf · 0 is NaN, which is no key either.
        u *= tl.load(scale_ptr + col, mask=there, other=0.0)[None, :]
    store_keys(keys_ptr, u, there, r, r < R, tile, n_tiles, 3, BM, BN, LOG2_G)


class Keys(NamedTuple):
    """Keys of some rows, and what they were made of."""

    keys: Tensor  # (R, 3, n_buckets)
    which: Tensor  # (R) int32: the tokens, or latents, that are the rows
    by_latent: bool
    bias: Tensor | None
    scale: Tensor | None
    a_bound: Tensor
    b_bound: Tensor
    buckets: Buckets


def keys_of(
    of: Operands,
    k: float,  # how many pairs of a row are looked for
    which: Tensor,  # (R) int32: the rows, some of the tokens or, by_latent, of the latents
    by_latent: bool,
    scale: Tensor | None = None,
    absolute: bool = False,
) -> Keys:
    a, b, a_bound, b_bound = of.seen, of.W, of.x_bound, of.W_bound
    if by_latent:
        a, b, a_bound, b_bound = b, a, b_bound, a_bound
    r, c, d = len(which), len(b), a.shape[1]
    has = of.b is not None, scale is not None
    config = keys_config(r, c, k, of.multiply, d, of.aligned(), by_latent, *has, absolute)
    buckets = Buckets(c, config["BN"], config["LOG2_G"])
    keys = torch.empty(r, 3, buckets.n_buckets, dtype=torch.int32, device=a.device)
    sizes = r, d, c, buckets.n_tiles, a.stride(0), b.stride(0)
    if keys.numel():
        _keys_kernel[(triton.cdiv(r, config["BM"]) * buckets.n_tiles,)](
            *(a, b, of.b, scale, which, a_bound, b_bound, keys), *sizes, **config
        )
    return Keys(keys, which, by_latent, of.b, scale, a_bound, b_bound, buckets)


def keys_of_groups(
    of: Operands,
    order: Tensor,  # (rows) int32: all tokens, or latents
    n_hot: int,
    ks: tuple[float, float],
    by_latent: bool,
    scale: Tensor | None = None,
    absolute: bool = False,
) -> list[Keys]:
    """Of the first `n_hot` rows, of which ks[0] pairs are looked for, and of the others: ks[1]."""
    groups = zip((order[:n_hot], order[n_hot:]), ks, strict=True)
    return [keys_of(of, k, which, by_latent, scale, absolute) for which, k in groups if len(which)]


def keys_config(
    r: int, c: int, k: float, multiply: str, d: int, aligned: bool,
    by_latent: bool, has_bias: bool, has_scale: bool, absolute: bool,
) -> dict[str, Any]:  # fmt: skip
    log2_g = log2_bucket(c, k, MAX_BYTES // (12 * max(r, 1)))
    return {
        "BY_LATENT": by_latent,
        "HAS_BIAS": has_bias,
        "HAS_SCALE": has_scale,
        "ABSOLUTE": absolute,
        "LOG2_G": log2_g,
        **tile_config(multiply, d, aligned, wide=log2_g >= 5 and not has_scale and not absolute),
    }


def variants() -> dict[str, Variant]:
    """What the launcher ships, by name; ragged: no size or stride is a multiple of 16."""
    found = {}
    forms = {  # by latent, bias, scale, absolute
        "": (False, False, False, False),
        "-bias": (False, True, False, False),
        "-scale-absolute": (False, True, True, True),
        "-latents": (True, True, False, False),
    }
    for w, multiply in (("bf16", "bf16"), ("fp32", "tf32"), ("fp32", "ieee")):
        for c, k in ((131072, 64), (131072, 4096), (65536, 4096), (1 << 20, 64), (4096, 512)):
            for form, has in forms.items():
                for d in (768, 4096, 3):
                    config = keys_config(8192, c, k, multiply, d, d != 3, *has) | {"UPCAST": False}
                    few = (c, k) != (131072, 64) and (multiply, d) != ("bf16", 768)
                    if few or (d == 4096 and config["BN"] == 128):
                        continue
                    kind = {768: "", 4096: "-wide", 3: "-ragged"}[d]
                    b, scale = ("*fp32:16" if there else "None" for there in has[1:3])
                    pointers = f"*{w}:16, *{w}:16, {b}, {scale}, *i32:16, *fp32:16, *fp32:16"
                    found[f"{multiply}-{1 << config['LOG2_G']}{form}{kind}"] = Variant(
                        _keys_kernel,
                        f"{pointers}, *i32:16" + (", i32" if d == 3 else ", i32:16") * 6,
                        config,
                    )
    return found


def keys_cost(r: int, c: int, d: int, k: float, itemsize: int) -> tuple[Cost, int]:
    """Of r rows and c columns, both of itemsize; and the bytes of the keys."""
    multiply = "bf16" if itemsize == 2 else "tf32"
    config = keys_config(r, c, k, multiply, d, d % 16 == 0, False, True, False, False)
    size = 12 * r * Buckets(c, config["BN"], config["LOG2_G"]).n_buckets
    return product_cost(r, c, d, itemsize, config, size), size
