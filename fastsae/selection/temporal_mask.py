"""Adaptive Temporal Masking: random masks over another rule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

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
from fastsae.selection.per_batch import BatchTopK
from fastsae.selection.per_token import TopK
from fastsae.sums import row_norms


def uniform(seed: int, step: Tensor, n: int) -> Tensor:
    """n numbers in [0, 1), a pure function of (seed, step, place): the same on every device.

    SplitMix64 (Steele, Lea & Flood 2014) of a counter; step is 0-d int64. float32.
    """
    z = torch.arange(n, device=step.device) + (step * n + seed * 0x632BE59BD9B4E019 % 2**62)
    z = (z + 1) * -0x61C8864680B583EB  # int64 arithmetic wraps around
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        z = (z ^ ((z >> shift) & ((1 << 64 - shift) - 1))) * factor
    z = z ^ ((z >> 31) & ((1 << 33) - 1))
    return ((z >> 40) & ((1 << 24) - 1)).float() * 2.0**-24


@dataclass(frozen=True)
class TemporalMask(Selection):
    """Masks unimportant latents at random, then selects among the others (2510.08855).

    Adaptive Temporal Masking, Li & Ren 2025; our reading ("ATM-style"). A latent's importance I is
    the cube root of the product of three exponential averages, each divided by its mean over the
    latents: of its mean positive value, its firing rate, and its mean squared value times
    ‖W_dec[i]‖². With θ = mean + spread·(standard deviation) of I, a latent with I < θ is masked in
    a step with probability 1 - exp(-rate·(θ - I)/θ); that is always less than 1, and a masked
    latent's averages stand still, so it can come back. No mask in the first `warmup` of the
    training, nor at inference. base selects: topk or batchtopk.
    """

    name: ClassVar[str] = "temporal-mask"
    k: int
    base: Literal["topk", "batchtopk"] = "topk"
    rate: float = 0.1
    spread: float = 0.0
    warmup: float = 0.1
    decay: float = 0.99
    seed: int = 0

    def __post_init__(self) -> None:
        check_k(self.k)
        if self.base not in ("topk", "batchtopk"):
            raise ValueError(f"base: expected topk or batchtopk, got {self.base!r}")
        for name, high in (("rate", math.inf), ("warmup", 1)):
            check_number(name, getattr(self, name), 0, high)
        check_number("spread", self.spread, -1e6, 1e6)
        check_number("seed", self.seed, 0, 2**31)
        if not isinstance(self.seed, int):
            raise ValueError(f"seed: expected an integer, got {self.seed!r}")
        check_decay(self.decay)

    @property
    def _base(self) -> TopK | BatchTopK:
        return TopK(self.k) if self.base == "topk" else BatchTopK(self.k)

    def check(self, d_sae: int) -> None:
        self._base.check(d_sae)

    def state(self, d_in: int, d_sae: int) -> dict[str, Tensor]:
        averages = {name: torch.zeros(d_sae) for name in ("value", "fired", "energy", "weight")}
        step = torch.zeros((), dtype=torch.int64)
        return {**self._base.state(d_in, d_sae), **averages, "step": step}

    def unmasked(self, call: Call) -> Tensor:
        """(F) float32: 1, or 0 where a latent is masked in this step."""
        s = call.state
        if not call.training or call.progress < self.warmup:
            return torch.ones_like(s.weight)
        importance = torch.ones_like(s.weight)
        for total in (s.value, s.fired, s.energy):
            average = (total / s.weight).where(s.weight > 0, 0)
            mean = average.mean()
            importance = importance * (average / mean).where(mean > 0, 0)
        importance = importance.pow(1 / 3)
        theta = importance.mean() + self.spread * importance.std(correction=0)
        share = ((theta - importance) / theta).where((theta > 0) & (importance < theta), 0)
        masked = uniform(self.seed, s.step, len(importance)) < 1 - torch.exp(-self.rate * share)
        return (~masked).float()

    def select(self, call: Call) -> Selected:
        if not call.training:
            return self._base.select(call)
        k, unmasked = self.k, self.unmasked(call)
        n_latents = len(call.W_enc)
        if self.base == "topk":
            vals, idx = ops.encode(*call.encoder, k=k, scale=unmasked, **call.options)
            return Selected(Codes(vals, idx, n_latents), own=unmasked)
        vals, idx, row_ptr = ops.encode_batch(
            *call.encoder, budget=k * len(call.x), scale=unmasked, **call.options
        )
        return Selected(Codes(vals, idx, n_latents, row_ptr), own=unmasked)

    def observe(self, call: Call, selected: Selected) -> None:
        codes, s, unmasked = selected.codes, call.state, selected.own
        assert codes is not None and unmasked is not None
        self._base.observe(call, selected)
        vals = codes.vals.float()
        fired = latent_sums((codes.idx >= 0).float(), codes, call.backend)
        squares = latent_sums(vals * vals, codes, call.backend)
        norms = row_norms(call.W_dec.detach())
        n = max(codes.n_tokens, 1)
        value = latent_sums(vals, codes, call.backend) / fired.clamp(min=1)
        rate = (1 - self.decay) * unmasked
        for total, average in (
            (s.value, value),
            (s.fired, fired / n),
            (s.energy, squares / n * norms * norms),
            (s.weight, torch.ones_like(s.weight)),
        ):
            follow_(total, average, rate)
        s.step += 1

    def inference_thresholds(self, state: Any, W_dec: Tensor) -> Tensor | None:
        return self._base.inference_thresholds(state, W_dec)

    def restart_(self, state: Any, latents: Tensor) -> None:
        for tensor in (state.value, state.fired, state.energy, state.weight):
            tensor[latents] = 0

    def rescale_(self, state: Any, factor: float) -> None:
        self._base.rescale_(state, factor)
        state.value *= factor
        state.energy *= factor * factor
