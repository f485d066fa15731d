"""FVU against seconds of training, in fastsae's own interpreter and in a peer's.

Needs torch and the standard library alone, as measure.py.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from measure import Build, Model, Shape, Start, Watch

Point = dict[str, float]


def write_problem(
    folder: Path, train: torch.Tensor, holdout: torch.Tensor, start: Start, settings: dict[str, Any]
) -> None:
    """What `curve` reads: rows [rows, D] in the order of training, rows held out, weights."""
    torch.save(train, folder / "train.pt")
    torch.save(holdout, folder / "holdout.pt")
    torch.save(tuple(start), folder / "start.pt")
    (folder / "settings.json").write_text(json.dumps(settings))


def curve(build: Build, shape: Shape, folder: str | Path) -> list[Point]:
    """Trains for settings.json's `seconds`, and says how far it got at times that grow by √2.

    The clock runs while a batch is read and a step is taken, not during evaluations.
    """
    path = Path(folder)
    settings = json.loads((path / "settings.json").read_text())
    train = torch.load(path / "train.pt", mmap=True)
    holdout = torch.load(path / "holdout.pt")
    start = Start(*torch.load(path / "start.pt"))
    batches = _batches(train, shape[0])
    torch.manual_seed(0)
    model = build(shape, train[: shape[0]].clone(), settings["lr"])
    model.load(start)
    seconds, steps, due = 0.0, 0, 2**-0.5
    points = [_point(model, holdout, 0.0, 0)]
    with Watch() as watch:
        while seconds < settings["seconds"]:
            begin = time.perf_counter()
            model.step(next(batches))
            seconds += time.perf_counter() - begin
            steps += 1
            if seconds >= min(due, settings["seconds"]):
                points.append(_point(model, holdout, seconds, steps))
                while due <= seconds:
                    due *= 2**0.5
    return [point | watch.columns() for point in points]


def _batches(rows: torch.Tensor, n: int) -> Iterator[torch.Tensor]:
    """Once through the rows after another, in their order."""
    while True:
        for begin in range(0, len(rows) - n + 1, n):
            yield rows[begin : begin + n].clone()


@torch.no_grad()
def _point(model: Model, holdout: torch.Tensor, seconds: float, steps: int) -> Point:
    error = variance = 0.0
    mean = holdout.double().mean(0)
    for rows in holdout.split(1024):
        error += float((model.reconstruct(rows) - rows).double().square().sum())
        variance += float((rows.double() - mean).square().sum())
    return {"seconds": seconds, "steps": steps, "fvu": error / variance}
