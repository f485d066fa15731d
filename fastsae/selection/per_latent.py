"""Rules with a budget for each latent."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastsae import ops
from fastsae.codes import Codes
from fastsae.selection.base import (
    Call,
    Selected,
    Selection,
    check_decay,
    check_k,
    check_number,
    follow_,
    latent_sums,
)
from fastsae.selection.per_token import TopK


def zipf_budgets(
    n_latents: int,
    total: int,
    n_tokens: int,
    *,
    exponent: float = 1.0,
    offset: float = 0.0,
    floor: int = 1,
    cap: float = 1.0,
) -> Tensor:
    """How many tokens each rank may take: int32 (n_latents), descending, their sum exactly `total`.

    Proportional to (rank + offset)^-exponent, rank from 1, between floor and cap·n_tokens; floored,
    and what is left handed out by largest fraction, then rank. The floor is lowered to total //
    n_latents where it does not fit, and the sum is cap·n_tokens·n_latents where that is less.
    """
    high = max(1, math.floor(cap * n_tokens)) if n_tokens else 0
    total = min(total, n_latents * high)
    low = min(floor, total // max(n_latents, 1), high)
    rank = torch.arange(1, n_latents + 1, dtype=torch.float64)
    log_weight = -exponent * torch.log(rank + offset)

    def budgets(log_c: float) -> Tensor:
        return (log_c + log_weight).exp().clamp(low, high)

    below, above = -60.0 - float(log_weight.max()), 60.0 - float(log_weight.min())
    for _ in range(200):
        middle = (below + above) / 2
        if float(budgets(middle).sum()) <= total:
            below = middle
        else:
            above = middle
    real = budgets(below)
    whole = real.floor().clamp(low, high)
    left = total - int(whole.sum())
    room = whole < high
    order = (real - whole).where(room, -1).sort(descending=True, stable=True).indices
    whole[order[:left]] += 1
    return whole.to(torch.int32)


@functools.lru_cache(maxsize=4)  # the same for every batch
def _zipf_budgets_on(device: torch.device, *sizes: int, **law: Any) -> Tensor:
    return zipf_budgets(*sizes, **law).to(device)


@dataclass(frozen=True)
class FeatureChoice(Selection):
    """Each latent takes its best tokens, as many as a Zipf law grants it (2411.02124).

    Ayonrinde 2024. The Zipf law, its ranks and inference are our reading. The budgets of
    `zipf_budgets` add up to k·N; the latent that fires most often, by an exponential average, gets
    the largest. In the first `warmup` of the training the selection is Mutual Choice, which shows
    how often each latent would fire. A latent that was never selected is silent at inference.

    Inference: h > θ_i. The smallest of m selected values lies above the value that m tokens of a
    batch pass on average; for m = 1 by much. For a tail that falls exponentially (the extreme value
    law of many others) the smallest value X_m has the mean θ + σ(ln m - ψ(m)) and the variance
    σ²ψ'(m), so θ_i comes from the averages of X_m, X_m² and m.

    aux_zipf (our reading of aux_zipf_loss): the AuxK loss revives also the latents that fire less
    than this share of what their rank is granted.
    """

    name: ClassVar[str] = "feature-choice"
    has_inference_form: ClassVar[bool] = True
    k: int
    """Pairs a token, on average."""
    exponent: float = 1.0
    offset: float = 0.0
    floor: int = 1
    cap: float = 1.0
    """The largest share of the tokens that a latent may take."""
    warmup: float = 0.1
    aux_zipf: float = 0.1
    decay: float = 0.97
    """Of the averages of firing rates and thresholds."""

    def __post_init__(self) -> None:
        check_k(self.k)
        for name, low, high in (
            ("exponent", 0, math.inf),
            ("offset", 0, math.inf),
            ("floor", 0, math.inf),
            ("cap", 0, 1),
            ("warmup", 0, 1),
            ("aux_zipf", 0, 1),
        ):
            check_number(name, getattr(self, name), low, high)
        if not isinstance(self.floor, int):
            raise ValueError(f"floor: expected an integer, got {self.floor!r}")
        check_decay(self.decay)

    def check(self, d_sae: int) -> None:
        TopK(self.k).check(d_sae)

    def state(self, d_in: int, d_sae: int) -> dict[str, Tensor]:
        names = ("smallest", "smallest_square", "selected", "weight", "rate")
        return {name: torch.zeros(d_sae) for name in names} | {"rate_weight": torch.zeros(())}

    def inference_thresholds(self, state: Any, W_dec: Tensor) -> Tensor | None:
        seen = state.weight > 0
        if not bool(seen.any()):
            return None
        weight = state.weight.where(seen, 1)
        mean, m = state.smallest / weight, (state.selected / weight).clamp(min=1)
        variance = (state.smallest_square / weight - mean * mean).clamp(min=0)
        sigma = (variance / torch.polygamma(1, m)).sqrt()
        theta = (mean - sigma * (m.log() - torch.digamma(m))).clamp(min=0)
        return theta.where(seen, math.inf)

    def _granted(self, state: Any, n_tokens: int) -> Tensor:
        """Budgets (F) int32 of a batch, by rank of the firing rate, then latent."""
        n_latents = len(state.rate)
        by_rank = _zipf_budgets_on(
            state.rate.device,
            n_latents,
            self.k * n_tokens,
            n_tokens,
            exponent=self.exponent,
            offset=self.offset,
            floor=self.floor,
            cap=self.cap,
        )
        order = state.rate.sort(descending=True, stable=True).indices
        return torch.empty_like(by_rank).index_copy_(0, order, by_rank)

    def select(self, call: Call) -> Selected:
        s, n_tokens, budgets = call.state, len(call.x), None
        theta = None if call.training else self.inference_thresholds(s, call.W_dec)
        if theta is not None:
            pairs = ops.encode_threshold(*call.encoder, thresholds=theta, **call.options)
        elif call.training and call.progress < self.warmup:
            pairs = ops.encode_batch(*call.encoder, budget=self.k * n_tokens, **call.options)
        else:
            budgets = self._granted(s, n_tokens)
            room = self.k * n_tokens
            pairs = ops.encode_columns(*call.encoder, budgets=budgets, room=room, **call.options)
        vals, idx, row_ptr = pairs
        return Selected(Codes(vals, idx, len(call.W_enc), row_ptr), own=budgets)

    def observe(self, call: Call, selected: Selected) -> None:
        codes, s = selected.codes, call.state
        assert codes is not None
        place = codes.idx.where(codes.idx >= 0, codes.n_latents).long()
        smallest = torch.full((codes.n_latents + 1,), math.inf, device=place.device)
        smallest.scatter_reduce_(0, place, codes.vals.float(), "amin")
        smallest = smallest[:-1]
        seen = smallest.isfinite()
        fired = latent_sums((codes.idx >= 0).float(), codes, call.backend)
        rate = (1 - self.decay) * seen
        for total, value in (
            (s.smallest, smallest.where(seen, 0)),
            (s.smallest_square, smallest.where(seen, 0).square()),
            (s.selected, fired),
            (s.weight, torch.ones_like(fired)),
        ):
            follow_(total, value, rate)
        s.rate.mul_(self.decay).add_(fired / codes.n_tokens, alpha=1 - self.decay)
        s.rate_weight.mul_(self.decay).add_(1 - self.decay)

    def revivable(self, call: Call, selected: Selected, is_dead: Tensor) -> Tensor:
        s, n_tokens, budgets = call.state, len(call.x), selected.own
        granted = (self._granted(s, n_tokens) if budgets is None else budgets) / n_tokens
        return is_dead | (s.rate < self.aux_zipf * granted * s.rate_weight)

    def restart_(self, state: Any, latents: Tensor) -> None:
        for tensor in (state.smallest, state.smallest_square, state.selected, state.weight):
            tensor[latents] = 0

    def rescale_(self, state: Any, factor: float) -> None:
        state.smallest *= factor
        state.smallest_square *= factor * factor
