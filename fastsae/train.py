"""The trainer: one loop over batches of activations.

A step is: forward (centring, encode, decode, losses, dead tracking) → backward → project the
decoder's gradient → clip → Adam → unit rows. Everything else here is bookkeeping around it.

A run that stops for whatever reason goes on from its newest checkpoint to the same bits as if it
had not stopped (`fastsae.checkpoint`): all randomness is a function of the seed and the step.
"""

from __future__ import annotations

import contextlib
import functools
import math
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from fastsae import checkpoint, metrics, ops
from fastsae.batches import Batch, Batches
from fastsae.config import TrainConfig
from fastsae.data import Source, in_order
from fastsae.ema import EMA
from fastsae.files import alone
from fastsae.iterable import IterableSource
from fastsae.log import RunLog
from fastsae.optim import Adam
from fastsae.reference import NotFinite
from fastsae.resample import resample_dead_
from fastsae.sae import BY_LATENT, SAE, SAEOutput
from fastsae.sharding import Shards

__all__ = ["Draw", "TrainConfig", "Trainer", "evaluate", "stop_requests"]

Draw = Callable[..., Batches | Generator[Batch, None, None]]
"""Gives the batches of `Source.batches` and `IterableSource.batches`, and takes what these take."""


def drawn(source: Source | IterableSource, config: TrainConfig) -> Draw:
    """What gives a training its batches. ValueError: shuffle_block is not 1 with an iterable."""
    if isinstance(source, Source):
        return functools.partial(source.batches, block=config.shuffle_block)
    if config.shuffle_block != 1:
        raise ValueError(f"shuffle_block: expected 1 with an iterable, got {config.shuffle_block}")
    return source.batches


