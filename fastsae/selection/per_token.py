"""Rules with a budget for each token."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace
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
    check_k,
    check_number,
    check_score,
    fold_weighted,
    score_scale,
)


@dataclass(frozen=True)
class TopK(Selection):
    """The k pairs of each token with the largest positive scores (Gao et al. 2024, 2406.04093).

    The value is ReLU(h). Fewer than k are kept where fewer are positive. The score is h, or
    h·‖W_dec[i]‖ (Llama Scope, He et al. 2024, 2410.20526), which a decoder with free norms wants.
    """

    name: ClassVar[str] = "topk"
    sharded: ClassVar[bool] = True
    k: int
    score: Score = "activation"
    anneal: float = 0.0
    """Share of the training over which k falls linearly from k_start (Llama Scope: 0.1)."""
    k_start: int | None = None
    """None: the width of the activations, or d_sae if that is less."""
    nested: tuple[int, ...] = ()
    """Smaller budgets, ascending, whose reconstructions count in the loss as much as that of k."""

    def __post_init__(self) -> None:
        check_k(self.k)
        check_score(self.score)
        check_number("anneal", self.anneal, 0, 1)
        if self.k_start is not None:
            check_k(self.k_start, "k_start")
            if self.k_start < self.k:
                raise ValueError(f"k_start: expected at least k = {self.k}, got {self.k_start}")
        for smaller, larger in zip((0, *self.nested), (*self.nested, self.k), strict=True):
            if not (isinstance(smaller, int) and smaller < larger):
                raise ValueError(
                    f"nested: expected ascending budgets in [1, {self.k}), got {self.nested}"
                )

    def check(self, d_sae: int) -> None:
        if max(self.k, self.k_start or 0) > d_sae:
            name, k = ("k", self.k) if self.k > d_sae else ("k_start", self.k_start)
            raise ValueError(f"{name}: expected at most d_sae = {d_sae}, got {k}")

    def k_at(self, call: Call) -> int:
        """k at this point of the training."""
        if not call.training or call.progress >= self.anneal:
            return self.k
        d_sae = len(call.W_enc) * (1 if call.shards is None else call.shards.n_latent)
        start = max(self.k, self.k_start or min(call.x.shape[1], d_sae))
        k = math.ceil(start + (self.k - start) * call.progress / self.anneal)
        return operator.index(k)  # a constant of a graph that torch.compile makes of this k

    def select(self, call: Call) -> Selected:
        k, scale = self.k_at(call), score_scale(call, self.score)
        agree = None if call.shards is None else call.shards.best_of_token(k, scale)
        vals, idx = ops.encode(*call.encoder, k=k, scale=scale, agree=agree, **call.options)
        return Selected(Codes(vals, idx, len(call.W_enc)))

    def fold_norms_(self, state: Any, norms: Tensor) -> None:
        fold_weighted(self.name, self.score)

    def parts(self, codes: Codes) -> list[tuple[float, Codes]] | None:
        if not self.nested:
            return None
        ends, weight = [*self.nested, codes.idx.shape[1]], 1 / (len(self.nested) + 1)
        pieces = [slice(*span) for span in zip([0, *ends], ends, strict=False)]
        return [(weight, Codes(codes.vals[:, p], codes.idx[:, p], codes.n_latents)) for p in pieces]

    def widened(self, factor: int, d_sae: int) -> TopK:
        """The rule with `factor` times as many latents a token, at most d_sae."""
        return replace(self, k=min(factor * self.k, d_sae), anneal=0.0, k_start=None, nested=())


@dataclass(frozen=True)
class AbsTopK(Selection):
    """The k pairs of each token with the largest |h|; the value is h, of either sign (SAELens)."""

    name: ClassVar[str] = "abs-topk"
    sharded: ClassVar[bool] = True
    k: int

    def __post_init__(self) -> None:
        check_k(self.k)

    def check(self, d_sae: int) -> None:
        TopK(self.k).check(d_sae)

    def select(self, call: Call) -> Selected:
        shards = call.shards
        agree = None if shards is None else shards.best_of_token(self.k, absolute=True)
        options = {**call.options, "absolute": True, "agree": agree}
        vals, idx = ops.encode(*call.encoder, k=self.k, **options)
        return Selected(Codes(vals, idx, len(call.W_enc)))


@dataclass(frozen=True)
class GroupTopK(Selection):
    """The largest positive h in each of k equal runs of latents (EleutherAI's "groupmax")."""

    name: ClassVar[str] = "group-topk"
    k: int
    """Number of groups, the first of d_sae / k latents and so on."""

    def __post_init__(self) -> None:
        check_k(self.k)

    def check(self, d_sae: int) -> None:
        if d_sae % self.k:
            raise ValueError(f"k: expected a divisor of d_sae = {d_sae}, got {self.k}")

    def select(self, call: Call) -> Selected:
        vals, idx = ops.encode_groups(*call.encoder, groups=self.k, **call.options)
        return Selected(Codes(vals, idx, len(call.W_enc)))


@dataclass(frozen=True)
class GradientTopK(Selection):
    """Top k by activation and effect on a language model's loss (Olmo et al. 2024, 2411.10397).

    Our reading: the score is h·(1 + beta·|<g, W_dec[i]>| / m), with g the gradient of the model's
    loss at the token and m an exponential average of |<g, W_dec[i]>| over the selected pairs; the
    value is h. No gradient flows through the score. With beta 0, and at the first step, it is TopK.
    Inference: with gradients where they are given, else TopK.
    """

    name: ClassVar[str] = "gradient-topk"
    needs_gradient: ClassVar[bool] = True
    has_inference_form: ClassVar[bool] = True
    k: int
    beta: float = 1.0
    decay: float = 0.99

    def __post_init__(self) -> None:
        check_k(self.k)
        check_number("beta", self.beta, 0)
        check_decay(self.decay)

    def check(self, d_sae: int) -> None:
        TopK(self.k).check(d_sae)

    def state(self, d_in: int, d_sae: int) -> dict[str, Tensor]:
        return {"effect_total": torch.zeros(()), "effect_weight": torch.zeros(())}

    def select(self, call: Call) -> Selected:
        guide = W_dec = None
        if call.training and call.gradient is None:
            raise ValueError("gradient: expected one for each token (gradient-topk), got None")
        if call.gradient is not None and self.beta:
            total, weight = call.state.effect_total, call.state.effect_weight
            inverse = (weight / total).where(total > 0, 0)
            guide, W_dec = call.gradient * (self.beta * inverse), call.W_dec
        vals, idx = ops.encode(*call.encoder, k=self.k, guide=guide, W_dec=W_dec, **call.options)
        return Selected(Codes(vals, idx, len(call.W_enc)))

    def observe(self, call: Call, selected: Selected) -> None:
        codes, gradient = selected.codes, call.gradient
        assert codes is not None and gradient is not None
        effect = ops.pair_dots(gradient, codes.idx, call.W_dec, backend=call.backend).abs()
        there = codes.idx >= 0
        n = there.sum()
        mean = effect.where(there, 0).sum() / n.clamp(min=1)
        s = call.state
        average_(s.effect_total, s.effect_weight, mean, self.decay, (n > 0) & mean.isfinite())

    def rescale_(self, state: Any, factor: float) -> None:
        state.effect_total /= factor
