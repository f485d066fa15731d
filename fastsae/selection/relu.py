"""ReLU with an L1 penalty, or an annealed one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastsae.blocked import PairFunction, Pairs
from fastsae.selection.base import Call, Selected, Selection, Terms, check_flag, check_number
from fastsae.selection.per_pair import PerPair
from fastsae.sums import row_norms


@dataclass(frozen=True)
class ReLU(PerPair, Selection):
    """z = ReLU(h), with the penalty l1_coef·Σz, or Σzᵖ with an exponent that falls (2408.00113).

    p-annealing, Karvonen et al. 2024: p is 1 until `anneal_start`, then takes n_updates values, 1
    to p_end, at equal distances; p_end with the end of the training. At each change the coefficient
    is multiplied by Σzᵖ (old p) / Σzᵖ (new p), sums over the last 10 batches (after the last
    change, where those are fewer); the term "sparsity_next", of coefficient 0, is what the next p
    would make of the penalty. p moves on by one value a step at most. The derivative of zᵖ is 0 at
    z = 0. decoder_norm_weighted: a pair's penalty is weighted by ‖W_dec[i]‖, for a decoder with
    free norms ("April update", Anthropic 2024).
    """

    name: ClassVar[str] = "relu"
    l1_coef: float = 5e-3
    l0: float | None = None
    """Target of the controller; with it, l1_coef is where the coefficient starts."""
    p_end: float | None = None
    """None: p is always 1. The paper has 0.2."""
    anneal_start: float = 0.2
    """Share of the training."""
    n_updates: int = 10
    decoder_norm_weighted: bool = False
    rate: float = 0.02
    """Of the controller."""
    warmup: float = 0.0
    start: float = 1.0
    """With l0: what share of it is active when training starts; 0: all biases start at 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("l1_coef", self.l1_coef, 0)
        check_number("anneal_start", self.anneal_start, 0, 1)
        if self.p_end is not None:
            check_number("p_end", self.p_end, 1e-3, 1)
        if not isinstance(self.n_updates, int) or self.n_updates < 2:
            raise ValueError(f"n_updates: expected an integer of at least 2, got {self.n_updates}")
        check_flag("decoder_norm_weighted", self.decoder_norm_weighted)

    def state(self, d_in: int, d_sae: int) -> dict[str, Tensor]:
        state = super().state(d_in, d_sae)
        if self.p_end is not None:
            state["place"] = torch.zeros((), dtype=torch.int64)  # of p among its values
            state["log_power"] = torch.zeros(())  # log of the product of the ratios so far
            state["sums"] = torch.zeros(2, 10)  # of zᵖ, and with the next p; last batch first
        return state

    def latents(self, call: Call) -> tuple[Tensor, ...]:
        if self.decoder_norm_weighted and call.training:
            return (row_norms(call.W_dec, backend=call.backend),)
        return ()

    def fold_norms_(self, state: Any, norms: Tensor) -> None:
        pass  # ReLU does not mind a positive factor

    def _place(self, call: Call) -> tuple[Tensor, Tensor]:
        """Where p stands in this step, and the log of what annealing makes of the coefficient."""
        s, last = call.state, self.n_updates - 1
        share = (call.progress - self.anneal_start) / max(1 - self.anneal_start, 1e-12)
        wanted = min(max(math.floor(share * last + 1e-9), 0), last)
        place = (s.place + 1).clamp(max=wanted).maximum(s.place)
        now, then = s.sums.sum(1)
        ratio = (now / then).where((now > 0) & (then > 0), 1)
        return place, s.log_power + ratio.log().where(place > s.place, 0)

    def pairs(self, call: Call) -> PairFunction:
        p = p_next = None
        if self.p_end is not None and call.training:
            place, last = self._place(call)[0], self.n_updates - 1
            p, p_next = (
                1 + (self.p_end - 1) * at / last for at in (place, (place + 1).clamp(max=last))
            )

        def pairs(h: Tensor, norm: Tensor | None = None) -> Pairs:
            z = torch.relu(h)
            weight = z if p is None else _power(z, p)
            penalties = [weight if norm is None else weight * norm]
            if p_next is not None:
                weight = _power(z.detach(), p_next)
                penalties.append(weight if norm is None else weight * norm.detach())
            return Pairs(z, tuple(penalties))

        return pairs

    def terms(self, call: Call, penalties: list[Tensor]) -> Terms:
        coefficient = self.coefficient(call, self.l1_coef)
        if self.p_end is None:
            return {"sparsity": (coefficient, penalties[0])}
        coefficient = coefficient * self._place(call)[1].exp()
        return {"sparsity": (coefficient, penalties[0]), "sparsity_next": (0.0, penalties[1])}

    def observe(self, call: Call, selected: Selected) -> None:
        super().observe(call, selected)
        if self.p_end is None:
            return
        s = call.state
        place, log_power = self._place(call)
        terms = selected.terms
        new = torch.stack([terms[name][1] for name in ("sparsity", "sparsity_next")])
        new = new.detach().to(s.sums.dtype) * len(call.x)
        new = new.where(new.isfinite(), 0)
        kept = s.sums[:, :-1].where(place == s.place, 0)
        s.sums.copy_(torch.cat([new[:, None], kept], 1))
        s.log_power.copy_(log_power)
        s.place.copy_(place)


def _power(z: Tensor, p: Tensor) -> Tensor:
    """zᵖ for z ≥ 0, with 0 and derivative 0 at 0."""
    return z.where(z > 0, 1).pow(p).where(z > 0, 0)
