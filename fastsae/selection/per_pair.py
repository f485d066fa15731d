"""Rules that decide each pair by itself, and have a penalty instead of a budget.

A rule is an elementwise function of h and of some vectors (F), and thresholds: pairs with h at or
below theirs contribute to no value, loss or gradient. Training keeps the pairs above them, and
inference the active ones, where these are at most 5 % (and 2²²); else none (`fastsae.blocked`),
unless the codes are what is asked for. Gradients reach W_enc, b_enc, pre_bias, W_dec and the
rule's own parameters alike.

Coefficients  The SAE's loss is the mse, a mean over tokens and width; a penalty here is a sum over
    latents, averaged over the tokens. Published coefficients stand beside a squared error that is
    summed over the width: divide them by D (D_out of a transcoder).
Warm-up  The coefficient rises linearly over the first `warmup` share of the training.
Controller  With `l0` the coefficient is multiplied by exp(a + 2s), which steers the mean L0 there.
    Of e = log(L0 / l0), each batch after the warm-up adds rate·e, e within ±1/2, to a, and s
    averages e, within ±1, over about 10 batches. A state of the rule; nothing waits for it. It must
    arrive before the learning rate decays, as L0 then stands still.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fastsae import ops
from fastsae.blocked import Blocked, PairFunction, Pairs, blocked, row_norms, total
from fastsae.codes import Codes
from fastsae.reference import TooManyPairs
from fastsae.selection.base import (
    Call,
    Reconstruction,
    Selected,
    Selection,
    check_flag,
    check_number,
)

Terms = dict[str, tuple[float | Tensor, Tensor]]


def pair_limit(n_tokens: int, n_latents: int) -> int:
    """How many pairs a training step keeps, at about 100 bytes each."""
    return min(n_tokens * n_latents // 20, 2**22)


class _PerPair:
    """What the rules share; see above."""

    k_name: ClassVar[str | None] = "l0"
    l0: float | None
    rate: float
    warmup: float

    def __post_init__(self) -> None:
        if self.l0 is not None:
            check_number("l0", self.l0, 1e-3)
        check_number("rate", self.rate, 0, 1)
        check_number("warmup", self.warmup, 0, 1)

    def check(self, d_sae: int) -> None:
        if self.l0 is not None and self.l0 > d_sae:
            raise ValueError(f"l0: expected at most d_sae = {d_sae}, got {self.l0}")

    def state(self, d_in: int, d_sae: int) -> dict[str, Tensor]:
        return {} if self.l0 is None else {"log_factor": torch.zeros(()), "excess": torch.zeros(())}

    # ---- what a rule defines ----

    def latents(self, call: Call) -> tuple[Tensor, ...]:
        """The vectors (F) of `pairs`, differentiable."""
        return ()

    def pairs(self, call: Call) -> PairFunction:
        """(h, *latents), all of one shape → Pairs; the first penalty is the one of the loss."""
        raise NotImplementedError

    def thresholds(self, call: Call, latents: tuple[Tensor, ...]) -> Tensor:
        """(F) or 0-d: what h must exceed for a pair to matter, in training or at inference."""
        return torch.zeros((), device=call.x.device)

    def terms(self, call: Call, penalties: list[Tensor]) -> Terms:
        """The terms of the loss, given the penalties' sums a token."""
        raise NotImplementedError

    # ---- the two forms ----

    def select(self, call: Call) -> Selected:
        latents, pairs = self.latents(call), self.pairs(call)
        thresholds = self.thresholds(call, latents)
        n_latents = len(call.W_enc)
        limit = None if call.needs_codes else pair_limit(len(call.x), n_latents)
        try:
            h, idx, row_ptr = ops.encode_threshold(
                *call.encoder, thresholds=thresholds, limit=limit, **call.options
            )
        except TooManyPairs:
            return self._select_blocked(call, pairs, latents)
        values, penalties, frozen = pairs(
            h, *(ops.of_latents(v, idx, row_ptr, backend=call.backend) for v in latents)
        )
        codes = Codes(values, idx, n_latents, row_ptr)
        if not call.training:
            return Selected(codes)
        totals = [total(p, backend=call.backend) for p in penalties]
        terms = self._terms(call, totals)
        if frozen is not None and call.target is not None:
            sse = ops.reconstruction_error(
                frozen,
                idx,
                call.W_dec.detach(),
                None if call.b_dec is None else call.b_dec.detach(),
                call.target.detach(),
                row_ptr=row_ptr,
                reconstruct=False,
                backend=call.backend,
            )[0]
            terms["frozen_mse"] = (1.0, sse / max(call.target.numel(), 1))
        return Selected(codes, terms)

    def _select_blocked(
        self, call: Call, pairs: PairFunction, latents: tuple[Tensor, ...]
    ) -> Selected:
        found: Blocked = blocked(
            pairs, *call.encoder, call.W_dec, call.b_dec, latents, **call.options
        )
        terms = self._terms(call, list(found.totals)) if call.training else {}
        if found.frozen is not None and call.target is not None:
            error = found.frozen - call.target.detach()
            sse = total(error * error, backend=call.backend)
            terms["frozen_mse"] = (1.0, sse / max(call.target.numel(), 1))
        l0 = found.n_active / max(len(call.x), 1)
        return Selected(None, terms, Reconstruction(found.x_hat, l0, found.fired))

    def _terms(self, call: Call, totals: list[Tensor]) -> Terms:
        return self.terms(call, [t / max(len(call.x), 1) for t in totals])

    # ---- the coefficient ----

    def coefficient(self, call: Call, start: float) -> float | Tensor:
        """The penalty's coefficient now, given its value at the start."""
        value = start * (min(1.0, call.progress / self.warmup) if self.warmup else 1.0)
        if self.l0 is None:
            return value
        s = call.state
        return value * torch.exp(s.log_factor + 2 * s.excess)

    def observe(self, call: Call, selected: Selected) -> None:
        if self.l0 is None or not len(call.x) or call.progress < self.warmup:
            return
        if selected.codes is None:
            assert selected.reconstruction is not None
            l0 = selected.reconstruction.l0
        else:
            l0 = (selected.codes.vals != 0).sum() / len(call.x)
        self.steer(call.state, torch.log(l0 / self.l0).clamp(-1, 1))

    def steer(self, state: Any, excess: Tensor) -> None:
        """The controller's step, given log(L0 / l0) within ±1."""
        excess = excess.to(state.excess.dtype)
        state.log_factor += self.rate * excess.clamp(-0.5, 0.5)
        state.excess.lerp_(excess, 0.1)