class Trainer:
    """Trains an SAE on a source of activations.

    With `out` the run is kept there: log.jsonl grows line by line, checkpoints are written, and the
    weights at the end. holdout: rows that it is evaluated on from time to time. draw: who gives the
    batches in the place of `source.batches`: trainers that take turns may share a stream.

    An SAE on shards (`fastsae.sharding`) is trained by all its ranks, each with a Trainer of the
    same arguments: batch_size is that of all of them, and the first one writes what is one file.
    """

    def __init__(
        self,
        sae: SAE,
        source: Source | IterableSource,
        config: TrainConfig,
        *,
        out: str | Path | None = None,
        holdout: Source | None = None,
        draw: Draw | None = None,
    ) -> None:
        for rows in (source, holdout):
            if rows is not None:
                _check_widths(sae, rows)
        if sae.shards is not None:
            _check_sharded(sae.shards, source, config)
        self.sae, self.source, self.config, self.holdout = sae, source, config, holdout
        self.draw = drawn(source, config) if draw is None else draw
        self.shards = sae.shards
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
                state=config.state,
                sum_over_shards=None if sae.shards is None else (_divided(sae), sae.shards.sum),
                first_row=0 if sae.part is None else sae.part.rows.start,
                backend=sae.backend,
            )
        self.ema = None if config.ema is None else EMA(sae, config.ema)
        # On a GPU a step does not wait for what it computed: a loss or gradient that is not finite
        # writes nothing, and is raised at the next line of the log.
        self.on_device = self.engine()["backend"] == "triton" and isinstance(self.optimizer, Adam)
        self.all_finite = torch.ones((), dtype=torch.bool, device=sae.W_dec.device)
        self.data = source.identity()  # now: a file may be cut short later
        self.step_count = 0
        self.seconds = 0.0
        """What the steps took so far, without evaluations and checkpoints; in all processes."""
        self.log_bytes = 0
        self.continues = False
        """Whether what is in `out` is this run's own."""
        self.evaluated: tuple[int, dict[str, Any]] = (-1, {})
        """The step and the figures of the last evaluation on the rows held out, in this process."""

    @property
    def rows_seen(self) -> int:
        """Training rows so far."""
        return self.step_count * self.config.batch_size

    # ---- one step ----

    def initialize(self) -> None:
        """Measures scale and b_dec on the first training rows in their shuffled order."""
        n = self.config.init_rows
        if self.source.n_rows is not None:
            n = min(n, self.source.n_rows)
        x, target, _ = self._moved(next(self.draw(n, self.config.seed)))
        c = self.config
        self.sae.initialize_from_(
            x, target, scale=c.scale, b_dec=c.b_dec, fit_encoder=c.fit_encoder
        )
        if self.ema is not None:
            self.ema.restart()

    def step(self, batch: Batch) -> SAEOutput:
        """One optimiser step; returns what the SAE made of the batch, or its last part, before it.

        On shards the batch is that of this row of ranks, what they read together.

        FloatingPointError: a loss is not finite (on a GPU `all_finite` says so); no weight changes.
        """
        sae, optimizer, config = self.sae, self.optimizer, self.config
        sae.train()
        self._tell_progress()
        batch = self._moved(batch)
        optimizer.zero_grad()
        all_finite = torch.ones((), dtype=torch.bool, device=batch.x.device)
        for part in _parts(batch, config.accumulate):
            try:
                output = sae.losses(*part)
            except NotFinite as error:  # a source has finite rows, so it is the weights
                raise FloatingPointError(self._diverged(str(error))) from error
            finite = output.loss.detach().isfinite()
            if not self.on_device and not bool(finite):  # a bad step writes nothing
                raise FloatingPointError(
                    self._diverged(f"expected a finite loss, got {float(output.loss.detach())}")
                )
            all_finite &= finite
            share = len(part.x) / len(batch.x) / (1 if self.shards is None else self.shards.n_data)
            (output.loss * share).backward()
        if self.shards is not None:
            assert isinstance(optimizer, Adam)
            self.shards.merge_gradients(optimizer, dict(sae.named_parameters()))
            if self.on_device:
                all_finite = self.shards.least(all_finite.to(torch.uint8)) > 0
        self.all_finite &= all_finite
        for group in optimizer.param_groups:
            group["lr"] = self.lr * config.lr_factor(self.step_count)
        if isinstance(optimizer, Adam):  # projects, clips and normalises itself
            optimizer.step(valid=all_finite if self.on_device else None)
            if optimizer.finite is not None:
                self.all_finite &= optimizer.finite
        else:
            sae.project_decoder_gradient_()
            if config.clip is not None:
                torch.nn.utils.clip_grad_norm_(sae.parameters(), config.clip)
            optimizer.step()
            sae.normalize_decoder_()
        self.step_count += 1
        if self.ema is not None:
            self.ema.update(self.step_count)
        every = config.resample_every
        if every and self.step_count % every == 0:
            seed = config.seed + self.step_count
            resample_dead_(
                sae, optimizer, batch.x, batch.target, seed=seed, parts=config.accumulate
            )
        return output

    def _tell_progress(self) -> None:
        """Tells the SAE how far the training is, which the schedules of rules depend on."""
        self.sae.progress = min(1.0, self.step_count / self.config.steps)

    def _moved(self, batch: Batch) -> Batch:
        device = self.sae.W_dec.device
        return Batch(*(None if t is None else t.to(device) for t in batch))  # type: ignore[arg-type]

    def _batches(self) -> Batches | Generator[Batch, None, None]:
        """The rows from here on; of shards this rank's part of each batch."""
        config, start = self.config, self.rows_seen
        if self.shards is None:
            return self.draw(config.batch_size, config.seed, start)
        part = self.shards.rank, self.shards.n_ranks
        return self.draw(config.batch_size, config.seed, start, part)

    def _read(self, batches: Iterator[Batch]) -> Batch:
        """The next batch, on the SAE's device; of shards the tokens of this row of ranks."""
        batch = next(batches)
        if self.shards is None:
            return batch
        return Batch(*(self.shards.rows(t) for t in self._moved(batch)))  # type: ignore[arg-type]

    # ---- the run ----

    def resume(self) -> bool:
        """Goes back to the run's newest checkpoint; False where there is none: `run` then begins.

        ValueError: it is not whole, or of other data, another SAE or other settings.
        """
        self.continues = True
        folder = None if self.out is None else checkpoint.latest(self.out)
        if folder is not None:
            self.log_bytes = checkpoint.restore(self, folder)["log_bytes"]
        if self.shards is not None:
            self.shards.check_same("step of the newest checkpoint", self.step_count)
        return folder is not None

    def save(self) -> Path:
        """Writes a checkpoint. FloatingPointError: weights or losses are not finite."""
        if self.out is None:
            raise ValueError("out: expected a run directory to save to, got None")
        self.check_finite()
        return checkpoint.save(self, self.out, keep=self.config.keep, log_bytes=self.log_bytes)

    def run(
        self, *, progress: bool = True, on_step: Callable[[int, SAEOutput], None] | None = None
    ) -> dict[str, float]:
        """Trains until config.steps; returns train_seconds, tokens_per_s and interrupted.

        Initialises first, if no step was taken. With `out`, SIGINT, SIGTERM and SIGHUP let it
        finish the step, save a checkpoint and return with interrupted = True; a second SIGINT is a
        KeyboardInterrupt. ValueError: `out` holds another run (`resume` goes on with it), or
        another process trains into it.
        """
        stopping = stop_requests(self.out is not None)
        with stopping as stop, contextlib.closing(self.steps(stop, progress=progress)) as steps:
            for output in steps:
                if on_step is not None:
                    on_step(self.step_count, output)
        return self.summary()

    def steps(
        self, stop: threading.Event, *, progress: bool = False
    ) -> Generator[SAEOutput, None, None]:
        """`run`, a step whenever it is asked for one, until `stop` is set: what takes turns.

        What follows from a step (its line in the log, an evaluation, a checkpoint) is done when the
        next one is asked for; the checkpoint and the weights of the end when there is none.
        """
        with contextlib.ExitStack() as stack:
            if self.out is not None and self.sae.writes:
                self._check_new(self.out)
                stack.enter_context(alone(self.out, "training into"))
                checkpoint.remove_leftovers(self.out)
            if self.shards is not None:  # so that the first one's error comes before what it makes
                self.shards.barrier()
            yield from self._steps(stop, progress and self.sae.writes)

    def summary(self) -> dict[str, float]:
        """What the steps so far took, and whether they are not all."""
        return {
            "train_seconds": self.seconds,
            "tokens_per_s": self.rows_seen / max(self.seconds, 1e-9),
            "interrupted": self.step_count < self.config.steps,
        }

    def _stops(self, stop: threading.Event) -> bool:
        """Whether a stop was asked for, of any rank: all of them stop before the same step."""
        return stop.is_set() if self.shards is None else self.shards.any(stop.is_set())

    def _check_new(self, out: Path) -> None:
        log = out / "log.jsonl"
        if not self.continues and (checkpoint.latest(out) or (log.exists() and log.stat().st_size)):
            raise ValueError(f"{out}: expected a new run directory, or resume() first, got a run's")
        self.continues = True

    def _steps(self, stop: threading.Event, progress: bool) -> Generator[SAEOutput, None, None]:
        config, first_step = self.config, self.step_count
        eval_every = config.eval_every or max(1, config.steps // 10)
        log = RunLog(
            self.out if self.sae.writes else None,
            keep_bytes=self.log_bytes,
            steps=config.steps,
            first_step=first_step,
            progress=progress,
            wandb=config.wandb if self.sae.writes else None,
            config=self.settings(),
        )
        batches = self._batches()
        with log, contextlib.closing(batches):
            if first_step == 0:
                log.write({"config": self.settings(), "engine": self.engine()})
                with self._timed():
                    self.initialize()
            while self.step_count < config.steps and not self._stops(stop):
                line = None
                with self._timed():
                    with self._not_to_blame():
                        batch = self._read(batches)
                    output = self.step(batch)
                    last = self.step_count == config.steps
                    if last or self.step_count % config.log_every == 0:
                        line = self._figures(output, batch)  # waits for a GPU
                log.bar.update()
                yield output
                if line is not None:
                    log.bar.set_postfix(loss=f"{line['loss']:.4f}", dead=line["n_dead"])
                    log.write({**self._place(), **line})
                    self.log_bytes = log.n_bytes
                self._tell_progress()
                if self.holdout is not None and (last or self.step_count % eval_every == 0):
                    with self._not_to_blame():
                        figures = self.evaluate(self.holdout, lambda: self._stops(stop))
                    if figures:
                        self.evaluated = self.step_count, figures
                        log.write({"step": self.step_count, "eval": figures})
                self.log_bytes = log.n_bytes
                if self.out is not None and self.step_count % config.checkpoint_every == 0:
                    self.save()
            self._tell_progress()
            if self.out is None or not self.step_count:
                self.check_finite()
            else:
                self.save()
                if self.step_count == config.steps:
                    with self.averaged():
                        self.sae.save(self.out)
        self.sae.eval()

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start

    @contextlib.contextmanager
    def _not_to_blame(self) -> Iterator[None]:
        """Around what only reads: the state is whole, so it is not lost with an error.

        FloatingPointError: the weights make something that is not finite; they are not kept."""
        try:
            yield
        except NotFinite as error:  # a source has finite rows, so it is the weights
            raise FloatingPointError(self._diverged(str(error))) from error
        except Exception:
            if self.out is not None and self.step_count and self.shards is None:
                self.save()
            raise

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Within it the SAE has the averaged weights, where the settings ask for an average."""
        return contextlib.nullcontext() if self.ema is None else self.ema.applied()

    def evaluate(self, source: Source, stop: Callable[[], bool] = lambda: False) -> dict[str, Any]:
        """`evaluate` of the (averaged) weights; nothing where `stop` says so before it is done."""
        with self.averaged():
            return evaluate(self.sae, source, stop=stop)

    def settings(self) -> dict[str, Any]:
        """Both configurations as plain data."""
        return {"sae": self.sae.config.to_dict(), "train": asdict(self.config)}

    def engine(self) -> dict[str, str]:
        """What runs the steps: the backend, and whether W_enc and W_dec have gradient matrices."""
        rows = isinstance(self.optimizer, Adam)
        return {
            "backend": self.sae.backend or ops.choose_backend(*self.sae.parameters()),
            "gradients": "rows, summed in the update" if rows else "dense",
        }

    def check_finite(self) -> None:
        """FloatingPointError: a loss so far, or a weight, is not finite."""
        if not bool(self.all_finite):
            raise FloatingPointError(self._diverged("expected finite losses so far"))
        for name, p in self.sae.named_parameters():  # what the last update wrote is in no loss
            # In blocks: isfinite makes temporary copies of what it looks at.
            if not all(bool(torch.isfinite(rows).all()) for rows in p.split(1 << 14)):
                raise FloatingPointError(self._diverged(f"expected a finite {name}"))

    def _diverged(self, what: str) -> str:
        return f"step {self.step_count}: {what}; a lower learning rate usually helps"

    def _place(self) -> dict[str, Any]:
        return {
            "step": self.step_count,
            "tokens": self.rows_seen,
            "seconds": round(self.seconds, 3),
            "tokens_per_s": self.rows_seen / self.seconds,
        }

    def _figures(self, output: SAEOutput, batch: Batch) -> dict[str, Any]:
        if not bool(self.all_finite):
            raise FloatingPointError(self._diverged("expected finite losses so far"))
        fvu = self._fvu(output, batch)
        return {
            "lr": self.optimizer.param_groups[0]["lr"],
            "loss": self._mean(output.loss),
            **{name: self._mean(value) for name, value in output.losses.items()},
            "fvu": fvu,
            "explained_variance": 1 - fvu,
            "l0": self._mean(output.metrics["l0"]),
            "n_dead": int(output.metrics["n_dead"]),
        }

    def _fvu(self, output: SAEOutput, batch: Batch) -> float:
        """Of the last part of a batch: its mean squared error ÷ the variance of what it is of."""
        part = _parts(self._moved(batch), self.config.accumulate)[-1]
        y = (part.x if part.target is None else part.target) * self.sae._out_scale
        variance = self._mean((y - y.mean(0)).square().mean())
        return self._mean(output.losses["mse"]) / variance if variance else math.nan

    def _mean(self, figure: Tensor) -> float:
        """A figure of this process's tokens; of shards its mean over the ranks with others."""
        return float(figure.detach() if self.shards is None else self.shards.mean(figure))


def _parts(batch: Batch, n: int) -> list[Batch]:
    """A batch cut into n parts, as even as can be."""
    if n == 1:
        return [batch]
    columns = [[None] * n if t is None else t.tensor_split(n) for t in batch]
    return [Batch(*part) for part in zip(*columns, strict=True)]


@contextlib.contextmanager
def stop_requests(wanted: bool) -> Iterator[threading.Event]:
    """An event that SIGINT, SIGTERM and SIGHUP set, where wanted; a second SIGINT interrupts."""
    stop = threading.Event()
    before: dict[int, Any] = {}

    def request(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    if wanted and threading.current_thread() is threading.main_thread():
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            # What is ignored (SIGHUP under nohup) stays so.
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, request)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_widths(sae: SAE, source: Source | IterableSource) -> None:
    if source.d_in != sae.config.d_in:
        raise ValueError(f"{source.name}: expected width {sae.config.d_in}, got {source.d_in}")
    d_out = None if source.target is None else source.d_out
    if d_out != sae.config.d_out:
        raise ValueError(
            f"{source.name}: expected targets of width {sae.config.d_out}, got {d_out}"
        )


def _check_sharded(shards: Shards, source: Source | IterableSource, config: TrainConfig) -> None:
    """ValueError: something in the settings wants all latents, or all rows, in one process."""
    if not isinstance(source, Source):
        raise ValueError(f"{source.name}: expected rows by number (a tensor or files) on shards")
    if config.batch_size % shards.n_ranks:
        raise ValueError(
            f"batch_size: expected a multiple of {shards.n_ranks} ranks, got {config.batch_size}"
        )
    if config.optimizer == "torch-adam":
        raise ValueError("optimizer: expected adam or adam-lazy on shards, got torch-adam")
    if config.resample_every:
        raise ValueError(f"resample_every: expected 0 on shards, got {config.resample_every}")


def _divided(sae: SAE) -> list[Tensor]:
    """The parameters of which a shard has its own rows."""
    return [p for name, p in sae.named_parameters() if name in BY_LATENT]


@torch.no_grad()
def evaluate(
    sae: SAE,
    source: Source,
    batch_size: int = 4096,
    *,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """One pass over a source: fvu, explained_variance, l0, dead_share and firing_frequency.

    fvu = Σ‖e‖² / Σ‖y - ȳ‖² over all rows (y = x, or a transcoder's target), explained_variance = 1
    - fvu, l0 the mean number of active latents a row, dead_share the share of latents that no row
    activates. All in the selection rule's form of inference; where that is another one than it is
    trained in, training_fvu and training_l0 are those of the latter, on batches of batch_size.
    Nothing where `stop`, asked before each batch, says so. On shards all ranks call it.
    """
    _check_widths(sae, source)
    was_training, shards = sae.training, sae.shards
    sae.eval()
    if shards is not None:  # all rows of ranks see the same tokens
        sae.shards = shards.of_row()
    rule = sae.config.selection
    two_forms = rule.has_inference_form and not (rule.needs_gradient and source.gradient is None)
    fvu, training_fvu = metrics.FVU(), metrics.FVU()
    counts = torch.zeros(len(sae.latents), dtype=torch.int64, device=sae.W_dec.device)
    active = training_active = 0.0
    try:
        for batch in in_order(source, batch_size):
            if stop():
                return {}
            x, target, gradient = (None if t is None else t.to(counts.device) for t in batch)
            assert x is not None
            y = x if target is None else target
            output = sae.losses(x, target, reconstruct=True)
            assert output.reconstruction is not None
            fvu.update(y, output.reconstruction)
            counts += output.firing_counts
            active += float(output.metrics["l0"]) * len(x)
            if two_forms:
                codes = sae.encode(x, gradient, training=True)
                training_fvu.update(y, sae.decode(codes, x))
                training_active += int(sae.everywhere((codes.vals != 0).sum()))
    finally:
        sae.train(was_training)
        sae.shards = shards
    if shards is not None:
        counts = shards.whole(counts)
    figures = {
        "fvu": fvu.value,
        "explained_variance": fvu.explained_variance,
        "l0": active / source.n_rows,
        "dead_share": metrics.dead_share(counts),
        "firing_frequency": metrics.frequency_histogram(counts, source.n_rows),
    }
    if two_forms:
        figures["training_fvu"] = training_fvu.value
        figures["training_l0"] = training_active / source.n_rows
    return figures
