"""What an SAE is, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch

from fastsae import losses
from fastsae.selection import Selection, TopK

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class SAEConfig:
    """What an SAE is. ValueError where the values contradict each other."""

    d_in: int
    """Width of the activations, D."""
    d_sae: int
    """Number of latents, F."""
    selection: Selection = field(default_factory=lambda: TopK(32))
    """Which (token, latent) pairs survive."""
    d_out: int | None = None
    """Width of the target of a transcoder; None for an autoencoder, whose target is its input."""
    skip: bool = False
    """Whether a transcoder has a linear skip connection W_skip (D_out, D)."""
    apply_b_dec_to_input: bool | None = None
    """Whether b_dec is subtracted from the input; None: only an autoencoder's."""
    encoder_bias: bool = True
    """Whether there is a b_enc."""
    decoder_norm: Literal["unit", "free"] = "unit"
    """Rows of W_dec: kept at norm 1 with their gradient projected, or free."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    """Of the parameters; on a CPU, float16 and float64 run on the reference backend."""
    auxk: losses.AuxK = "dictionary_learning"
    """Whose AuxK loss on dead latents: see `fastsae.losses.auxk`."""
    auxk_coef: float = 1 / 32
    """Weight of the AuxK loss; 0 turns it off."""
    k_aux: int | None = None
    """Dead latents a token in the AuxK loss; None: d_in // 2."""
    dead_after: int = 10_000_000
    """A latent is dead when it has not fired for this many tokens."""
    multi_topk_coef: float = 0.0
    """Weight of the loss with 4k latents (Multi-TopK; Gao et al. 2024 use 1/8); 0 turns it off."""

    def __post_init__(self) -> None:
        if self.apply_b_dec_to_input is None:
            object.__setattr__(self, "apply_b_dec_to_input", self.d_out is None)
        for name in ("d_in", "d_sae", "d_out", "k_aux", "dead_after"):
            value = getattr(self, name)
            if value is None and name in ("d_out", "k_aux"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")
        if self.dead_after >= 2**62:
            raise ValueError(f"dead_after: expected fewer than 2**62 tokens, got {self.dead_after}")
        if self.d_sae >= 2**31:
            raise ValueError(f"d_sae: expected fewer than 2**31 latents, got {self.d_sae}")
        if not isinstance(self.selection, Selection):
            raise ValueError(f"selection: expected a Selection, got {self.selection!r}")
        self.selection.check(self.d_sae)
        for name in ("skip", "apply_b_dec_to_input", "encoder_bias"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.decoder_norm not in ("unit", "free"):
            raise ValueError(f"decoder_norm: expected unit or free, got {self.decoder_norm!r}")
        if self.auxk not in losses.AUXK:
            raise ValueError(f"auxk: expected one of {', '.join(losses.AUXK)}, got {self.auxk!r}")
        for name in ("auxk_coef", "multi_topk_coef"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name}: expected a finite number of at least 0, got {value!r}")
        if self.is_transcoder and self.apply_b_dec_to_input:
            raise ValueError("apply_b_dec_to_input: expected False with d_out, got True")
        if self.skip and not self.is_transcoder:
            raise ValueError("skip: expected d_out with it (a transcoder), got none")
        if self.is_transcoder and self.selection.needs_gradient:
            name = self.selection.name
            raise ValueError(f"selection: expected a rule without gradients with d_out, got {name}")
        if self.multi_topk_coef and not isinstance(self.selection, TopK):
            raise ValueError("multi_topk_coef: expected a TopK selection with it")

    @property
    def is_transcoder(self) -> bool:
        return self.d_out is not None

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain data for JSON."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**data, "selection": self.selection.to_dict()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SAEConfig:
        """The inverse of `to_dict`; ValueError for what it does not know or what is missing."""
        try:
            return cls(**{**data, "selection": Selection.from_dict(data["selection"])})
        except KeyError as error:
            raise ValueError(f"config: expected a field {error}, got none") from None
        except TypeError as error:
            raise ValueError(f"config: {error}") from None
