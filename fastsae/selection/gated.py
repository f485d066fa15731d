"""Gated: a gate and a magnitude for each latent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastsae.blocked import PairFunction, Pairs
from fastsae.selection.base import Call, Selection, Terms, check_number
from fastsae.selection.per_pair import PerPair


@dataclass(frozen=True)
class Gated(PerPair, Selection):
    """A gate and a magnitude for each latent (Rajamanoharan et al. 2024, 2404.16014).

        π = h = W_enc (x - b_dec) + b_gate      f = ReLU(exp(r_mag)·(h - b_gate) + b_mag)
        z = f where π > 0                       x̂_frozen = ReLU(π) W_dec + b_dec, both constant

    b_gate is the SAE's b_enc; r_mag and b_mag are parameters in the state. The loss has
    l1_coef·ΣReLU(π) and, as the term frozen_mse, the mse of x̂_frozen with coefficient 1. Where
    b_gate starts below zero, magnitudes do not.
    """

    name: ClassVar[str] = "gated"
    l1_coef: float = 5e-3
    l0: float | None = None
    """Target of the controller; with it, l1_coef is where the coefficient starts."""
    rate: float = 0.02
    """Of the controller."""
    warmup: float = 0.0
    start: float = 1.0
    """With l0: what share of it is active when training starts; 0: all biases start at 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("l1_coef", self.l1_coef, 0)

    def state(self, d_in: int, d_sae: int) -> dict[str, Tensor]:
        own = {name: nn.Parameter(torch.zeros(d_sae)) for name in ("r_mag", "b_mag")}
        return {**super().state(d_in, d_sae), **own}

    def latents(self, call: Call) -> tuple[Tensor, ...]:
        """f = ReLU(scale·h + shift)."""
        scale, shift = call.state.r_mag.exp(), call.state.b_mag
        return scale, shift if call.b_enc is None else shift - scale * call.b_enc

    def thresholds(self, call: Call, latents: tuple[Tensor, ...]) -> Tensor:
        scale, shift = (v.detach() for v in latents)
        return torch.zeros_like(scale) if call.training else (-shift / scale).clamp(min=0)

    def pairs(self, call: Call) -> PairFunction:
        def pairs(h: Tensor, scale: Tensor, shift: Tensor) -> Pairs:
            gate = torch.relu(h)
            z = torch.relu(scale * h + shift).where(h > 0, 0)
            return Pairs(z, (gate,), gate if call.training else None)

        return pairs

    def terms(self, call: Call, penalties: list[Tensor]) -> Terms:
        return {"sparsity": (self.coefficient(call, self.l1_coef), penalties[0])}

    def rescale_(self, state: Any, factor: float) -> None:
        state.b_mag *= factor

    def restart_(self, state: Any, latents: Tensor) -> None:
        state.r_mag[latents] = 0
        state.b_mag[latents] = 0

    def fold_norms_(self, state: Any, norms: Tensor) -> None:
        state.b_mag *= norms
