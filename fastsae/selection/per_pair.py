"""What the rules share that decide each pair by itself: a penalty instead of a budget.

A rule is an elementwise function of h and of some vectors (F), and thresholds: pairs with h at or
below theirs contribute to no value, loss or gradient. Training keeps the pairs above them, and
inference the active ones, where these are at most 5 % (and 2²²); else none (`fastsae.blocked`),
unless the codes are what is asked for. Gradients reach W_enc, b_enc, pre_bias, W_dec and the
rule's own parameters alike.

Coefficients  The SAE's loss is the mse, a mean over tokens and width; a penalty here is a sum over
    latents, averaged over the tokens. Published coefficients stand beside a squared error that is
    summed over the width: divide them by D (D_out of a transcoder).
Start  With `l0` training starts with about start·l0 active latents a token (ours): a bias, or
    JumpReLU's thresholds, is set to what that many pairs of a sample of tokens exceed. At start 0
    biases start at 0, as published: half of all pairs are active, nearly all of a short run goes by
    in the blocked form, and the coefficient that ends it shrinks what was learned.
Warm-up  The coefficient rises linearly over the first `warmup` share of the training.
Controller  With `l0` the coefficient is multiplied by exp(a + 2s), which steers the mean L0 there.
    Of e = log(L0 / l0), each batch after the warm-up adds rate·e, e within ±1/2, to a, and s
    averages e, within ±1, over about 10 batches. A state of the rule; nothing waits for it. It must
    arrive before the learning rate decays, as L0 then stands still.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fastsae import ops
from fastsae.blocked import Blocked, PairFunction, blocked
from fastsae.codes import Codes
from fastsae.reference import TooManyPairs
from fastsae.selection.base import Call, Reconstruction, Selected, Terms, check_number
from fastsae.sums import total

MAX_PAIRS = 2**22
"""How many pairs are kept at once, at about 100 bytes each."""


def pair_limit(n_tokens: int, n_latents: int) -> int:
    """How many pairs a training step keeps."""
    return min(n_tokens * n_latents // 20, MAX_PAIRS)


class PerPair:
    """What the rules share; see above."""

    k_name: ClassVar[str | None] = "l0"
    l0: float | None
    rate: float
    warmup: float
    start: float

    def __post_init__(self) -> None:
        if self.l0 is not None:
            check_number("l0", self.l0, 1e-3)
        check_number("rate", self.rate, 0, 1)
        check_number("warmup", self.warmup, 0, 1)
        check_number("start", self.start, 0)

    def check(self, d_sae: int) -> None:
        if self.l0 is not None and self.l0 > d_sae:
            raise ValueError(f"l0: expected at most d_sae = {d_sae}, got {self.l0}")

    def state(self, d_in: int, d_sae: int) -> dict[str, Tensor]:
        return {} if self.l0 is None else {"log_factor": torch.zeros(()), "excess": torch.zeros(())}

    def start_(self, call: Call) -> None:
        if self.l0 is None or not self.start:
            return
        per_token = self.start * self.l0
        x = call.x[: max(1, int(MAX_PAIRS / per_token))]
        budget = round(per_token * len(x))
        h, idx, _ = ops.encode_batch(
            x, call.W_enc, None, call.pre_bias, budget=budget, **call.options
        )
        if bool((idx >= 0).any()):
            self.exceed_(call, h.where(idx >= 0, torch.inf).min())

    # ---- what a rule defines ----

    def exceed_(self, call: Call, threshold: Tensor) -> None:
        """Makes the pairs active whose <x - pre_bias, W_enc[i]> exceeds the threshold (0-d)."""
        if call.b_enc is not None:
            call.b_enc.fill_(-threshold)

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
        l0 = found.firing_counts.sum() / max(len(call.x), 1)
        return Selected(None, terms, Reconstruction(found.x_hat, l0, found.firing_counts))

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
