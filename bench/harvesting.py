"""What one forward pass for several sites saves.

    python bench/harvesting.py --text data/corpus/*.jsonl --csv FILE

harvest: rows of one layer harvested alone, and of three in one pass (to a folder that is removed).
suite: an SAE on each of the three layers trained straight from the model, one after the other and
as a suite, from the first forward pass to the report. The model is loaded before. Seconds of the
wall clock, and `cpu_seconds` of this process alone, which a busy machine stretches less; the median
of --repeats runs, which take turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from measure import Watch
from rows import Row, add_outputs, machine, outputs, say_busy

from fastsae import SAEConfig, TopK, runs
from fastsae.harvest import HarvestConfig, harvest_sites
from fastsae.live import Stream
from fastsae.models import CACHE, LanguageModel, load_model
from fastsae.suite import Member, train_suite
from fastsae.train import TrainConfig


def harvested(model: LanguageModel, args: argparse.Namespace, layers: tuple[int, ...]) -> None:
    config = HarvestConfig(layers, rows=args.rows, batch_size=args.windows, shard_rows=4096)
    with tempfile.TemporaryDirectory() as folder:
        harvest_sites(model, args.text, Path(folder), config)


def trained(model: LanguageModel, args: argparse.Namespace, together: bool) -> None:
    config = HarvestConfig(tuple(args.layers), batch_size=args.windows)
    stream = Stream(model, args.text, config, buffer_rows=args.buffer)
    settings = TrainConfig(steps=args.steps, batch_size=args.batch_size, init_rows=args.batch_size)
    members = {}
    for site, d in stream.widths.items():
        rows, holdout = stream.split(site, None, 256)
        config_of_sae = SAEConfig(d, args.d_sae, TopK(32))
        members[site] = Member(config_of_sae, rows, holdout, settings, {})
    with tempfile.TemporaryDirectory() as folder:
        if together:
            train_suite(members, Path(folder), progress=False)
            return
        for site, of in members.items():
            runs.train(of.config, of.rows, of.holdout, of.settings, Path(folder) / site, {})


def measured(works: dict[str, Callable[[], None]], repeats: int) -> Iterator[list[Row]]:
    """The rows after each turn, one of each work."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    busy: dict[str, Row] = {}
    for _ in range(repeats):
        for name, work in works.items():
            with Watch() as watch:
                start = time.perf_counter(), time.process_time()
                work()
                seconds[name].append(
                    (time.perf_counter() - start[0], time.process_time() - start[1])
                )
            busy[name] = watch.columns()
            print(name, seconds[name][-1], busy[name], file=sys.stderr, flush=True)
        yield [row(name, found) | busy[name] for name, found in seconds.items()]


def row(name: str, seconds: list[tuple[float, float]]) -> Row:
    """The median and range of runs, each in seconds of the clock and of the CPU."""
    wall, cpu = zip(*seconds, strict=True)
    figures = {"seconds": statistics.median(wall), "cpu_seconds": statistics.median(cpu)}
    spread = {"min_seconds": min(wall), "max_seconds": max(wall), "runs": len(wall)}
    return {"op": name, **figures, **spread}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--layers", type=int, nargs="+", default=[5, 11, 17])
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--windows", type=int, default=8, help="that the model reads at once")
    parser.add_argument("--d-sae", type=int, default=4608)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--buffer", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    add_outputs(parser)
    args = parser.parse_args()
    model = load_model(args.model, args.cache.expanduser())
    middle = args.layers[len(args.layers) // 2]
    works: dict[str, Callable[[], None]] = {
        f"harvest layer {middle}": lambda: harvested(model, args, (middle,)),
        f"harvest layers {', '.join(map(str, args.layers))}": lambda: harvested(
            model, args, tuple(args.layers)
        ),
        f"{len(args.layers)} SAEs, one after the other": lambda: trained(model, args, False),
        f"{len(args.layers)} SAEs, as a suite": lambda: trained(model, args, True),
    }
    common: Row = {"bench": "harvesting", "model": args.model, "threads": torch.get_num_threads()}
    common |= {"rows": args.rows, "window": 128, "windows": args.windows, "steps": args.steps}
    common |= {"n": args.batch_size, "f": args.d_sae, "buffer_rows": args.buffer}
    rows: list[Row] = []
    for found in measured(works, args.repeats):
        rows = [{**common, **one, **machine()} for one in found]
        for one in rows[:2]:
            one["rows_per_s"] = args.rows / one["seconds"]
            one["rows_per_cpu_s"] = args.rows / one["cpu_seconds"]
        outputs(rows, args)  # as far as it has come
    for one in rows:
        print(f"{one['op']:32} {one['seconds']:8.1f} s  {one['cpu_seconds']:8.1f} s of CPU")
    say_busy(rows)


if __name__ == "__main__":
    main()
