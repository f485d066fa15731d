"""Selection rules: which (token, latent) pairs survive.

A rule is a small frozen dataclass. It turns tokens and encoder parameters into :class:`Codes`
through the streaming ops, so no rule sees an N×F matrix. To add one, subclass `Selection`, give it
a `name`, and it can be used wherever a rule is: in SAEConfig, on disk and on the command line.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from fastsae import ops
from fastsae.codes import Codes


@dataclass(frozen=True)
class Selection:
    """The interface of a selection rule."""

    name: ClassVar[str]
    rules: ClassVar[dict[str, type[Selection]]] = {}

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

    def encode(
        self,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor | None,
        pre_bias: Tensor | None,
        *,
        precision: ops.Precision = "screened",
        backend: str | None = None,
    ) -> Codes:
        """The codes of the tokens x (N, D), differentiable in all four inputs."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """The rule as plain data: its name and parameters."""
        return {"name": self.name, **asdict(self)}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Selection:
        """The inverse of `to_dict`; ValueError for an unknown name or parameter."""
        parameters = dict(data)
        name = parameters.pop("name", None)
        if name not in Selection.rules:
            raise ValueError(
                f"selection: expected one of {', '.join(sorted(Selection.rules))}, got {name!r}"
            )
        try:
            return Selection.rules[name](**parameters)
        except TypeError as error:
            raise ValueError(f"selection {name}: {error}") from None


@dataclass(frozen=True)
class TopK(Selection):
    """The k largest positive pre-activations of each token (Gao et al. 2024, arXiv 2406.04093).

    The value is ReLU(h). Fewer than k are kept where fewer are positive.
    """

    name: ClassVar[str] = "topk"
    k: int

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or isinstance(self.k, bool) or self.k < 1:
            raise ValueError(f"k: expected an integer of at least 1, got {self.k!r}")

    def check(self, d_sae: int) -> None:
        if self.k > d_sae:
            raise ValueError(f"k: expected at most d_sae = {d_sae}, got {self.k}")

    def encode(
        self,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor | None,
        pre_bias: Tensor | None,
        *,
        precision: ops.Precision = "screened",
        backend: str | None = None,
    ) -> Codes:
        vals, idx = ops.encode(
            x, W_enc, b_enc, pre_bias, k=self.k, precision=precision, backend=backend
        )
        return Codes(vals, idx, len(W_enc))

    def widened(self, factor: int, d_sae: int) -> TopK:
        """The rule with `factor` times as many latents a token, at most d_sae."""
        return replace(self, k=min(factor * self.k, d_sae))