@dataclass(frozen=True)
class JumpReLU(_PerPair, Selection):
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
    """

    name: ClassVar[str] = "jumprelu"
    l0_coef: float = 1e-3
    l0_target: float | None = None
    """Of the quadratic form, without a controller."""
    l0: float | None = None
    """Target of the controller; with it, l0_coef is where the coefficient starts."""
    loss: Literal["step", "tanh"] = "step"
    threshold: float = 2.0
    """What θ starts at."""
    bandwidth: float = 0.1
    tanh_scale: float = 4.0
    rate: float = 0.02
    """Of the controller."""
    warmup: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("l0_coef", self.l0_coef, 0)
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

    def steer(self, state: Any, excess: Tensor) -> None:
        super().steer(state, excess)
        state.log_threshold += 5 * self.rate * excess.to(state.log_threshold.dtype)

    def rescale_(self, state: Any, factor: float) -> None:
        state.log_threshold += math.log(factor)

    def restart_(self, state: Any, latents: Tensor) -> None:
        state.log_threshold[latents] = math.log(self.threshold)

    def fold_norms_(self, state: Any, norms: Tensor) -> None:
        state.log_threshold += norms.log()

    def inference_thresholds(self, state: Any, W_dec: Tensor) -> Tensor | None:
        return state.log_threshold.detach().exp()


@dataclass(frozen=True)
class Gated(_PerPair, Selection):
    """A gate and a magnitude for each latent (Rajamanoharan et al. 2024, 2404.16014).

        π = h = W_enc (x - b_dec) + b_gate      f = ReLU(exp(r_mag)·(h - b_gate) + b_mag)
        z = f where π > 0                       x̂_frozen = ReLU(π) W_dec + b_dec, both constant

    b_gate is the SAE's b_enc; r_mag and b_mag are parameters in the state. The loss has
    l1_coef·ΣReLU(π) and, as the term frozen_mse, the mse of x̂_frozen with coefficient 1.
    """

    name: ClassVar[str] = "gated"
    l1_coef: float = 1e-3
    l0: float | None = None
    """Target of the controller; with it, l1_coef is where the coefficient starts."""
    rate: float = 0.02
    """Of the controller."""
    warmup: float = 0.0

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


@dataclass(frozen=True)
class ReLU(_PerPair, Selection):
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
    l1_coef: float = 1e-3
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
