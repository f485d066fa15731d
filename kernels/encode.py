"""Encode: the k best pre-activations of each token, without an (N, F) matrix.

    h[n, i] = Σ_d x[n, d] · W_enc[i, d] + b_enc[i]
    score[n, i] = h or |h|  ·  scale[i]  ·  (1 + |Σ_d guide[n, d] · W_dec[i, d]|)
    vals, idx[n] = the h and i of the k largest score[n, i] > 0

Shapes   x (N, D), W_enc (F, D), b_enc (F); latents (F'), the ids to choose from; scale (F), guide
         (N, D_out), W_dec (F, D_out), factors of 1 where there is none; vals, idx (N, k).
Dtypes   x, W_enc, W_dec fp32, bf16 or fp16; b_enc any float; scale, guide, vals fp32; idx int32.
Strides  x, W_enc, guide and W_dec: any row stride, unit inner stride.

Screen   kernels/screen.py: a tile of tensor-core products t, in bf16 where the weights are bf16 and
         in tf32 (ieee fp32 with precision="fp32") otherwise, stays in registers. fp16 is exact in
         tf32. t + b differs from the value that is emitted by at most
         m = margin[n]·norm[i] + 4·2⁻²⁴·|b[i]|. The products with the guide have such a margin too.
         What is written are the three largest upper bounds of each bucket of latents.
Select   kernels/select.py finds the exact k best from these; what it may not decide it computes.
         At the end of all is the fixed-order dot product of csrc/simd.h, so results have the same
         bits as the CPU's, and depend on neither N, grid, tile, target nor screen.
Margin   Products of two bf16 or tf32 numbers are exact; a sum of D is taken to err by less than
         (5D/8 + 64)·2⁻²³·‖x‖‖w‖: half a unit for each product where they are added one by one;
         tensor cores add 4 to 16 at once and truncate, with a bit or more to spare (Fasi, Higham,
         Mikaitis, Pranesh 2021). Rounding x to bf16 adds ‖x - x̃‖·‖w‖, cutting both to tf32
         2⁻⁹·‖x‖‖w‖.
AuxK     scale = 1 for dead latents and 0 for the others needs no list of them, so no host waits.
         It costs a product with all latents: with k = 512 of a tenth of 131072 latents (N = 8192,
         D = 4096, bf16, an H100) 29 ms are predicted, 19 with `latents`, 17 of both for scores.
Odd      Where k > 1024 or F < 8k nearly every bucket would overflow: kernels/dense.py.
Not finite  A token with a pre-activation, product with the guide or input that is not finite has
         NaN as its first value, so that its loss is NaN: an exception would have to wait for the
         device. scale must be finite and at least 0; a latent of scale 0 is never selected.

Bytes    x, W_enc once (they pass through L2 in groups of tiles), the buckets twice: `encode_cost`.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from fastsae.kernels.best import MAX_K, best
from fastsae.kernels.checks import FLOATS, Cost, expect, has_tf32
from fastsae.kernels.dense import encode_dense
from fastsae.kernels.norms import norms
from fastsae.kernels.score import Score
from fastsae.kernels.screen import _screen_kernel, screen_config
from fastsae.kernels.select import candidates


def encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    k: int,
    latents: Tensor | None = None,
    precision: str = "screened",
    *,
    scale: Tensor | None = None,
    absolute: bool = False,
    guide: Tensor | None = None,
    W_dec: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`fastsae.reference.encode`, but for what it does about numbers that are not finite."""
    expect("W_enc", W_enc, ("F", "D"), FLOATS, W_enc)
    expect("x", x, ("N", W_enc.shape[1]), FLOATS, W_enc, any_stride=True)
    if b_enc is not None:
        expect("b_enc", b_enc, (len(W_enc),), FLOATS, W_enc)
    if latents is not None:
        expect("latents", latents, ("F",), (torch.int32,), W_enc)
    if scale is not None:
        expect("scale", scale, (len(W_enc),), (torch.float32,), W_enc)
    if guide is not None:
        if W_dec is None:
            raise ValueError("W_dec: expected a tensor with guide, got None")
        expect("W_dec", W_dec, (len(W_enc), "D_out"), FLOATS, W_enc)
        expect("guide", guide, (len(x), W_dec.shape[1]), (torch.float32,), W_enc, any_stride=True)
        guide = _unit_stride(guide)
    if precision == "bf16":
        x, W_enc = x.bfloat16(), W_enc.bfloat16()
    x = _unit_stride(x)
    score = Score(scale, absolute, guide, None if guide is None else W_dec)
    n_latents = len(W_enc) if latents is None else len(latents)
    odd = not 0 < k <= min(MAX_K, n_latents // 8) or not x.numel()
    if odd or (guide is not None and not guide.numel()):
        return encode_dense(x, W_enc, b_enc, k, latents, score)
    with torch.cuda.device_of(x):
        weights = {t.dtype for t in (W_enc, score.W_dec) if t is not None}
        multiply = "bf16" if weights == {torch.bfloat16} else "tf32"
        if multiply == "tf32" and (precision == "fp32" or not has_tf32(x)):
            multiply = "ieee"
        seen, margin, norm = _screened(x, W_enc, latents, multiply)
        strides = seen.stride(0), W_enc.stride(0)
        guide_sizes: tuple[int, ...] = ()
        extra: dict[str, Any] = {"scale_ptr": scale}
        if guide is not None and W_dec is not None:
            guided, guide_margin, guide_norm = _screened(guide, W_dec, latents, multiply)
            guide_sizes = guided.shape[1], guided.stride(0), W_dec.stride(0)
            extra |= {"guide_ptr": guided, "W_dec_ptr": W_dec}
            extra |= {"guide_margin_ptr": guide_margin, "guide_norm_ptr": guide_norm}
            extra |= dict(zip(("D_out", "stride_guide", "stride_W_dec"), guide_sizes, strict=True))
            # A token whose guide is not finite is told apart here, or all its latents would count.
            margin = guide_margin.where(guide_margin.isnan(), margin)
        d = x.shape[1]
        aligned = all(size % 16 == 0 for size in (d, *strides, *guide_sizes))
        has = b_enc is not None, latents is not None
        config = screen_config(n_latents, k, multiply, *has, d, aligned, score.constexprs)
        n_tiles = triton.cdiv(n_latents, config["BN"])
        n_buckets = n_tiles * config["BN"] >> config["LOG2_G"]
        shape = len(x), 4 if score.changes else 3, n_buckets
        keys = torch.empty(shape, dtype=torch.int32, device=x.device)
        _screen_kernel[(triton.cdiv(len(x), config["BM"]) * n_tiles,)](
            *(seen, W_enc, b_enc, latents, margin, norm, keys, len(x), d, n_latents, n_tiles),
            *strides,
            **config,
            **extra,
        )
        places, counts = candidates(keys, margin, norm, b_enc, latents, k, n_tiles, config)
        return best(x, W_enc, b_enc, latents, places, counts, k, n_latents, score)


def _unit_stride(t: Tensor) -> Tensor:
    return t if t.shape[1] <= 1 or t.stride(1) == 1 else t.contiguous()


def _screened(
    rows: Tensor, W: Tensor, latents: Tensor | None, multiply: str
) -> tuple[Tensor, Tensor, Tensor]:
    """rows as the screen multiplies them, and margin and norm, which bound what it errs."""
    d = rows.shape[1]
    norm, _ = norms(W, latents)
    rounded = rows.bfloat16() if multiply == "bf16" and rows.dtype != torch.bfloat16 else None
    rows_norm, lost = norms(rows, None, rounded)
    slope = (5 * d / 8 + 64 + d / 64 + 8) * 2.0**-23 + (2.0**-9 if multiply == "tf32" else 0)
    margin = (rows_norm * slope + (0 if lost is None else lost)) * (1 + 2.0**-10)
    return rows if rounded is None else rounded, margin, norm


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
