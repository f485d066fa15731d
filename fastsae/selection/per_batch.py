"""Rules with one budget for the whole batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastsae import ops
from fastsae.codes import Codes
from fastsae.selection.base import (
    Call,
    Score,
    Selected,
    Selection,
    average_,
    check_decay,
    check_flag,
    check_k,
    check_number,
    check_score,
    fold_weighted,
    score_scale,
)
from fastsae.sums import row_norms


class _BatchBudget:
    """What the rules share that choose the pairs_per_token·N best pairs of a batch.

    Inference: score > θ, with θ the average of the batches' smallest selected score (the estimator
    of Bussmann et al. 2024), here an exponential one with bias correction; before a first training
    step they select as in training.
    """

    name: ClassVar[str]
    score: Score
    decay: float

    @property
    def pairs_per_token(self) -> float:
        raise NotImplementedError

    def __post_init__(self) -> None:
        check_score(self.score)
        check_decay(self.decay)

    def check(self, d_sae: int) -> None:
        if self.pairs_per_token > d_sae:
            raise ValueError(
                f"pairs a token: expected at most d_sae = {d_sae}, got {self.pairs_per_token}"
            )

    def state(self, d_in: int, d_sae: int) -> dict[str, Tensor]:
        return {"threshold_total": torch.zeros(()), "threshold_weight": torch.zeros(())}

    def inference_thresholds(self, state: Any, W_dec: Tensor) -> Tensor | None:
        if not bool(state.threshold_weight > 0):
            return None
        theta = state.threshold_total / state.threshold_weight
        return theta if self.score == "activation" else theta / row_norms(W_dec.detach())

    def select(self, call: Call) -> Selected:
        scale = score_scale(call, self.score)
        theta = None if call.training else self.inference_thresholds(call.state, call.W_dec)
        if theta is not None:
            pairs = ops.encode_threshold(*call.encoder, thresholds=theta, **call.options)
        else:
            shards = call.shards
            n_tokens = len(call.x) * (1 if shards is None else shards.n_data)
            budget = round(self.pairs_per_token * n_tokens)
            agree = None if shards is None else shards.best_of_batch(budget, scale)
            options = {**call.options, "scale": scale, "agree": agree}
            pairs = ops.encode_batch(*call.encoder, budget=budget, **options)
        vals, idx, row_ptr = pairs
        return Selected(Codes(vals, idx, len(call.W_enc), row_ptr))

    def observe(self, call: Call, selected: Selected) -> None:
        codes, scale = selected.codes, score_scale(call, self.score)
        assert codes is not None
        scores = codes.vals.float()
        if scale is not None:
            scores = scores * scale[codes.idx.clamp(min=0).long()]
        if scores.numel():
            smallest = scores.where(codes.idx >= 0, math.inf).min()
            if call.shards is not None:
                smallest = call.shards.least(smallest)
            total, weight = call.state.threshold_total, call.state.threshold_weight
            average_(total, weight, smallest, self.decay, smallest.isfinite())

    def fold_norms_(self, state: Any, norms: Tensor) -> None:
        fold_weighted(self.name, self.score)

    def rescale_(self, state: Any, factor: float) -> None:
        state.threshold_total *= factor


@dataclass(frozen=True)
class BatchTopK(_BatchBudget, Selection):
    """The k·N pairs of a batch of N tokens with the largest positive scores (2412.06410).

    Bussmann et al. 2024. The value is ReLU(h), the score as in TopK.
    """

    name: ClassVar[str] = "batchtopk"
    sharded: ClassVar[bool] = True
    has_inference_form: ClassVar[bool] = True
    k: int
    score: Score = "activation"
    decay: float = 0.95
    """Of the average that the threshold of inference is."""

    def __post_init__(self) -> None:
        check_k(self.k)
        super().__post_init__()

    @property
    def pairs_per_token(self) -> float:
        return self.k


@dataclass(frozen=True)
class MutualChoice(_BatchBudget, Selection):
    """The budget·N best pairs of a batch, with no limit a token or a latent (2411.02124).

    Ayonrinde 2024. The selection is BatchTopK's, as the paper's reviewers note; the score h and the
    threshold at inference are our reading.
    """

    name: ClassVar[str] = "mutual-choice"
    sharded: ClassVar[bool] = True
    k_name: ClassVar[str | None] = "budget"
    has_inference_form: ClassVar[bool] = True
    budget: float
    """Pairs a token, on average."""
    score: Score = "activation"
    decay: float = 0.95
    """Of the average that the threshold of inference is."""

    def __post_init__(self) -> None:
        check_number("budget", self.budget, 0)
        super().__post_init__()

    @property
    def pairs_per_token(self) -> float:
        return self.budget


@dataclass(frozen=True)
class Matryoshka(_BatchBudget, Selection):
    """BatchTopK whose prefixes of latents must reconstruct by themselves (2503.17547).

    Bussmann et al. 2025. The latents are divided into nested groups, of `groups` shares of d_sae;
    one selection over all of them. The loss is the mean of the prefixes' mse, with bias_term also
    that of b_dec alone, as in the authors' code.
    """

    name: ClassVar[str] = "matryoshka"
    has_inference_form: ClassVar[bool] = True
    k: int
    groups: tuple[float, ...] = (1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
    bias_term: bool = True
    score: Score = "activation"
    decay: float = 0.95
    """Of the average that the threshold of inference is."""

    def __post_init__(self) -> None:
        check_k(self.k)
        super().__post_init__()
        check_flag("bias_term", self.bias_term)
        for share in self.groups:
            check_number("groups", share, 0, 1)
        if not self.groups or min(self.groups) <= 0 or abs(sum(self.groups) - 1) > 1e-6:
            raise ValueError(f"groups: expected shares above 0 that add up to 1, got {self.groups}")

    @property
    def pairs_per_token(self) -> float:
        return self.k

    def ends(self, d_sae: int) -> list[int]:
        """The first latent beyond each prefix."""
        shares = [sum(self.groups[: i + 1]) for i in range(len(self.groups))]
        return [round(share * d_sae) for share in shares]

    def check(self, d_sae: int) -> None:
        super().check(d_sae)
        ends = self.ends(d_sae)
        if any(a >= b for a, b in zip([0, *ends], ends, strict=False)):
            raise ValueError(f"groups: expected a latent in each of {self.groups} of {d_sae}")

    def parts(self, codes: Codes) -> list[tuple[float, Codes]]:
        ends = self.ends(codes.n_latents)
        weight = 1 / (len(ends) + self.bias_term)
        parts = [(weight, codes.only(codes.idx < 0))] if self.bias_term else []
        for start, end in zip([0, *ends], ends, strict=False):
            parts.append((weight, codes.only((codes.idx >= start) & (codes.idx < end))))
        return parts
