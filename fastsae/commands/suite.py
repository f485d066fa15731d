"""``fastsae suite``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from fastsae import runs
from fastsae.commands.train import Train, finish, layered, train_options
from fastsae.options import checked, read_table
from fastsae.suite import Member, train_suite


@dataclass(frozen=True)
class Suite:
    """Train several SAEs side by side, on data that are read once."""

    file: tyro.conf.Positional[Path]
    """A .toml or .json file: options of train for all SAEs, and for each a table, [NAME], with its
    own."""
    out: Path
    """Folder of the run directories, OUT/NAME."""
    resume: bool = False
    """Go on with the runs that are there; begin those that are not."""

    def run(self) -> None:
        members: dict[str, Member] = {}
        opened = runs.Opened()
        for name, layers in read_suite(self.file).items():
            given, parameters = layered(layers)
            options = tyro.cli(
                Train,
                prog=f"{self.file}: {name}",
                args=[*given, f"--out={self.out / name}"],
                config=(tyro.conf.OmitArgPrefixes,),
            )
            try:
                members[name] = options.prepared(parameters, opened)
            except ValueError as error:
                raise ValueError(f"{self.file}: {name}: {error}") from error
        figures, errors = train_suite(members, self.out, resume=self.resume)
        go_on = f"fastsae suite {self.file} --resume --out {self.out}"
        for name, found in figures.items():
            print(f"{name}:")
            finish(found, self.out / name, go_on)
        if errors:
            told = "; ".join(f"{name}: {error}" for name, error in errors.items())
            raise FloatingPointError(f"{len(errors)} of {len(members)} SAEs diverged: {told}")


def read_suite(path: Path) -> dict[str, list[dict[str, Any]]]:
    """For each SAE, by name, the options that it shares and its own.

    ValueError: an option that there is not or of another type, no SAE, or a name of none.
    """
    table = read_table(path)
    own = {
        name: value
        for name, value in table.items()
        if isinstance(value, dict) and name != "selection"
    }
    hints = train_options()
    shared = {name: value for name, value in table.items() if name not in own}
    shared = checked(shared, hints, str(path))
    if not own:
        raise ValueError(f"{path}: expected a table for each SAE, got none")
    for name, options in own.items():
        if name in (".", "..") or Path(name).name != name:
            raise ValueError(f"{path}: expected names of folders, got {name!r:.80}")
        checked(options, hints, f"{path}: {name}")
        for needed in ("data", "d_sae"):
            if needed not in shared | options:
                raise ValueError(f"{path}: {name}: expected {needed}, got none")
    return {name: [shared, options] for name, options in own.items()}
