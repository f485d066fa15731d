"""What a larger SAE has that a smaller one of the same activations has not.

    x̂ = (W_dec z + W_dec' z' + b) / s,  z of some latents of the small SAE, z' of some of the large

After Leask et al. 2025 ("SAE stitching", arXiv 2502.04878): a latent of the large SAE whose decoder
row has a cosine of at most a threshold with every row of the small one is *novel*, and adding it
should lower the error; the others are *reconstruction* latents, which say again what latents of
the small SAE say, and should lower it only in their place. Each SAE makes its own codes. Ours: the
threshold of 0.7, and that b goes from the small SAE's bias to the large one's with the share of the
large one's latents that are in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastsae import metrics, ops
from fastsae.codes import Codes
from fastsae.data import Source, in_order
from fastsae.sae import SAE
from fastsae.sums import unit_rows

NOVEL_BELOW = 0.7


@dataclass(frozen=True, eq=False)
class Relation:
    """Latents of a large SAE beside those of a small one."""

    cosines: Tensor
    """(F_large) float32: of each decoder row with the nearest of the small SAE, at least 0."""
    nearest: Tensor
    """(F_large) int32: that row; -1 where no cosine is positive."""
    replaced: Tensor
    """(F_small) bool: some row of the large SAE is closer to it than the threshold."""
    threshold: float

    @property
    def novel(self) -> Tensor:
        """(F_large) bool: at most the threshold from every row of the small SAE."""
        return self.cosines <= self.threshold


def relate(small: SAE, large: SAE, threshold: float = NOVEL_BELOW) -> Relation:
    """Compares decoder rows; no F×F matrix. ValueError: transcoders, other widths or thresholds."""
    for name, sae in (("small", small), ("large", large)):
        if sae.config.is_transcoder:
            raise ValueError(f"{name}: expected an autoencoder, got a transcoder")
    if small.config.d_in != large.config.d_in:
        raise ValueError(f"large: expected width {small.config.d_in}, got {large.config.d_in}")
    if not 0 < threshold < 1:
        raise ValueError(f"threshold: expected a number in (0, 1), got {threshold}")
    rows, others = unit_rows(large.W_dec, "large"), unit_rows(small.W_dec, "small")
    cosines, nearest = ops.encode(rows, others, k=1)
    back, _ = ops.encode(others, rows, k=1)
    return Relation(cosines[:, 0], nearest[:, 0], back[:, 0] > threshold, threshold)


@torch.no_grad()
def stitch(small: SAE, large: SAE, x: Tensor, of_small: Tensor, of_large: Tensor) -> Tensor:
    """The reconstruction of x (n, D) by chosen latents, bool (F_small) and (F_large): (n, D)."""
    share = float(of_large.float().mean())
    parts = [(small, of_small, 1 - share), (large, of_large, share)]
    out = torch.zeros_like(x, dtype=torch.float32)
    for sae, chosen, weight in parts:
        out += _contribution(sae, sae.encode(x, training=False), chosen)
        out += weight * sae.b_dec.float() / sae.input_scale
    return out


def _contribution(sae: SAE, codes: Codes, chosen: Tensor) -> Tensor:
    kept = codes.only(chosen[codes.idx.clamp(min=0).long()] & (codes.idx >= 0))
    out = ops.decode(kept.vals, kept.idx, sae.W_dec, None, row_ptr=kept.row_ptr)
    return out.float() / sae.input_scale


@torch.no_grad()
def added_error(small: SAE, large: SAE, source: Source, batch_size: int = 4096) -> Tensor:
    """What adding one latent of the large SAE to the small one does to its error: (F_large).

    Σ_n ‖e_n − z_ni w_i‖² − ‖e_n‖² over the rows, e the small SAE's error and w_i = W_dec[i] / s, as
    a share of Σ_n ‖x_n − x̄‖²: the change of FVU. float64; 0 where a latent is never active.
    """
    change = torch.zeros(large.config.d_sae, dtype=torch.float64)
    square = large.W_dec.double().square().sum(1).cpu()
    total = metrics.FVU()
    for batch in in_order(source, batch_size):
        x = batch.x.to(small.W_dec.device)
        total.update(x, x)
        error = x - small.decode(small.encode(x, training=False)).float()
        codes = large.encode(x, training=False)
        dots = ops.pair_dots(error, codes.idx, large.W_dec, codes.row_ptr)
        active = (codes.idx >= 0).reshape(-1)
        z = (codes.vals.reshape(-1)[active].double() / large.input_scale).cpu()
        latents = codes.idx.reshape(-1)[active].long().cpu()
        along = dots.reshape(-1)[active].double().cpu()
        change.index_add_(0, latents, z * (z * square[latents] - 2 * along))
    return change / total.variance


@dataclass(frozen=True)
class StitchingFigures:
    """What `stitching_figures` measures; every fvu is on the same rows."""

    novel: int
    """Latents of the large SAE that are novel; the others are reconstruction latents."""
    replaced: int
    """Latents of the small SAE that these replace."""
    novel_helping: float | None
    """The share of the novel latents that are active whose adding alone lowers the error; None:
    there are none."""
    reconstruction_helping: float | None
    """The same of reconstruction latents."""
    fvu_small: float
    fvu_novel_added: float
    """The small SAE with all novel latents added."""
    fvu_reconstruction_added: float
    """The small SAE with all reconstruction latents added, none replaced."""
    fvu_reconstruction_swapped: float
    """The small SAE with reconstruction latents in the place of those they replace."""
    fvu_large: float


@torch.no_grad()
def stitching_figures(
    small: SAE,
    large: SAE,
    source: Source,
    threshold: float = NOVEL_BELOW,
    batch_size: int = 4096,
) -> StitchingFigures:
    """Both kinds of latents on rows of activations, as at inference. ValueError: as `relate`."""
    found = relate(small, large, threshold)
    novel, replaced = found.novel, found.replaced
    all_small, all_large = torch.ones_like(replaced), torch.ones_like(novel)
    mixtures = {
        "small": (all_small, ~all_large),
        "novel_added": (all_small, novel),
        "reconstruction_added": (all_small, ~novel),
        "reconstruction_swapped": (~replaced, ~novel),
        "large": (~all_small, all_large),
    }
    totals = {name: metrics.FVU() for name in mixtures}
    for batch in in_order(source, batch_size):
        x = batch.x.to(small.W_dec.device)
        for name, (of_small, of_large) in mixtures.items():
            totals[name].update(x, stitch(small, large, x, of_small, of_large))
    change = added_error(small, large, source, batch_size)

    def helping(kind: Tensor) -> float | None:
        some = change[kind.cpu() & (change != 0)]
        return float((some < 0).double().mean()) if len(some) else None

    return StitchingFigures(
        int(novel.sum()),
        int(replaced.sum()),
        helping(novel),
        helping(~novel),
        **{f"fvu_{name}": total.value for name, total in totals.items()},
    )
