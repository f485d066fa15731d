"""Encode where nearly all latents are candidates: torch's product and torch's topk.

    vals, idx[n] = h and id of the k largest score > 0 (kernels/encode.py), h = x W_encᵀ + b_enc

A few tokens at a time, CHUNK_ELEMENTS pre-activations, so that there is no (N, F) matrix. Exact for
the sums that torch.matmul gives, in the order (score descending, latent ascending). No host
synchronisation. A token with a pre-activation, or product with the guide, that is not finite has
NaN as its first value.
"""

import torch
from torch import Tensor

from fastsae.kernels.score import PLAIN, Score

CHUNK_ELEMENTS = 1 << 26


def encode_dense(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    k: int,
    latents: Tensor | None,
    score: Score = PLAIN,
) -> tuple[Tensor, Tensor]:
    """vals (N, k) fp32 and idx (N, k) int32, for tensors that kernels/encode.py has checked."""
    chosen = slice(None) if latents is None else latents.long()
    W, b = W_enc[chosen].float(), None if b_enc is None else b_enc[chosen].float()
    W_dec = None if score.W_dec is None else score.W_dec[chosen].float()
    vals = torch.zeros(len(x), k, dtype=torch.float32, device=x.device)
    idx = torch.full_like(vals, -1, dtype=torch.int32)
    kept = min(k, len(W))
    step = max(1, CHUNK_ELEMENTS // max(1, len(W)))
    for n in range(0, len(x) if kept else 0, step):
        h = _product(x[n : n + step], W)
        h = h if b is None else h + b
        scores, finite = h.abs() if score.absolute else h, h.isfinite().all(1)
        if score.scale is not None:
            scores = scores * score.scale[chosen]
        if score.guide is not None and W_dec is not None:
            along = _product(score.guide[n : n + step], W_dec).abs()
            scores, finite = scores * (1 + along), finite & along.isfinite().all(1)
        # One integer for the order (score descending, latent ascending): equal scores have no
        # order of their own in topk.
        order = scores.clamp(min=0).view(torch.int32).long() << 32
        order += 0xFFFFFFFF - torch.arange(len(W), device=x.device)
        top = order.topk(kept, dim=1).values
        positive, place = top >> 32 > 0, 0xFFFFFFFF - (top & 0xFFFFFFFF)
        best = h.gather(1, place).where(positive, 0)
        ids = place if latents is None else latents[place]
        vals[n : n + step, :kept] = best
        idx[n : n + step, :kept] = ids.to(torch.int32).where(positive, -1)
        vals[n : n + step, 0] = best[:, 0].where(finite, torch.nan)
        idx[n : n + step, 0] = idx[n : n + step, 0].where(finite, 0)
    return vals, idx


def _product(a: Tensor, b: Tensor) -> Tensor:
    with torch.autocast(a.device.type, enabled=False):  # it would round the product to 16 bits
        return a.float() @ b.T
