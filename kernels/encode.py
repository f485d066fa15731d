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
         tf32. t + b differs from the value that is emitted by a margin at most (below), and so do
         the products with the guide. What is written are the three largest upper bounds of each
         bucket of latents (kernels/buckets.py).
Select   kernels/select.py finds the exact k best from these; what it may not decide it computes.
         At the end of all is the fixed-order dot product of csrc/simd.h, so results have the same
         bits as the CPU's, and depend on neither N, grid, tile, target nor screen.
Margin   m = x_bound[n]·W_bound[i] + 2⁻²¹·|b[i]|, of a product with the guide without the last part.
         Products of two bf16 or tf32 numbers are exact; a sum of D is taken to err by less than
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

import torch
from torch import Tensor

from fastsae.kernels.best import MAX_K, best
from fastsae.kernels.buckets import Buckets
from fastsae.kernels.checks import FLOATS, Cost, expect
from fastsae.kernels.dense import encode_dense
from fastsae.kernels.operands import (
    check_inputs,
    multiplied_in,
    norms_cost,
    rounded_inputs,
    screened,
    unit_stride,
)
from fastsae.kernels.score import Score
from fastsae.kernels.screen import screen, screen_config
from fastsae.kernels.select import candidates
from fastsae.kernels.tile import product_cost


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
    check_inputs(x, W_enc, b_enc, precision)
    if latents is not None:
        expect("latents", latents, ("F",), (torch.int32,), W_enc)
    if scale is not None:
        expect("scale", scale, (len(W_enc),), (torch.float32,), W_enc)
    if guide is not None:
        if W_dec is None:
            raise ValueError("W_dec: expected a tensor with guide, got None")
        expect("W_dec", W_dec, (len(W_enc), "D_out"), FLOATS, W_enc)
        expect("guide", guide, (len(x), W_dec.shape[1]), (torch.float32,), W_enc, any_stride=True)
        guide = unit_stride(guide)
    x, W_enc = rounded_inputs(x, W_enc, precision)
    score = Score(scale, absolute, guide, None if guide is None else W_dec)
    n_latents = len(W_enc) if latents is None else len(latents)
    odd = not 0 < k <= min(MAX_K, n_latents // 8) or not x.numel()
    if odd or (guide is not None and not guide.numel()):
        return encode_dense(x, W_enc, b_enc, k, latents, score)
    with torch.cuda.device_of(x):
        multiply = multiplied_in(x, precision, W_enc, score.W_dec)
        seen, x_bound, W_bound = screened(x, W_enc, latents, multiply)
        asked, guide_bounds = score, None
        if guide is not None and W_dec is not None:
            guided, guide_bound, W_dec_bound = screened(guide, W_dec, latents, multiply)
            asked, guide_bounds = score._replace(guide=guided), (guide_bound, W_dec_bound)
            # A token whose guide is not finite is told apart here, or all its latents would count.
            x_bound = guide_bound.where(guide_bound.isnan(), x_bound)
        keys, of = screen(
            seen, W_enc, b_enc, latents, (x_bound, W_bound), k, multiply, asked, guide_bounds
        )
        places, counts = candidates(keys, x_bound, W_bound, b_enc, latents, k, of)
        return best(x, W_enc, b_enc, latents, places, counts, k, n_latents, score)


def encode_cost(n: int, d: int, f: int, k: int, itemsize: int, scored: float) -> dict[str, Cost]:
    """By stage: x (n, d) fp32, f latents of itemsize, `scored` candidates a token on average."""
    config = screen_config(f, k, "bf16" if itemsize == 2 else "tf32", True, False, d, d % 16 == 0)
    buckets, pairs = n * Buckets(f, config["BN"], config["LOG2_G"]).n_buckets, round(n * scored)
    keys, rest = 12 * buckets, 12 * pairs + 4 * n * d + 8 * n * k
    return {
        "norms": norms_cost(n, d, f, itemsize),
        "screen": product_cost(n, f, d, itemsize, config, keys),
        "select": Cost(44 * buckets, keys + 4 * pairs, keys + 4 * pairs),
        "score": Cost(2 * pairs * d, *[pairs * d * itemsize + rest] * 2),
    }
