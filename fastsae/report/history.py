"""What a run wrote about itself: log.jsonl, metrics.json, run.json, in_model.json."""

from __future__ import annotations

import json
import math
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastsae.files import read_json

LOGGED = ("tokens", "seconds", "tokens_per_s", "loss", "fvu", "l0", "n_dead")
LARGEST = 1e300  # that sums and differences are still finite
EVALUATED = ("fvu", "l0", "dead_share")


class Columns:
    """Numbers by step: one array a name, NaN where a line lacks one. Steps ascend."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.step = array("d")
        self.values = {name: array("d") for name in names}

    def add(self, step: float, line: dict[str, Any]) -> None:
        """Adds a line. One with an earlier step replaces what came after: the run was resumed."""
        while self.step and self.step[-1] >= step:
            for column in (self.step, *self.values.values()):
                column.pop()
        self.step.append(step)
        for name, column in self.values.items():
            column.append(number(line.get(name)))

    def curve(self, name: str) -> tuple[list[float], list[float]]:
        """(steps, values) where there is a finite value."""
        pairs = zip(self.step, self.values[name], strict=True)
        steps_values = [(step, value) for step, value in pairs if math.isfinite(value)]
        return [step for step, _ in steps_values], [value for _, value in steps_values]


@dataclass
class History:
    """The course of a run. Whatever a file lacks is empty here: an old or torn log is no error."""

    config: dict[str, Any] = field(default_factory=dict)
    """The log's line of configuration, the last where there are several."""
    log: Columns = field(default_factory=lambda: Columns(LOGGED))
    evals: Columns = field(default_factory=lambda: Columns(EVALUATED))
    metrics: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    in_model: dict[str, Any] = field(default_factory=dict)
    """What `fastsae eval --model` found."""
    unreadable: int = 0
    """Lines of the log that are no JSON objects."""

    def speed(self) -> tuple[list[float], list[float], list[float]]:
        """(steps, tokens/s, seconds a step) between neighbouring lines of the log.

        A clock that does not advance there, as where a run was resumed, leaves its interval out.
        """
        steps, rates, step_seconds = [], [], []
        v = self.log.values
        for i in range(1, len(self.log.step)):
            n_steps = self.log.step[i] - self.log.step[i - 1]
            tokens = v["tokens"][i] - v["tokens"][i - 1]
            seconds = v["seconds"][i] - v["seconds"][i - 1]
            if tokens > 0 and seconds > 0:
                steps.append(self.log.step[i])
                rates.append(tokens / seconds)
                step_seconds.append(seconds / n_steps)
        return steps, rates, step_seconds


def read_history(run: Path) -> History:
    """Reads what there is of the run's files. ValueError: a .json file is no object."""
    metrics, options, in_model = (
        _object(run / f"{name}.json") for name in ("metrics", "run", "in_model")
    )
    history = History(metrics=metrics, run=options, in_model=in_model)
    log = run / "log.jsonl"
    if not log.is_file():
        return history
    with log.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                line = None
            if not isinstance(line, dict):
                history.unreadable += 1
                continue
            if isinstance(line.get("config"), dict):
                history.config = line
            step = number(line.get("step"))
            if not step >= 0:
                continue
            if isinstance(line.get("eval"), dict):
                history.evals.add(step, line["eval"])
            else:
                history.log.add(step, line)
    return history


def number(value: Any) -> float:
    """A number of a JSON file as a float; NaN for anything else, and beyond LARGEST."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) <= LARGEST else math.nan


def _object(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}
