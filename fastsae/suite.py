"""Several trainings side by side in one process, from streams that are read once.

Each member is a run as `fastsae.runs` makes it, in OUT/NAME: its checkpoints, weights and figures
are, to the bit, those of the same run alone (but for what was timed), and it may be resumed alone,
too. Members take turns, a step each: the one that has seen the fewest rows is next. Those with the
same data, batch size and seed get the same batches, which are read once; those among them that are
on sites of one live model share its forward pass.

A member whose loss or weights are no longer finite ends there, and the others go on. Any other
error ends all, after the others have written a checkpoint. A request to stop ends all with one.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fastsae import plan, runs
from fastsae.batches import Batch
from fastsae.config import SAEConfig, TrainConfig
from fastsae.data import Source
from fastsae.files import alone
from fastsae.live import LiveSource
from fastsae.log import Terminal
from fastsae.sae import SAEOutput
from fastsae.train import Draw, Trainer, drawn, stop_requests


@dataclass(frozen=True)
class Member:
    """A run, not yet begun."""

    config: SAEConfig
    rows: runs.Rows
    holdout: Source
    settings: TrainConfig
    options: dict[str, Any]
    """What run.json says: data, target, holdout and so on."""
    device: str = "cpu"

    @property
    def order(self) -> tuple[Any, ...]:
        """Members with equal ones draw the same batches, or columns of them."""
        if isinstance(self.rows, LiveSource):
            data: tuple[Any, ...] = id(self.rows.stream), self.rows.n_held
        else:
            names = ("data", "target", "holdout")
            data = *(self.options[name] for name in names), self.rows.gradient is not None
        settings = self.settings
        return *data, settings.batch_size, settings.seed, settings.shuffle_block


def train_suite(
    members: Mapping[str, Member], out: Path, *, resume: bool = False, progress: bool = True
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Trains the members, or goes on: (figures by name, as of `runs.train`; errors by name).

    A name is in one of both. ValueError, before anything is written: a member cannot begin, or go
    on, in its folder. MemoryError: together they do not fit.
    """
    for name, member in members.items():
        runs.check_place(out / name, member.options, member.settings, resume)
        if member.settings.wandb is not None:
            raise ValueError(f"{name}: wandb: expected none in a suite, got one")
    streams = {order: _Stream(of_order) for order, of_order in _by_order(members).items()}
    plan.check(planned(members, streams), plan.available())
    with alone(out, "training a suite into"):
        trainers = {
            name: runs.begin(
                member.config,
                member.rows,
                member.holdout,
                member.settings,
                out / name,
                member.options,
                device=member.device,
                draw=streams[member.order].draw(member.rows),
            )
            for name, member in members.items()
        }
        began = {name: trainer.step_count for name, trainer in trainers.items()}
        errors = take_turns(trainers, progress=progress)
        figures = {
            name: runs.finish(trainer, members[name].rows, members[name].holdout, began[name])
            for name, trainer in trainers.items()
            if name not in errors
        }
    return figures, errors


def planned(members: Mapping[str, Member], streams: Mapping[Any, _Stream]) -> plan.Plan:
    """What the members on the CPU take, and the rows that wait in the streams' buffers."""
    here = [plan.plan(m.config, m.settings) for m in members.values() if m.device == "cpu"]
    shuffled = sum(runs.buffer_bytes(stream.source, stream.settings) for stream in streams.values())
    return replace(plan.total(here), shuffled=shuffled)


def take_turns(trainers: Mapping[str, Trainer], *, progress: bool = True) -> dict[str, str]:
    """Trains all until each is done or a stop is asked for; the errors of those that diverged."""
    errors: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stop_requests(True))
        bar = tqdm(
            total=sum(trainer.config.steps for trainer in trainers.values()),
            initial=sum(trainer.step_count for trainer in trainers.values()),
            disable=None if progress else True,
            unit="step",
            file=Terminal(sys.stderr),
        )
        stack.enter_context(bar)
        running: dict[str, Generator[SAEOutput, None, None]] = {
            name: stack.enter_context(contextlib.closing(trainer.steps(stop)))
            for name, trainer in trainers.items()
        }
        while running:
            name = min(running, key=lambda name: trainers[name].rows_seen)
            try:
                next(running[name])
                bar.update()
            except StopIteration:
                del running[name]
            except FloatingPointError as error:
                errors[name] = str(error)
                del running[name]
            except Exception as error:
                del running[name]
                stop.set()
                for other in running.values():
                    with contextlib.suppress(Exception):  # the first error is the one that is told
                        next(other)
                if isinstance(error, OSError):
                    what = runs.what_is_left(trainers[name], error)
                    raise OSError(f"{name}: {what}") from error
                raise
    return errors


# ---- batches that are read once ----


def _by_order(members: Mapping[str, Member]) -> dict[Any, list[Member]]:
    found: dict[Any, list[Member]] = {}
    for member in members.values():
        found.setdefault(member.order, []).append(member)
    return found


class _Stream:
    """The source of members that draw the same batches at the same pace: each is read once."""

    def __init__(self, members: Sequence[Member]) -> None:
        live = [member.rows for member in members if isinstance(member.rows, LiveSource)]
        self.source = LiveSource.of_all(live) if live else members[0].rows
        self.settings = members[0].settings
        self._draw = drawn(self.source, self.settings)
        self._readings: dict[tuple[int, int], _Reading] = {}

    def draw(self, rows: runs.Rows) -> Draw:
        """The batches of `rows`, which are a member's."""

        def batches(batch_size: int, seed: int = 0, start: int = 0) -> Generator[Batch, None, None]:
            order = batch_size, seed
            reading = self._readings.setdefault(order, _Reading(self._draw, *order))
            with reading:
                for position in itertools.count(start, batch_size):
                    batch = reading.at(position)
                    if isinstance(self.source, LiveSource) and isinstance(rows, LiveSource):
                        batch = self.source.part(batch, rows)
                    yield batch

        return batches


class _Reading:
    """Batches by their position in a stream; the last one is kept. Open while somebody reads."""

    def __init__(self, draw: Draw, batch_size: int, seed: int) -> None:
        self.draw, self.batch_size, self.seed = draw, batch_size, seed
        self._batches: Any = None
        self._next = self._position = -1
        self._readers = 0

    def __enter__(self) -> None:
        self._readers += 1

    def __exit__(self, *error: object) -> None:
        self._readers -= 1
        if not self._readers:
            self._close()

    def at(self, position: int) -> Batch:
        if position != self._position:
            if position != self._next:
                self._close()
                self._batches = self.draw(self.batch_size, self.seed, position)
            self._batch = next(self._batches)
            self._position, self._next = position, position + self.batch_size
        return self._batch

    def _close(self) -> None:
        if self._batches is not None:
            self._batches.close()
        self._batches, self._next = None, -1
