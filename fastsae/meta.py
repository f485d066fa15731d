"""Meta-SAEs: sparse autoencoders whose data are the decoder rows of another SAE.

After Leask et al. 2025 (arXiv 2502.04878): what a row is a sparse sum of says what a latent is made
of. ``open_source("decoder:FOLDER")`` gives the rows of a saved SAE; they are data like any other.
"""

from __future__ import annotations

import torch

from fastsae.sae import SAE
from fastsae.sums import unit_rows


@torch.no_grad()
def made_of(meta: SAE, sae: SAE, latent: int) -> list[tuple[int, float]]:
    """The meta-latents that a latent's decoder row is a sum of, with their weights, largest first.

    The weights are activations in the rows' own scale: row ≈ b_dec + Σ weight · W_dec[meta-latent].
    ValueError: no such latent, or a meta-SAE of another width.
    """
    if not 0 <= latent < sae.config.d_sae:
        raise ValueError(f"latent: expected 0 to {sae.config.d_sae - 1}, got {latent}")
    codes = meta.encode(unit_rows(sae.W_dec[latent : latent + 1], "W_dec"), training=False)
    weights = codes.vals.reshape(-1) / meta.input_scale
    pairs = zip(codes.idx.reshape(-1).tolist(), weights.tolist(), strict=True)
    return [(i, weight) for i, weight in pairs if weight != 0]
