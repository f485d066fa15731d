"""How near replaced activations are to the original ones, and what next-token prediction loses.

All sums are float64; a figure that is not defined is None.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastsae import metrics

Figures = dict[str, float | None]


class Reconstruction:
    """Figures of reconstructions x̂ of tokens x, over all rows that were given.

    l2_norm_in, l2_norm_out, l2_ratio, cossim and l0 are means over rows, of ‖x‖, ‖x̂‖, ‖x̂‖/‖x‖, the
    cosine of x and x̂, and the number of active latents. relative_reconstruction_bias is
    γ = E‖x̂‖²/E[x·x̂], below 1 where x̂ shrinks (Rajamanoharan et al. 2024, equation 10). fvu and
    explained_variance = 1 − fvu are those of `fastsae.metrics`; frac_variance_explained =
    1 − Σ var(x − x̂)/Σ var(x) is dictionary_learning's, which forgives a constant error.
    """

    def __init__(self) -> None:
        self._n = 0
        self._fvu, self._errors = metrics.FVU(), metrics.FVU()
        self._sums = dict.fromkeys(("l2_norm_in", "l2_norm_out", "l2_ratio", "cossim", "l0"), 0.0)
        self._square = self._dot = 0.0

    def update(self, x: Tensor, x_hat: Tensor, l0: float) -> None:
        """Rows x and x̂ [n, D], and the mean number of latents that are active in them."""
        x, x_hat = x.double(), x_hat.double()
        dot, norm, norm_hat = (x * x_hat).sum(1), x.norm(dim=1), x_hat.norm(dim=1)
        self._n += len(x)
        self._fvu.update(x, x_hat)
        self._errors.update(x - x_hat, x - x_hat)
        self._square += float(norm_hat.square().sum())
        self._dot += float(dot.sum())
        self._sums["l2_norm_in"] += float(norm.sum())
        self._sums["l2_norm_out"] += float(norm_hat.sum())
        self._sums["l2_ratio"] += float((norm_hat / norm).sum())
        self._sums["cossim"] += float((dot / (norm * norm_hat).where(norm_hat > 0, 1)).sum())
        self._sums["l0"] += l0 * len(x)

    def figures(self) -> dict[str, Any]:
        """By name; only n_tokens where there were no rows."""
        if not self._n:
            return {"n_tokens": 0}
        fvu = self._fvu.value
        found = {name: total / self._n for name, total in self._sums.items()} | {
            "relative_reconstruction_bias": _ratio(self._square, self._dot),
            "fvu": fvu,
            "explained_variance": 1 - fvu,
            "frac_variance_explained": 1 - _ratio(self._errors.variance, self._fvu.variance),
        }
        return {"n_tokens": self._n, **_defined(found)}


class Prediction:
    """Next-token cross-entropy and KL by variant of a model, in nats, at chosen positions.

    KL(original ‖ variant) is a mean over the positions, CE over those that have a next token.
    Log-probabilities are float32, or of the model's dtype if that is wider. Variants: without_sae
    (the original), with_sae, with_ablation and with_mean_ablation.
    """

    def __init__(self) -> None:
        self._ce: dict[str, float] = {}
        self._kl: dict[str, float] = {}
        self._n_ce = self._n_kl = 0

    def add(
        self,
        variant: str,
        ids: Tensor,
        chosen: Tensor,
        logits: Tensor,
        original: Tensor | None = None,
    ) -> None:
        """Windows ids [n, window], chosen (bool) alike, logits [n, window, V]; without `original`
        logits, these are the original ones."""
        for i, window in enumerate(ids):  # one at a time: its log-probabilities are large
            at = chosen[i].nonzero()[:, 0]
            log_q = _log_softmax(logits[i, at])
            has_next = at < len(window) - 1
            following = window[at[has_next] + 1]
            ce = -log_q[has_next].gather(1, following[:, None]).sum(dtype=torch.float64)
            self._ce[variant] = self._ce.get(variant, 0.0) + float(ce)
            if original is None:
                self._n_ce += len(following)
                self._n_kl += len(at)
                continue
            log_p = _log_softmax(original[i, at])
            kl = (log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64)
            self._kl[variant] = self._kl.get(variant, 0.0) + float(kl)

    def figures(self) -> Figures:
        """By name; scores are 1 where nothing is lost, 0 where as much as by the ablation."""
        ce = {name: _ratio(total, self._n_ce) for name, total in self._ce.items()}
        kl = {name: _ratio(total, self._n_kl) for name, total in self._kl.items()}
        found = {f"ce_loss_{name}": value for name, value in ce.items()}
        found["delta_ce_loss"] = ce["with_sae"] - ce["without_sae"]
        found |= {f"kl_div_{name}": value for name, value in kl.items()}
        for end in ("", "_mean_ablation"):
            worst = f"with{end or '_ablation'}"
            lost = ce[worst] - ce["without_sae"]
            found[f"ce_loss_score{end}"] = _ratio(ce[worst] - ce["with_sae"], lost)
            found[f"kl_div_score{end}"] = _ratio(kl[worst] - kl["with_sae"], kl[worst])
        return _defined(found)


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan


def _defined(figures: dict[str, float]) -> Figures:
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}
