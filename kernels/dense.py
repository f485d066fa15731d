"""Encode where nearly all latents are candidates: torch's product and torch's topk.

    vals, idx[n] = the k largest (x W_encᵀ + b_enc)[n] > 0

A few tokens at a time, CHUNK_ELEMENTS pre-activations, so that there is no (N, F) matrix. Exact for
the sums that torch.matmul gives, in the order (value descending, latent ascending). No host
synchronisation. A token with a pre-activation that is not finite has NaN as its first value.
"""

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 26


def encode_dense(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int, latents: Tensor | None
) -> tuple[Tensor, Tensor]:
    """vals (N, k) fp32 and idx (N, k) int32, for tensors that kernels/encode.py has checked."""
    chosen = slice(None) if latents is None else latents.long()
    W, b = W_enc[chosen].float(), None if b_enc is None else b_enc[chosen].float()
    vals = torch.zeros(len(x), k, dtype=torch.float32, device=x.device)
    idx = torch.full_like(vals, -1, dtype=torch.int32)
    kept = min(k, len(W))
    step = max(1, CHUNK_ELEMENTS // max(1, len(W)))
    for n in range(0, len(x) if kept else 0, step):
        with torch.autocast(x.device.type, enabled=False):  # it would round the product to 16 bits
            h = x[n : n + step].float() @ W.T
        h = h if b is None else h + b
        # One integer for the order (value descending, latent ascending): equal values have no
        # order of their own in topk.
        order = h.clamp(min=0).view(torch.int32).long() << 32
        order += 0xFFFFFFFF - torch.arange(len(W), device=x.device)
        top = order.topk(kept, dim=1).values
        best = (top >> 32).to(torch.int32).view(torch.float32)
        place = 0xFFFFFFFF - (top & 0xFFFFFFFF)
        ids = place if latents is None else latents[place]
        finite = h.isfinite().all(1)
        vals[n : n + step, :kept] = best
        idx[n : n + step, :kept] = ids.to(torch.int32).where(best > 0, -1)
        vals[n : n + step, 0] = best[:, 0].where(finite, torch.nan)
        idx[n : n + step, 0] = idx[n : n + step, 0].where(finite, 0)
    return vals, idx
