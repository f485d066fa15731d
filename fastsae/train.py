"""The trainer: one loop over batches of activations.

A step is: forward (centring, encode, decode, losses, dead tracking) → backward → project the
decoder's gradient → clip → Adam → unit rows. Everything else here is bookkeeping around it.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from fastsae import metrics, ops
from fastsae.data import Batch, Batches, Source, in_order
from fastsae.optim import Adam
from fastsae.resample import resample_dead_
from fastsae.sae import B_DEC_STARTS, SAE, SAEOutput

OPTIMIZERS = ("adam", "adam-lazy", "torch-adam")


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
    """Share of the steps, the last ones, over which it falls linearly to 0."""
    optimizer: Literal["adam", "adam-lazy", "torch-adam"] = "adam"
    """adam: exact, on gradient rows; adam-lazy: touched rows only; torch-adam: torch's own."""
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
    scale: bool = True
    """Scale the activations to a mean variance of 1 a coordinate (measured on init_rows rows)."""
    b_dec: Literal["geometric_median", "mean", "zero"] = "geometric_median"
    """Where b_dec starts."""
    init_rows: int = 8192
    """Training rows that the scale and b_dec are measured on."""
    resample_every: int | None = None
    """Steps between new starts of dead latents where the error is large; None: never."""
    log_every: int = 50
    """Steps between lines of log.jsonl."""

    def __post_init__(self) -> None:
        optional = ("warmup_steps", "resample_every")
        for name in ("steps", "batch_size", "init_rows", "log_every", "seed", *optional):
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
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a number in [0, 1), got {getattr(self, name)}")
        if not 0 < self.eps < math.inf:
            raise ValueError(f"eps: expected a finite number above 0, got {self.eps}")
        if not 0 <= self.decay_fraction <= 1:
            raise ValueError(
                f"decay_fraction: expected a number in [0, 1], got {self.decay_fraction}"
            )
        if self.optimizer not in OPTIMIZERS:
            optimizers = ", ".join(OPTIMIZERS)
            raise ValueError(f"optimizer: expected one of {optimizers}, got {self.optimizer!r}")
        if self.b_dec not in B_DEC_STARTS:
            starts = ", ".join(B_DEC_STARTS)
            raise ValueError(f"b_dec: expected one of {starts}, got {self.b_dec!r}")

    def lr_factor(self, step: int) -> float:
        """What the peak learning rate is multiplied with at a step, counted from 0."""
        warmup = min(self.steps // 10, 1000) if self.warmup_steps is None else self.warmup_steps
        up = (step + 1) / warmup if step < warmup else 1.0
        decay = self.decay_fraction * self.steps
        down = (self.steps - step) / decay if self.steps - step < decay else 1.0
        return min(up, down)


class Trainer:
    """Trains an SAE on a source of activations.

    With `out`, log.jsonl grows there line by line and the weights are saved at the end.
    """

    def __init__(
        self, sae: SAE, source: Source, config: TrainConfig, *, out: str | Path | None = None
    ) -> None:
        _check_widths(sae, source)
        self.sae, self.source, self.config = sae, source, config
        self.out = None if out is None else Path(out)
        self.lr = config.lr or 2e-4 / math.sqrt(sae.config.d_sae / 2**14)
        betas = (config.beta1, config.beta2)
        self.optimizer: torch.optim.Optimizer
        if config.optimizer == "torch-adam":
            self.optimizer = torch.optim.Adam(
                sae.parameters(), lr=self.lr, betas=betas, eps=config.eps, fused=True
            )
        else:
            self.optimizer = Adam(
                sae.parameters(),
                lr=self.lr,
                betas=betas,
                eps=config.eps,
                lazy=config.optimizer == "adam-lazy",
                clip=config.clip,
                unit_rows=[sae.W_dec] if sae.config.decoder_norm == "unit" else [],
                backend=sae.backend,
            )
        # On a GPU a step does not wait: a loss that is not finite writes nothing, and is raised at
        # the next line of the log.
        self.on_device = self.engine()["backend"] == "triton" and isinstance(self.optimizer, Adam)
        self.all_finite = torch.ones((), dtype=torch.bool, device=sae.W_dec.device)
        self.step_count = 0

    def initialize(self) -> None:
        """Measures scale and b_dec on the first training rows in their shuffled order."""
        n = min(self.config.init_rows, self.source.n_rows)
        x, target, _ = next(Batches(self.source, n, self.config.seed))
        sae = self.sae
        device = sae.W_dec.device
        target = None if target is None else target.to(device)
        sae.initialize_from_(x.to(device), target, scale=self.config.scale, b_dec=self.config.b_dec)

    def step(self, batch: Batch) -> SAEOutput:
        """One optimiser step; returns what the SAE made of the batch before it."""
        sae, optimizer = self.sae, self.optimizer
        sae.train()
        device = sae.W_dec.device
        x, target, gradient = (None if t is None else t.to(device) for t in batch)
        assert x is not None
        sae.progress = min(1.0, self.step_count / self.config.steps)
        optimizer.zero_grad()
        try:
            output = sae.losses(x, target, gradient)
        except ValueError as error:  # a source has finite rows, so it is the weights
            if "finite" not in str(error):
                raise
            raise FloatingPointError(self._diverged(str(error))) from error
        finite = output.loss.detach().isfinite()
        if not self.on_device and not bool(finite):  # a bad step writes nothing
            raise FloatingPointError(
                self._diverged(f"expected a finite loss, got {float(output.loss.detach())}")
            )
        self.all_finite &= finite
        output.loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = self.lr * self.config.lr_factor(self.step_count)
        if isinstance(optimizer, Adam):  # projects, clips and normalises itself
            optimizer.step(valid=finite if self.on_device else None)
        else:
            sae.project_decoder_gradient_()
            if self.config.clip is not None:
                torch.nn.utils.clip_grad_norm_(sae.parameters(), self.config.clip)
            optimizer.step()
            sae.normalize_decoder_()
        self.step_count += 1
        every = self.config.resample_every
        if every and self.step_count % every == 0:
            resample_dead_(sae, optimizer, x, target, seed=self.config.seed + self.step_count)
        return output

    def run(
        self, *, progress: bool = True, on_step: Callable[[int, SAEOutput], None] | None = None
    ) -> dict[str, float]:
        """Initialises, trains config.steps steps and returns train_seconds and tokens_per_s."""
        start = time.perf_counter()
        log = None
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
            log = (self.out / "log.jsonl").open("a" if self.step_count else "w")
            settings = {"sae": self.sae.config.to_dict(), "train": asdict(self.config)}
            log.write(json.dumps({"config": settings, "engine": self.engine()}) + "\n")
        try:
            if self.step_count == 0:
                self.initialize()
            first_step = self.step_count
            start_row = self.step_count * self.config.batch_size
            batches = Batches(self.source, self.config.batch_size, self.config.seed, start_row)
            with tqdm(
                total=self.config.steps,
                initial=first_step,
                disable=None if progress else True,
                unit="step",
            ) as bar:
                while self.step_count < self.config.steps:
                    output = self.step(next(batches))
                    if on_step is not None:
                        on_step(self.step_count, output)
                    bar.update()
                    if (
                        self.step_count % self.config.log_every
                        and self.step_count < self.config.steps
                    ):
                        continue
                    if not bool(self.all_finite):
                        raise FloatingPointError(self._diverged("expected finite losses so far"))
                    line = self._log_line(output, time.perf_counter() - start)
                    bar.set_postfix(loss=f"{line['loss']:.4f}", dead=line["n_dead"])
                    if log is not None:
                        log.write(json.dumps(line) + "\n")
                        log.flush()
        finally:
            if log is not None:
                log.close()
        self.sae.progress = min(1.0, self.step_count / self.config.steps)
        seconds = time.perf_counter() - start
        for name, p in self.sae.named_parameters():  # what the last update wrote is in no loss
            # In blocks: isfinite makes temporary copies of what it looks at.
            if not all(bool(torch.isfinite(rows).all()) for rows in p.split(1 << 14)):
                raise FloatingPointError(self._diverged(f"expected a finite {name}"))
        if self.out is not None:
            self.sae.save(self.out)
        self.sae.eval()
        tokens = (self.step_count - first_step) * self.config.batch_size
        return {"train_seconds": seconds, "tokens_per_s": tokens / seconds}

    def engine(self) -> dict[str, str]:
        """What runs the steps: the backend, and whether W_enc and W_dec have gradient matrices."""
        rows = isinstance(self.optimizer, Adam)
        return {
            "backend": self.sae.backend or ops.choose_backend(*self.sae.parameters()),
            "gradients": "rows, summed in the update" if rows else "dense",
        }

    def _diverged(self, what: str) -> str:
        return f"step {self.step_count}: {what}; a lower learning rate usually helps"

    def _log_line(self, output: SAEOutput, seconds: float) -> dict[str, Any]:
        tokens = self.step_count * self.config.batch_size
        return {
            "step": self.step_count,
            "tokens": tokens,
            "seconds": round(seconds, 3),
            "lr": self.optimizer.param_groups[0]["lr"],
            "loss": float(output.loss.detach()),
            **{name: float(value.detach()) for name, value in output.losses.items()},
            "l0": float(output.metrics["l0"]),
            "n_dead": int(output.metrics["n_dead"]),
            "tokens_per_s": tokens / seconds,
        }


def _check_widths(sae: SAE, source: Source) -> None:
    if source.d_in != sae.config.d_in:
        raise ValueError(f"{source.name}: expected width {sae.config.d_in}, got {source.d_in}")
    d_out = None if source.target is None else source.d_out
    if d_out != sae.config.d_out:
        raise ValueError(
            f"{source.name}: expected targets of width {sae.config.d_out}, got {d_out}"
        )


@torch.no_grad()
def evaluate(sae: SAE, source: Source, batch_size: int = 4096) -> dict[str, float]:
    """One pass over a source: fvu, explained_variance, l0 and dead_share.

    fvu = Σ‖e‖² / Σ‖y - ȳ‖² over all rows (y = x, or a transcoder's target), explained_variance = 1
    - fvu, l0 the mean number of active latents a row, dead_share the share of latents that no row
    activates. All in the selection rule's form of inference; where that is another one than it is
    trained in, training_fvu and training_l0 are those of the latter, on batches of batch_size.
    """
    _check_widths(sae, source)
    was_training = sae.training
    sae.eval()
    rule = sae.config.selection
    two_forms = rule.has_inference_form and not (rule.needs_gradient and source.gradient is None)
    fvu, training_fvu = metrics.FVU(), metrics.FVU()
    fired = torch.zeros(sae.config.d_sae, dtype=torch.bool, device=sae.W_dec.device)
    active = training_active = 0.0
    try:
        for batch in in_order(source, batch_size):
            x, target, gradient = (None if t is None else t.to(fired.device) for t in batch)
            assert x is not None
            y = x if target is None else target
            output = sae.losses(x, target, reconstruct=True)
            assert output.reconstruction is not None
            fvu.update(y, output.reconstruction)
            fired |= output.fired
            active += float(output.metrics["l0"]) * len(x)
            if two_forms:
                codes = sae.encode(x, gradient, training=True)
                training_fvu.update(y, sae.decode(codes, x))
                training_active += int((codes.vals != 0).sum())
    finally:
        sae.train(was_training)
    figures = {
        "fvu": fvu.value,
        "explained_variance": fvu.explained_variance,
        "l0": active / source.n_rows,
        "dead_share": metrics.dead_share(fired.int()),
    }
    if two_forms:
        figures["training_fvu"] = training_fvu.value
        figures["training_l0"] = training_active / source.n_rows
    return figures
