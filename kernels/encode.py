"""Encode: the k largest positive pre-activations of each token, without an (N, F) matrix.

    h[n, i] = Σ_d x[n, d] · W_enc[i, d] + b_enc[i]         vals, idx[n] = the k largest h[n, i] > 0

Shapes   x (N, D), W_enc (F, D), b_enc (F); latents (F'), the ids to choose from; vals, idx (N, k).
Dtypes   x and W_enc fp32, bf16 or fp16; b_enc any float; vals fp32, idx int32.
Strides  x and W_enc: any row stride, unit inner stride.

Screen   A tile of tensor-core products t, in bf16 where W_enc is bf16 and in tf32 (ieee fp32 with
         precision="fp32") otherwise, stays in registers. It differs from the value that is emitted
         by at most m = margin[n]·norm[i] + 4·2⁻²⁴·|b[i]|, and u = t + b + m bounds that from above.
         The latents of a tile fall into buckets of G; a tile writes the three largest u of each
         bucket and token, whose lowest log2(G) bits give way to the place in the bucket (u is
         first raised by as much): 12/G bytes for each pre-activation.
Select   kernels/select.py finds the exact k largest from these; what it may not decide it computes.
         At the end of all is the fixed-order dot product of csrc/simd.h, so results have the same
         bits as the CPU's, and depend on neither N, grid, tile, target nor screen.
Latents  Tile j of T holds the latents j, j + T, j + 2T, …, so that neighbours, which fire alike
         where a dictionary is sorted, are spread over all buckets.
Margin   Products of two bf16 or tf32 numbers are exact; a sum of D is taken to err by less than
         (5D/8 + 64)·2⁻²³·‖x‖‖w‖: half a unit for each product where they are added one by one;
         tensor cores add 4 to 16 at once and truncate, with a bit or more to spare (Fasi, Higham,
         Mikaitis, Pranesh 2021). Rounding x to bf16 adds ‖x - x̃‖·‖w‖,
         cutting both to tf32 2⁻⁹·‖x‖‖w‖.
Odd      Where k > 1024 or F < 8k nearly every bucket would overflow: kernels/dense.py.
Not finite  A token with a non-finite pre-activation (or input) has NaN as its first value, so that
         its loss is NaN: an exception would have to wait for the device.

Bytes    x, W_enc once (they pass through L2 in groups of tiles), the buckets twice: `encode_cost`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae.kernels.checks import FLOATS, Cost, Variant, expect, has_tf32
from fastsae.kernels.dense import encode_dense
from fastsae.kernels.norms import norms
from fastsae.kernels.score import MAX_K, best
from fastsae.kernels.select import candidates


@triton.jit
def _halves(m, BM: tl.constexpr, HALF: tl.constexpr, BUCKETS: tl.constexpr):
    """The first and the second half of each bucket of m (BM, 2·HALF, BUCKETS)."""
    return tl.split(tl.permute(tl.reshape(m, [BM, 2, HALF, BUCKETS]), [0, 2, 3, 1]))


@triton.jit
def _screen_kernel(
    x_ptr,  # (N, D) what the screen multiplies
    W_ptr,  # (F, D) likewise
    bias_ptr,  # (F) any float, or None
    latents_ptr,  # (n_latents) int32, or None for all
    margin_ptr,  # (N) fp32
    norm_ptr,  # (n_latents) fp32
    keys_ptr,  # (out) (N, 3, n_tiles · BN/G) int32
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
):
    G: tl.constexpr = 1 << LOG2_G
    BUCKETS: tl.constexpr = BN // G
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
    d = tl.arange(0, BK)
    x_ptrs = x_ptr + n.to(tl.int64)[:, None] * stride_x + d[None, :]
    W_ptrs = W_ptr + latent.to(tl.int64)[:, None] * stride_W + d[None, :]
    acc = tl.zeros([BM, BN], tl.float32)
    for d0 in range(0, D, BK):
        in_row = d[None, :] < D - d0
        x = tl.load(x_ptrs + d0, mask=in_row & (n < N)[:, None], other=0.0)
        W = tl.load(W_ptrs + d0, mask=in_row & there[:, None], other=0.0)
        if MULTIPLY != "bf16" or UPCAST:
            x, W = x.to(tl.float32), W.to(tl.float32)
        acc = tl.dot(x, tl.trans(W), acc, input_precision="tf32" if MULTIPLY == "tf32" else "ieee")

    norm = tl.load(norm_ptr + place, mask=there, other=0.0)
    margin = tl.load(margin_ptr + n, mask=n < N, other=0.0)
    u = acc + margin[:, None] * norm[None, :]
    if HAS_BIAS:
        b = tl.load(bias_ptr + latent, mask=there, other=0.0).to(tl.float32)
        u += (b + tl.abs(b) * 2.0**-21)[None, :]
    u = tl.where(tl.abs(u) < float("inf"), u * (1 + G * 2.0**-22), float("inf"))  # kept
    u = tl.where((u > 0) & there[None, :], u, 0.0)
    slot = (G - 1 - tl.arange(0, BN) // BUCKETS).to(tl.int32)  # of equals the lower latent first
    m1 = (u.to(tl.int32, bitcast=True) & -G) | tl.where(u > 0, slot[None, :], 0)

    # The three largest of each bucket, by merging sorted triples.
    m1 = tl.reshape(m1, [BM, G, BUCKETS])
    a, b = _halves(m1, BM, G // 2, BUCKETS)
    m1, m2, m3 = tl.maximum(a, b), tl.minimum(a, b), tl.zeros_like(a)
    for level in tl.static_range(2, LOG2_G + 1):
        a1, b1 = _halves(m1, BM, G >> level, BUCKETS)
        a2, b2 = _halves(m2, BM, G >> level, BUCKETS)
        a3, b3 = _halves(m3, BM, G >> level, BUCKETS)
        low, high = tl.minimum(a1, b1), tl.maximum(a2, b2)
        m1, m2 = tl.maximum(a1, b1), tl.maximum(low, high)
        rest = tl.maximum(tl.maximum(a3, b3), tl.minimum(a2, b2))
        m3 = tl.maximum(tl.minimum(low, high), rest)

    n_buckets = n_tiles * BUCKETS
    bucket = tile * BUCKETS + tl.arange(0, BUCKETS)
    at = keys_ptr + n.to(tl.int64)[:, None] * 3 * n_buckets + bucket[None, :]
    mask = (n < N)[:, None] & (bucket >= 0)[None, :]
    tl.store(at, tl.reshape(m1, [BM, BUCKETS]), mask=mask)
    tl.store(at + n_buckets, tl.reshape(m2, [BM, BUCKETS]), mask=mask)
    tl.store(at + 2 * n_buckets, tl.reshape(m3, [BM, BUCKETS]), mask=mask)


def encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    k: int,
    latents: Tensor | None = None,
    precision: str = "screened",
) -> tuple[Tensor, Tensor]:
    """:func:`fastsae.reference.encode`, but for what it does about numbers that are not finite."""
    expect("W_enc", W_enc, ("F", "D"), FLOATS, W_enc)
    expect("x", x, ("N", W_enc.shape[1]), FLOATS, W_enc, any_stride=True)
    if b_enc is not None:
        expect("b_enc", b_enc, (len(W_enc),), FLOATS, W_enc)
    if latents is not None:
        expect("latents", latents, ("F",), (torch.int32,), W_enc)
    if precision == "bf16":
        x, W_enc = x.bfloat16(), W_enc.bfloat16()
    x = x if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous()
    n_latents = len(W_enc) if latents is None else len(latents)
    if not 0 < k <= min(MAX_K, n_latents // 8) or not x.numel():
        return encode_dense(x, W_enc, b_enc, k, latents)
    with torch.cuda.device_of(x):
        multiply = "bf16" if W_enc.dtype == torch.bfloat16 else "tf32"
        if multiply == "tf32" and (precision == "fp32" or not has_tf32(x)):
            multiply = "ieee"
        d = x.shape[1]
        norm, _ = norms(W_enc, latents)
        screened = x.bfloat16() if multiply == "bf16" and x.dtype != torch.bfloat16 else None
        x_norm, lost = norms(x, None, screened)
        slope = (5 * d / 8 + 64 + d / 64 + 8) * 2.0**-23 + (2.0**-9 if multiply == "tf32" else 0)
        margin = (x_norm * slope + (0 if lost is None else lost)) * (1 + 2.0**-10)

        seen = x if screened is None else screened
        strides = seen.stride(0), W_enc.stride(0)
        aligned = all(size % 16 == 0 for size in (d, *strides))
        has = b_enc is not None, latents is not None
        config = screen_config(n_latents, k, multiply, *has, d, aligned)
        n_tiles = triton.cdiv(n_latents, config["BN"])
        n_buckets = n_tiles * config["BN"] >> config["LOG2_G"]
        keys = torch.empty(len(x), 3, n_buckets, dtype=torch.int32, device=x.device)
        grid = (triton.cdiv(len(x), config["BM"]) * n_tiles,)
        sizes = len(x), d, n_latents, n_tiles, *strides
        _screen_kernel[grid](seen, W_enc, b_enc, latents, margin, norm, keys, *sizes, **config)
        places, counts = candidates(keys, margin, norm, b_enc, latents, k, n_tiles, config)
        return best(x, W_enc, b_enc, latents, places, counts, k, n_latents)


WIDE_FROM = 1024  # elements of a row
MAX_BUCKETS = 8192  # of a token, beyond which buckets grow


def screen_config(
    f: int, k: int, multiply: str, has_bias: bool, has_latents: bool, d: int, aligned: bool
) -> dict[str, Any]:
    """Buckets so large that a token has 2k of them or more, and MAX_BUCKETS at most.

    Two small tiles share an SM, so that the end of one hides behind the other's products. Where
    rows are long there is little to hide, and a wide tile, for which an MI300 has too little shared
    memory, reads a third less from L2.
    """
    log2_g = 2
    while log2_g < 5 and f >> (log2_g + 1) >= 2 * k:
        log2_g += 1
    while log2_g < 7 and f >> log2_g > MAX_BUCKETS:
        log2_g += 1
    # Gathered or unaligned rows need registers for addresses, sums of products of fp32 for factors.
    plain = aligned and not has_latents and multiply != "ieee"
    wide = plain and d >= WIDE_FROM and log2_g >= 5 and torch.version.hip is None
    return {
        "HAS_BIAS": has_bias,
        "HAS_LATENTS": has_latents,
        "MULTIPLY": multiply,
        "UPCAST": triton.knobs.runtime.interpret,
        "BM": 128 if plain else 64,
        "BN": 256 if wide else 128,
        "BK": (64 if multiply == "bf16" else 32) >> (not aligned),
        "LOG2_G": log2_g,
        "GROUP": 8,
        "num_warps": 8,
        "num_stages": 3,
    }


def variants() -> dict[str, Variant]:
    """What the launcher ships, by name; ragged: no size or stride is a multiple of 16."""
    found = {}
    for w, multiply in (("bf16", "bf16"), ("fp32", "tf32"), ("fp32", "ieee")):
        for f, k in ((131072, 64), (1 << 20, 64), (4096, 512)):
            for bias, latents in ((False, False), (True, False), (True, True)):
                for kind, d, i32 in (
                    ("", 768, "i32:16"),
                    ("-wide", 4096, "i32:16"),
                    ("-ragged", 3, "i32"),
                ):
                    config = screen_config(f, k, multiply, bias, latents, d, kind != "-ragged")
                    if kind == "-wide" and config["BN"] == 128:
                        continue
                    b, ids = "*fp32:16" if bias else "None", "*i32:16" if latents else "None"
                    pointers = f"*{w}:16, *{w}:16, {b}, {ids}, *fp32:16, *fp32:16, *i32:16"
                    name = f"{multiply}-{1 << config['LOG2_G']}" + "-bias" * bias
                    found[name + "-latents" * latents + kind] = Variant(
                        _screen_kernel, pointers + f", {i32}" * 6, config | {"UPCAST": False}
                    )
    return found


def encode_cost(n: int, d: int, f: int, k: int, itemsize: int, scored: float) -> dict[str, Cost]:
    """By stage: x (n, d) fp32, f latents of itemsize, `scored` candidates a token on average."""
    config = screen_config(f, k, "bf16" if itemsize == 2 else "tf32", True, False, d, d % 16 == 0)
    f_tiles, n_tiles = triton.cdiv(f, config["BN"]), triton.cdiv(n, config["BM"])
    buckets, pairs = n * f_tiles * config["BN"] >> config["LOG2_G"], round(n * scored)
    tiles = n_tiles * f_tiles * (config["BM"] + config["BN"]) * d * itemsize
    once = (triton.cdiv(n_tiles, config["GROUP"]) * f + n) * d * itemsize
    rows = f * d * itemsize + n * d * (4 if itemsize == 4 else 6)
    keys, rest = 12 * buckets, 12 * pairs + 4 * n * d + 8 * n * k
    return {
        "norms": Cost(3 * (n + f) * d, rows, rows),
        "screen": Cost(2 * n * f * d, tiles + keys, once + keys),
        "select": Cost(44 * buckets, keys + 4 * pairs, keys + 4 * pairs),
        "score": Cost(2 * pairs * d, *[pairs * d * itemsize + rest] * 2),
    }
