"""The rows that every benchmark writes, as CSV (bench/results/) or JSON: flat, in one format.

A row says what was measured, its figures, and what these must be read with: `machine`, the commit,
versions, threads, and how busy the machine was (`measure.Watch`). Times are milliseconds, sizes
bytes; `ratio` is a time ÷ that of one dense encoder product in the same process.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
WHAT = ("bench", "op", "provider", "version", "optimizer", "options", "n", "d", "f", "k")
"""The columns that say what was measured, first in a file; `compare` pairs rows by them."""
_PAIRED = tuple(name for name in WHAT if name != "version")


def machine() -> Row:
    """What a figure must be read with. It needs fastsae; the rest of this file does not."""
    import fastsae

    info = Path("/proc/cpuinfo")
    names = [
        line.split(":", 1)[1].strip()
        for line in (info.read_text().splitlines() if info.exists() else [])
        if line.startswith(("model name", "CPU part"))
    ]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "isa": fastsae.cpu.isas()[0] if fastsae.cpu.available() else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastsae": fastsae.__version__,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def commit() -> str:
    """The commit of this checkout; "" where git cannot say."""
    git = ["git", "describe", "--always", "--dirty"]
    try:
        here = Path(__file__).parent
        return subprocess.run(git, capture_output=True, text=True, cwd=here).stdout.strip()
    except OSError:
        return ""


def flat(row: Row) -> Row:
    """Dicts inside as more columns, lists as one text; what is None is left out."""
    found: Row = {}
    for name, value in row.items():
        if isinstance(value, dict):
            found |= {f"{name}_{inner}": v for inner, v in flat(value).items()}
        elif isinstance(value, list | tuple):
            found[name] = "; ".join(map(str, value))
        elif value is not None:
            found[name] = value
    return found


def read(file: str | Path) -> list[Row]:
    """The rows of a .csv or .json file; texts that are numbers are numbers again."""
    path = Path(file)
    if path.suffix == ".json":
        return [flat(row) for row in json.loads(path.read_text())]
    with path.open(newline="") as lines:
        return [
            {name: _value(name, text) for name, text in row.items() if text}
            for row in csv.DictReader(lines)
        ]


def _value(name: str, text: str) -> Any:
    if name in ("commit", "version", "torch", "fastsae", "python", "date"):
        return text
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def write(rows: Iterable[Row], file: str | Path) -> None:
    """As JSON where the name ends so or is "-" (stdout), else as CSV; whole or not at all."""
    found = [flat(row) for row in rows]
    if str(file) == "-":
        print(json.dumps(found, indent=1))
        return
    path = Path(file)
    new = path.with_name(path.name + ".tmp")
    if path.suffix == ".json":
        new.write_text(json.dumps(found, indent=1) + "\n")
    else:
        names = dict.fromkeys(name for row in found for name in row)
        columns = [name for name in WHAT if name in names]
        columns += [name for name in names if name not in WHAT]
        with new.open("w", newline="") as lines:
            writer = csv.DictWriter(lines, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(found)
    os.replace(new, path)


def add_outputs(parser: argparse.ArgumentParser) -> None:
    """Where rows go: `outputs` writes them there."""

    def ending(name: str) -> Callable[[str], str]:
        def check(file: str) -> str:
            if not file.endswith(name) and (file, name) != ("-", ".json"):
                raise argparse.ArgumentTypeError(f"expected a name ending in {name}, got {file!r}")
            return file

        return check

    parser.add_argument(
        "--json", type=ending(".json"), metavar="FILE", help="write the rows as JSON; - for stdout"
    )
    parser.add_argument("--csv", type=ending(".csv"), metavar="FILE", help="write the rows as CSV")


def outputs(rows: Iterable[Row], args: argparse.Namespace) -> None:
    found = list(rows)
    for file in (args.json, args.csv):
        if file is not None:
            write(found, file)


def compare(rows: Iterable[Row], old: Iterable[Row]) -> list[str]:
    """A line for each row that both have: ms before and now; marked where their ranges part."""
    before = {_key(row): row for row in old if "ms" in row}
    lines = []
    for row in map(flat, rows):
        was = before.get(_key(row))
        if was is None or "ms" not in row:
            continue
        what = " ".join(str(row[name]) for name in ("bench", "op", "provider") if name in row)
        options = ", ".join(str(row[name]) for name in ("optimizer", "options") if row.get(name))
        shape = ",".join(str(row.get(size, "-")) for size in "ndfk")
        line = f"{what:46} {options[:24]:24} {shape:22} {was['ms']:10.3f} {row['ms']:10.3f} ms "
        line += f"{row['ms'] / was['ms']:6.2f}"
        if row.get("min_ms", row["ms"]) > was.get("max_ms", was["ms"]):
            line += "  slower"
        elif row.get("max_ms", row["ms"]) < was.get("min_ms", was["ms"]):
            line += "  faster"
        lines.append(line)
    return lines


def _key(row: Row) -> tuple[str, ...]:
    return tuple(str(row.get(name) or "") for name in _PAIRED)


def say_busy(rows: Iterable[Row]) -> None:
    """One line on stderr where something else ran while these rows were measured."""
    most = max((row.get("others", 0.0) for row in rows), default=0.0)
    if most > 0.1:
        print(
            f"BUSY: other processes took up to {most:.1f} of {os.cpu_count()} cores while this was "
            "measured; the figures are of a busy machine",
            file=sys.stderr,
        )
