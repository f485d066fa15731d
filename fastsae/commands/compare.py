"""``fastsae compare | stitch | meta``."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tyro

from fastsae import consistency, runs, stitching
from fastsae.commands.train import Train, TrainOptions
from fastsae.data import open_source
from fastsae.files import appear, write_json


@dataclass(frozen=True)
class Compare:
    """Say how much the dictionaries of runs have in common: PW-MCC, and shared latents."""

    run_directories: tyro.conf.Positional[tuple[Path, ...]]
    """Two or more of what train wrote, of one shape; or one, with --truth."""
    truth: Path | None = None
    """A .npy file of true directions, a row each; prints GT-MCC, too."""
    method: str | None = None
    """exact (needs scipy) or sparse; None: exact up to 32,768 latents."""
    gap: float = 0.01
    """How far from the best a sparse matching may be."""
    json: bool = False
    """Print one JSON object."""
    out: Path | None = None
    """A file for that object; as consistency.json in a run directory, the run's report shows it."""

    def run(self) -> None:
        saes = [runs.sae_of(run) for run in self.run_directories]
        truth = None if self.truth is None else open_source(self.truth)
        figures: dict[str, Any] = {"runs": [str(run) for run in self.run_directories]}
        figures |= consistency.figures(saes, truth, method=self.method, gap=self.gap)
        if self.out is not None:
            appear(self.out, lambda partial: write_json(partial, figures))
        print(json.dumps(figures) if self.json else consistency.table(figures))


@dataclass(frozen=True)
class Stitch:
    """Say what a larger SAE has that a smaller one of the same activations has not."""

    small: tyro.conf.Positional[Path]
    """What train wrote."""
    large: tyro.conf.Positional[Path]
    """The same, of an SAE with more latents."""
    data: str | None = None
    """Activations, as for train; None: the rows that the small one's run held out."""
    threshold: float = stitching.NOVEL_BELOW
    """The cosine up to which a latent is novel."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> None:
        rows = runs.held_out(self.small) if self.data is None else open_source(self.data)
        saes = runs.sae_of(self.small), runs.sae_of(self.large)
        figures = asdict(stitching.stitching_figures(*saes, rows, self.threshold))
        if self.json:
            print(json.dumps(figures))
        else:
            for name, value in figures.items():
                shown = f"{value:.4f}" if isinstance(value, float) else value
                print(f"{name:27} {shown!s:>9}")


@dataclass(frozen=True)
class Meta:
    """Train a meta-SAE: one whose data are the decoder rows of a run's SAE."""

    run_directory: tyro.conf.Positional[Path]
    """What train wrote."""
    d_sae: int
    """Number of meta-latents."""
    out: Path
    """Run directory, as of train; train --resume goes on with it."""
    selection: str = "batchtopk"
    """The rule that selects meta-latents."""
    k: int = 4
    """Active meta-latents a row."""
    train: TrainOptions = field(default_factory=lambda: TrainOptions(lr=2e-3))
    """How it is trained."""

    def run(self) -> None:
        data = f"decoder:{self.run_directory}"
        holdout = open_source(data).n_rows // 20
        options = {"selection": self.selection, "k": self.k, "holdout": holdout}
        Train(data, self.d_sae, self.out, **options, train=self.train).run()  # type: ignore[arg-type]
