"""Keys: of each bucket of a product's columns the three largest upper bounds.

    key[r, bucket] = the bits of u, rounded up to a multiple of G, + (G - 1 - place in the bucket)

u is at least the score of a pair, and a bucket has G columns: kernels/select.py has the idea. A row
is a token and a column a latent; or, BY_LATENT, a row is a latent and a column a token.

Screen   u = (|t + b| + m)·scale, without ABSOLUTE (t + b + m)·scale; where that is at most 0 there
         is no key. kernels/tile.py has t and m.
Columns  Tile j of T holds the columns j, j + T, j + 2T, …, so that neighbours share no bucket.
Shapes   a (R, D), b (C, D); scale (F) fp32; keys (R, 3, buckets) int32.
Order    No atomics. Keys bound what is exact; their own bits are the tensor cores'.
Bytes    Tiles through L2 as kernels/encode.py has them, and 12/G for each pair.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae.kernels.checks import Cost, Variant
from fastsae.kernels.screen import halves, products
from fastsae.kernels.tile import Operands, product_cost, tile_at, tile_config

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
    keys_ptr,  # (out) (R, 3, n_tiles · BN/G) int32
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
    G: tl.constexpr = 1 << LOG2_G
    BUCKETS: tl.constexpr = BN // G
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
        scale = tl.load(scale_ptr + col, mask=there, other=0.0)[None, :]
        u = tl.where(scale > 0, u * scale, 0.0)
    positive = (u > 0) & there[None, :]
    slot = (G - 1 - tl.arange(0, BN) // BUCKETS).to(tl.int32)[None, :]
    m1 = (u.to(tl.int32, bitcast=True) + (G - 1)) & -G
    m1 = tl.where(positive, m1 | slot, 0)

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
    at = keys_ptr + r.to(tl.int64)[:, None] * 3 * n_buckets + bucket[None, :]
    mask = (r < R)[:, None] & (bucket >= 0)[None, :]
    tl.store(at, tl.reshape(m1, [BM, BUCKETS]), mask=mask)
    tl.store(at + n_buckets, tl.reshape(m2, [BM, BUCKETS]), mask=mask)
    tl.store(at + 2 * n_buckets, tl.reshape(m3, [BM, BUCKETS]), mask=mask)


class Keys(NamedTuple):
    """Keys of some rows, and what they were made of."""

    keys: Tensor  # (R, 3, n_buckets)
    which: Tensor  # (R) int32: the tokens, or latents, that are the rows
    by_latent: bool
    bias: Tensor | None
    scale: Tensor | None
    a_bound: Tensor
    b_bound: Tensor
    n_tiles: int
    bn: int
    log2_g: int

    def buckets(self) -> dict[str, int]:
        return {"BUCKETS": self.bn >> self.log2_g, "LOG2_G": self.log2_g}


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
    n_tiles = triton.cdiv(c, config["BN"])
    n_buckets = n_tiles * config["BN"] >> config["LOG2_G"]
    keys = torch.empty(r, 3, n_buckets, dtype=torch.int32, device=a.device)
    sizes = r, d, c, n_tiles, a.stride(0), b.stride(0)
    if keys.numel():
        _keys_kernel[(triton.cdiv(r, config["BM"]) * n_tiles,)](
            *(a, b, of.b, scale, which, a_bound, b_bound, keys), *sizes, **config
        )
    bn, log2_g = config["BN"], config["LOG2_G"]
    return Keys(keys, which, by_latent, of.b, scale, a_bound, b_bound, n_tiles, bn, log2_g)


def keys_config(
    r: int, c: int, k: float, multiply: str, d: int, aligned: bool,
    by_latent: bool, has_bias: bool, has_scale: bool, absolute: bool,
) -> dict[str, Any]:  # fmt: skip
    """Buckets so large that a row has 2k of them or more; above 32 only because of MAX_BYTES."""
    log2_g = 2
    while log2_g < 7 and c >> (log2_g + 1) >= 2 * k:
        if log2_g >= 5 and 12 * r * c >> log2_g <= MAX_BYTES:
            break
        log2_g += 1
    return {
        "BY_LATENT": by_latent,
        "HAS_BIAS": has_bias,
        "HAS_SCALE": has_scale,
        "ABSOLUTE": absolute,
        "LOG2_G": log2_g,
    } | tile_config(
        multiply, d, aligned, may_be_wide=log2_g >= 5 and not has_scale and not absolute
    )


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


def bucket_variants() -> dict[int, dict[str, int]]:
    """By size: the shipped kinds of buckets, for kernels that read keys."""
    sizes = ((256, 5), (128, 7), (128, 2))
    return {1 << log2_g: {"BUCKETS": bn >> log2_g, "LOG2_G": log2_g} for bn, log2_g in sizes}


def keys_cost(r: int, c: int, d: int, k: float, itemsize: int) -> tuple[Cost, int]:
    """Of r rows and c columns, both of itemsize; and the bytes of the keys."""
    multiply = "bf16" if itemsize == 2 else "tf32"
    config = keys_config(r, c, k, multiply, d, d % 16 == 0, False, True, False, False)
    size = 12 * (r * triton.cdiv(c, config["BN"]) * config["BN"] >> config["LOG2_G"])
    return product_cost(r, c, d, itemsize, config, size), size
