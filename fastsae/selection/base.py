"""What a selection rule is given, what it returns, and what rules share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastsae import ops
from fastsae.codes import Codes
from fastsae.sums import row_norms

if TYPE_CHECKING:
    from fastsae.sharding import Shards

Score = Literal["activation", "activation·decoder_norm"]


class State(nn.Module):
    """A rule's own tensors, saved with the weights: parameters it trains and what it tracks."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> State:
        """Follows to other devices, but to no narrower dtype, which averages would not bear."""

        def moved(t: Tensor) -> Tensor:
            new = fn(t)
            wide = torch.promote_types(new.dtype, t.dtype)
            return new if new.dtype == wide else t.to(new.device)

        return super()._apply(moved, recurse)


Terms = dict[str, tuple[float | Tensor, Tensor]]
"""name → (coefficient, 0-d value)."""


@dataclass(eq=False)
class Call:
    """What a rule works on: N tokens and the SAE's parameters."""

    x: Tensor
    """(N, D), scaled, not centred; float32 or float64."""
    W_enc: Tensor
    b_enc: Tensor | None
    pre_bias: Tensor | None
    """Subtracted from x before the encoder, or None."""
    W_dec: Tensor
    state: Any
    """The rule's `State`."""
    b_dec: Tensor | None = None
    target: Tensor | None = None
    """(N, D_out): what is to be reconstructed; None outside of training."""
    gradient: Tensor | None = None
    """(N, D): the gradient of a language model's loss at x, where the data have it."""
    training: bool = False
    progress: float = 1.0
    """Share of the training steps done, for schedules."""
    needs_codes: bool = False
    """Whether the codes are wanted however many they are."""
    shards: Shards | None = None
    """Where W_enc is one shard of the latents: what agrees with the others, for rules that are
    `sharded`. N is then the number of tokens of this rank."""
    precision: ops.Precision = "screened"
    backend: str | None = None

    @property
    def encoder(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        return self.x, self.W_enc, self.b_enc, self.pre_bias

    @property
    def options(self) -> dict[str, Any]:
        return {"precision": self.precision, "backend": self.backend}


class Reconstruction(NamedTuple):
    """What a rule that keeps no codes made of a batch: dense by nature, or above 5 % density."""

    x_hat: Tensor
    """(N, D_out), with b_dec."""
    l0: Tensor
    """0-d: the mean number of active latents a token."""
    firing_counts: Tensor
    """(F) integers: in how many tokens each latent is active."""


class Selected(NamedTuple):
    """A rule's result: codes, or a reconstruction without codes, and the terms of its loss."""

    codes: Codes | None
    terms: Terms = {}  # noqa: RUF012 (never written to)
    reconstruction: Reconstruction | None = None
    own: Tensor | None = None
    """What `select` hands to the rule's other methods, so that it is made once a step."""


@dataclass(frozen=True)
class Selection:
    """The interface of a selection rule."""

    name: ClassVar[str]
    rules: ClassVar[dict[str, type[Selection]]] = {}
    has_inference_form: ClassVar[bool] = False
    """Whether `select` chooses by another rule outside of training."""
    needs_gradient: ClassVar[bool] = False
    """Whether training needs Call.gradient."""
    sharded: ClassVar[bool] = False
    """Whether `select` and `observe` look at Call.shards."""
    k_name: ClassVar[str | None] = "k"
    """Which parameter says how many latents a token has; None where none does."""

    def __init_subclass__(cls) -> None:
        name = cls.__dict__.get("name")
        if not isinstance(name, str):
            raise TypeError(f"{cls.__name__}: expected a name of its own, got {name!r}")
        known = Selection.rules.get(name, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(f"{cls.__name__}: expected a new name, got that of {known}: {name!r}")
        Selection.rules[name] = cls

    def check(self, d_sae: int) -> None:
        """Raises ValueError where the rule cannot work on d_sae latents."""

    def state(self, d_in: int, d_sae: int) -> dict[str, Tensor]:
        """The rule's tensors at the start; nn.Parameters are trained."""
        return {}

    def start_(self, call: Call) -> None:
        """Adapts call.state and call.b_enc to a sample of tokens before training starts."""

    def select(self, call: Call) -> Selected:
        """The codes of the tokens, differentiable in them and the encoder's parameters.

        Leaves call.state as it is. With call.training the form that is trained, else the form of
        inference, which looks at each token by itself.
        """
        raise NotImplementedError

    def observe(self, call: Call, selected: Selected) -> None:
        """Updates call.state after `select` in a training step; without gradients."""

    def revivable(self, call: Call, selected: Selected, is_dead: Tensor) -> Tensor:
        """(F) bool: the latents that the AuxK loss is to revive, given those that are dead."""
        return is_dead

    def dead_terms(self, call: Call, is_dead: Tensor) -> Terms:
        """More terms of the loss, given the latents (F) that are dead after this batch."""
        return {}

    def restart_(self, state: Any, latents: Tensor) -> None:
        """Sets back what the state holds of these latents (ids), which start anew."""

    def parts(self, codes: Codes) -> list[tuple[float, Codes]] | None:
        """For losses on nested prefixes of the codes: what each prefix adds, and its weight."""
        return None

    def rescale_(self, state: Any, factor: float) -> None:
        """Adapts the state to activations that are `factor` times as large."""

    def fold_norms_(self, state: Any, norms: Tensor) -> None:
        """Adapts the state to rows of W_enc and biases multiplied with norms (F), W_dec divided.

        ValueError where that would change what is selected.
        """
        raise ValueError(f"{self.name}: folding the decoder's norms would change the selection")

    def inference_thresholds(self, state: Any, W_dec: Tensor) -> Tensor | None:
        """What h must exceed at inference, (F) or 0-d; None where a pair's fate is not its own."""
        return None

    def to_dict(self) -> dict[str, Any]:
        """The rule as plain data: its name and parameters."""
        return {"name": self.name, **asdict(self)}

    @staticmethod
    def named(name: Any) -> type[Selection]:
        """The rule of that name; ValueError where there is none."""
        if name not in Selection.rules:
            raise ValueError(
                f"selection: expected one of {', '.join(sorted(Selection.rules))}, got {name!r}"
            )
        return Selection.rules[name]

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Selection:
        """The inverse of `to_dict`; ValueError for an unknown name or parameter."""
        if not isinstance(data, dict):
            raise ValueError(f"selection: expected a name and parameters, got {data!r}")
        parameters = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        name = parameters.pop("name", None)
        rule = Selection.named(name)
        try:
            return rule(**parameters)
        except TypeError as error:
            raise ValueError(f"selection {name}: {error}") from None


# ---- what rules share ----


def check_k(k: Any, name: str = "k") -> None:
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise ValueError(f"{name}: expected an integer of at least 1, got {k!r}")


def check_number(name: str, value: Any, low: float, high: float = math.inf) -> None:
    """ValueError unless value is a number in [low, high]; inf is none."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or math.isinf(value):
        limit = f"in [{low}, {high}]" if high < math.inf else f"of at least {low}"
        raise ValueError(f"{name}: expected a number {limit}, got {value!r}")


def check_decay(decay: Any) -> None:
    check_number("decay", decay, 0, 1)
    if decay == 1:
        raise ValueError("decay: expected a number below 1, got 1")


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected True or False, got {value!r}")


def check_score(score: str) -> None:
    if score not in ("activation", "activation·decoder_norm"):
        raise ValueError(f"score: expected activation or activation·decoder_norm, got {score!r}")


def fold_weighted(rule: str, score: str) -> None:
    """A score that is weighted by the decoder's norms does not see them move to the encoder."""
    if score == "activation":
        raise ValueError(
            f"{rule}: expected score activation·decoder_norm, got activation: folding the "
            "decoder's norms would change the selection"
        )


def score_scale(call: Call, score: str) -> Tensor | None:
    """What the scores of this name are weighted with (F), or None."""
    return None if score == "activation" else row_norms(call.W_dec.detach())


def follow_(total: Tensor, value: Tensor, rate: Tensor) -> None:
    """total moves to the value by the share `rate` of the way; a rate of 0 leaves it."""
    total.mul_(1 - rate).add_(rate * value)


def average_(total: Tensor, weight: Tensor, value: Tensor, decay: float, seen: Tensor) -> None:
    """total/weight becomes the exponential average of the values where `seen`, from the first."""
    rate = (1 - decay) * seen
    follow_(total, value.where(seen, 0), rate)
    follow_(weight, torch.ones_like(weight), rate)


def latent_sums(coef: Tensor, codes: Codes, backend: str | None) -> Tensor:
    """`ops.latent_sums` of codes."""
    return ops.latent_sums(coef, codes.idx, codes.n_latents, codes.row_ptr, backend=backend)
