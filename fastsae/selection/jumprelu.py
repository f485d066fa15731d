"""JumpReLU: a threshold for each latent."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fastsae import ops
from fastsae.blocked import PairFunction, Pairs
from fastsae.selection.base import Call, Selection, Terms, check_number
from fastsae.selection.per_pair import PerPair
from fastsae.sums import row_norms, total


@dataclass(frozen=True)
class JumpReLU(PerPair, Selection):
    """z = h where h > θ, with a threshold for each latent (Rajamanoharan et al. 2024, 2407.14435).

    θ = exp(log_threshold), a parameter in the state. Its gradients are the paper's kernel estimates
    with a rectangle of width `bandwidth` around θ on the pre-activation, both sides of it::

        ∂z/∂θ = -(θ/ε) K     ∂H(h - θ)/∂θ = -(1/ε) K     K = 1 where |h - θ| < ε/2
        ∂z/∂h = H(h - θ)     ∂H(h - θ)/∂h = 0            ∂/∂log θ = θ ∂/∂θ

    So the pairs with h > θ - ε/2 matter in training. The penalty is the L0, or with l0_target
    (L0 / l0_target - 1)², with the paper's threshold gradient; or tanh(tanh_scale·z·‖W_dec[i]‖)
    (loss "tanh", SAELens and Anthropic), which also shrinks z. θ and ε are in units of h: the
    defaults (ours) are for scaled activations and short runs; the paper has 0.001 for both.

    Only θ feels the L0 penalty, and Adam moves log θ by the learning rate a step at most, so with
    `l0` the controller also multiplies all θ by exp(5·rate·e) after each batch (ours). l0_target
    needs runs as long as the paper's.

    The pre-activation loss (Anthropic 2025) pulls dead latents back: Σ ReLU(θ - h)·‖W_dec[i]‖ over
    them, as in SAELens, a mean over the tokens. All their h are below θ, so it is linear in them
    and takes one product with the mean token.
    """

    name: ClassVar[str] = "jumprelu"
    l0_coef: float = 1e-3
    l0_target: float | None = None
    """Of the quadratic form, without a controller."""
    l0: float | None = None
    """Target of the controller; with it, l0_coef is where the coefficient starts."""
    loss: Literal["step", "tanh"] = "step"
    threshold: float = 2.0
    """What θ starts at, unless `start` sets it."""
    bandwidth: float = 0.1
    tanh_scale: float = 4.0
    rate: float = 0.02
    """Of the controller."""
    pre_act_coef: float = 0.0
    """Of the pre-activation loss; SAELens and Anthropic: 3e-6, beside a sum over the width."""
    warmup: float = 0.0
    start: float = 1.0
    """With l0: what share of it is active when training starts; 0: all θ start at `threshold`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("l0_coef", self.l0_coef, 0)
        check_number("pre_act_coef", self.pre_act_coef, 0)
        for name in ("threshold", "bandwidth", "tanh_scale"):
            check_number(name, getattr(self, name), 1e-12)
        if self.loss not in ("step", "tanh"):
            raise ValueError(f"loss: expected step or tanh, got {self.loss!r}")
        if self.l0_target is not None:
            check_number("l0_target", self.l0_target, 1e-3)
            if self.l0 is not None or self.loss != "step":
                raise ValueError("l0_target: expected loss step and no l0 with it")

    def state(self, d_in: int, d_sae: int) -> dict[str, Tensor]:
        log_threshold = nn.Parameter(torch.full((d_sae,), math.log(self.threshold)))
        return {**super().state(d_in, d_sae), "log_threshold": log_threshold}

    def exceed_(self, call: Call, threshold: Tensor) -> None:
        call.state.log_threshold.fill_(threshold.log())

    def latents(self, call: Call) -> tuple[Tensor, ...]:
        theta = call.state.log_threshold.exp()
        if self.loss == "tanh" and call.training:
            return theta, row_norms(call.W_dec, backend=call.backend)
        return (theta,)

    def thresholds(self, call: Call, latents: tuple[Tensor, ...]) -> Tensor:
        return latents[0] - self.bandwidth / 2 if call.training else latents[0]

    def pairs(self, call: Call) -> PairFunction:
        half = self.bandwidth / 2

        def pairs(h: Tensor, theta: Tensor, norm: Tensor | None = None) -> Pairs:
            constant = theta.detach()
            active = (h > constant).to(h.dtype)
            window = ((h > constant - half) & (h < constant + half)).to(h.dtype)
            zero = window * (constant - theta) / self.bandwidth  # carries the gradient of θ
            z = h * active + constant * zero
            if norm is None:
                return Pairs(z, (active + zero,))
            return Pairs(z, (torch.tanh(self.tanh_scale * z * norm),))

        return pairs

    def terms(self, call: Call, penalties: list[Tensor]) -> Terms:
        penalty = penalties[0]
        if self.l0_target is not None:
            penalty = (penalty / self.l0_target - 1).square()
        return {"sparsity": (self.coefficient(call, self.l0_coef), penalty)}

    def dead_terms(self, call: Call, is_dead: Tensor) -> Terms:
        dead = is_dead.nonzero()[:, 0] if self.pre_act_coef else is_dead[:0]
        if not len(dead) or not len(call.x):
            return {}
        norms = row_norms(call.W_dec, backend=call.backend)[dead]
        gap = call.state.log_threshold.exp()[dead]
        if call.b_enc is not None:
            gap = gap - call.b_enc[dead]
        tokens = torch.arange(len(call.x), device=dead.device)
        x = _row_sum(torch.full_like(call.x[:, 0], 1 / len(call.x)), tokens, call.x, call)
        if call.pre_bias is not None:
            x = x - call.pre_bias
        h = x * _row_sum(norms, dead, call.W_enc, call)
        value = total(norms * gap, backend=call.backend) - total(h, backend=call.backend)
        return {"pre_act": (self.pre_act_coef, value)}

    def steer(self, state: Any, excess: Tensor) -> None:
        super().steer(state, excess)
        state.log_threshold += 5 * self.rate * excess.to(state.log_threshold.dtype)

    def rescale_(self, state: Any, factor: float) -> None:
        state.log_threshold += math.log(factor)

    def restart_(self, state: Any, latents: Tensor) -> None:
        others = torch.ones_like(state.log_threshold).index_fill_(0, latents, 0)
        mean = (others * state.log_threshold).sum() / others.sum()
        state.log_threshold[latents] = mean.where(others.sum() > 0, math.log(self.threshold))

    def fold_norms_(self, state: Any, norms: Tensor) -> None:
        state.log_threshold += norms.log()

    def inference_thresholds(self, state: Any, W_dec: Tensor) -> Tensor | None:
        return state.log_threshold.detach().exp()


def _row_sum(coef: Tensor, ids: Tensor, rows: Tensor, call: Call) -> Tensor:
    """Σ coef[i]·rows[ids[i]] (D), differentiable, in a fixed order."""
    row_ptr = torch.tensor([0, len(ids)], device=ids.device)
    dtype = torch.promote_types(rows.dtype, torch.float32)
    return ops.decode(
        coef, ids.to(torch.int32), rows, row_ptr=row_ptr, dtype=dtype, backend=call.backend
    )[0]
