"""``fastsae eval | report``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import tyro

from fastsae import runs


@dataclass(frozen=True)
class Eval:
    """Print the figures of a run's SAE on held-out rows, or on other activations."""

    run_directory: tyro.conf.Positional[Path]
    """What train wrote; of an unfinished run the newest checkpoint is taken."""
    data: str | None = None
    """Activations, as for train; None: the rows that the run held out."""
    target: str | None = None
    """Activations to predict, with data, for a transcoder."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> None:
        figures = runs.evaluate_run(self.run_directory, self.data, self.target)
        if self.json:
            print(json.dumps(figures))
        else:
            for name, value in figures.items():
                if isinstance(value, float):
                    print(f"{name:20} {value:9.4f}")


@dataclass(frozen=True)
class Report:
    """Write a run's report.html again: curves, histograms and what latents respond to."""

    run_directory: tyro.conf.Positional[Path]
    """What train wrote; of an unfinished run the newest checkpoint is taken."""
    data: str | None = None
    """Activations to look at, as for train; None: the run's, those held out first."""

    def run(self) -> None:
        print(runs.report_run(self.run_directory, self.data))
