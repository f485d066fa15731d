"""What an SAE is and how it is trained, as plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch

from fastsae import losses
from fastsae.files import read_json
from fastsae.moments import STATES, State
from fastsae.order import POOL_ROWS
from fastsae.selection import Selection, TopK

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
B_DEC_STARTS = ("geometric_median", "mean", "zero")
OPTIMIZERS = ("adam", "adam-lazy", "torch-adam")


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

    @classmethod
    def read(cls, path: Path) -> SAEConfig:
        """The configuration in a JSON file. ValueError names the file and what is wrong with it."""
        data = read_json(path)
        try:
            return cls.from_dict(data)
        except (ValueError, AttributeError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from None


@dataclass(frozen=True)
class TrainConfig:
    """How an SAE is trained."""

    steps: int = 1000
    """Number of optimiser steps."""
    batch_size: int = 1024
    """Tokens a step."""
    lr: float | None = None
    """Peak learning rate of Adam; None: 2e-4 / sqrt(d_sae / 16384), as in Gao et al. 2024."""
    warmup_steps: int | None = None
    """Steps over which the learning rate rises linearly from 0; None: steps / 10, at most 1000."""
    decay_fraction: float = 0.2
    """Share of the steps, the last ones, over which it falls to 0."""
    decay: Literal["linear", "cosine"] = "linear"
    """How it falls: on a line, or on half a wave of a cosine."""
    accumulate: int = 1
    """Parts that a batch is cut into, one after the other, for less memory; a budget of the batch
    is one of each part."""
    optimizer: Literal["adam", "adam-lazy", "torch-adam"] = "adam"
    """adam: exact, on gradient rows; adam-lazy: touched rows only; torch-adam: torch's own."""
    state: State = "float32"
    """Adam's moments of matrices: float32 (float64 of such weights), bfloat16, or int8 codes."""
    beta1: float = 0.9
    """Adam's decay of the mean gradient."""
    beta2: float = 0.999
    """Adam's decay of the mean squared gradient."""
    eps: float = 6.25e-10
    """Added to Adam's denominator (the gradient of a mean over tokens and width is small)."""
    clip: float | None = None
    """Largest global gradient norm; None: no clipping."""
    seed: int = 0
    """Of the order of the data; on the command line also of the initial weights."""
    shuffle_block: int = 1
    """Consecutive rows that are read together. 1: rows are shuffled one by one. Above, for files
    that memory cannot hold: blocks of so many rows are, then the rows of every 65,536 or so."""
    scale: bool = True
    """Scale the activations to a mean variance of 1 a coordinate (measured on init_rows rows)."""
    b_dec: Literal["geometric_median", "mean", "zero"] = "geometric_median"
    """Where b_dec starts."""
    fit_encoder: bool = False
    """Scale the encoder at the start so that its codes reconstruct init_rows best: very wide
    dictionaries start far too long without (`fastsae.SAE.initialize_from_`)."""
    init_rows: int = 8192
    """Training rows that the scale, b_dec and the encoder's scale are measured on."""
    resample_every: int | None = None
    """Steps between new starts of dead latents where the error is large; None: never."""
    ema: float | None = None
    """Decay of a moving average of the weights, which then is what is evaluated and saved at the
    end; None: no average."""
    log_every: int = 50
    """Steps between lines of log.jsonl."""
    eval_every: int | None = None
    """Steps between evaluations on held-out rows; None: a tenth of the steps."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; there is one at the end, too."""
    keep: int = 2
    """Checkpoints that are kept, the newest ones."""
    wandb: str | None = None
    """Project of Weights & Biases that the log goes to as well; None: none."""

    def __post_init__(self) -> None:
        optional = ("warmup_steps", "resample_every", "eval_every")
        counts = ("steps", "batch_size", "accumulate", "init_rows", "seed", "shuffle_block")
        for name in (*counts, "log_every", "checkpoint_every", "keep", *optional):
            value, least = getattr(self, name), 0 if name in ("seed", "warmup_steps") else 1
            if value is None and name in optional:
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"{name}: expected an integer, got {value!r}")
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        for name in ("lr", "clip"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}: expected a finite number above 0, got {value}")
        for name in ("beta1", "beta2", "ema"):
            value = getattr(self, name)
            if not (value is None and name == "ema") and not 0 <= value < 1:
                raise ValueError(f"{name}: expected a number in [0, 1), got {value}")
        if self.shuffle_block > POOL_ROWS:
            raise ValueError(
                f"shuffle_block: expected at most {POOL_ROWS}, got {self.shuffle_block}"
            )
        if self.accumulate > self.batch_size:
            raise ValueError(
                f"accumulate: expected at most batch_size {self.batch_size}, got {self.accumulate}"
            )
        if self.decay not in ("linear", "cosine"):
            raise ValueError(f"decay: expected linear or cosine, got {self.decay!r}")
        if not 0 < self.eps < math.inf:
            raise ValueError(f"eps: expected a finite number above 0, got {self.eps}")
        if not 0 <= self.decay_fraction <= 1:
            raise ValueError(
                f"decay_fraction: expected a number in [0, 1], got {self.decay_fraction}"
            )
        if self.optimizer not in OPTIMIZERS:
            optimizers = ", ".join(OPTIMIZERS)
            raise ValueError(f"optimizer: expected one of {optimizers}, got {self.optimizer!r}")
        if self.state not in STATES:
            raise ValueError(f"state: expected one of {', '.join(STATES)}, got {self.state!r}")
        if self.state != "float32" and self.optimizer == "torch-adam":
            raise ValueError(f"state: expected float32 with torch-adam, got {self.state}")
        if self.b_dec not in B_DEC_STARTS:
            starts = ", ".join(B_DEC_STARTS)
            raise ValueError(f"b_dec: expected one of {starts}, got {self.b_dec!r}")

    def lr_factor(self, step: int) -> float:
        """What the peak learning rate is multiplied with at a step, counted from 0."""
        warmup = min(self.steps // 10, 1000) if self.warmup_steps is None else self.warmup_steps
        up = (step + 1) / warmup if step < warmup else 1.0
        decay = self.decay_fraction * self.steps
        down = (self.steps - step) / decay if self.steps - step < decay else 1.0
        if self.decay == "cosine":
            down = (1 - math.cos(math.pi * down)) / 2
        return min(up, down)
