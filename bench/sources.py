"""What it costs to read the activations: a step's time by where its rows lie.

    python bench/sources.py --rows 2000000 --limit-gb 1

A source is a tensor, a .npy file or a folder of shards with the same rows; each trains the same SAE
in a process of its own, which is given every batch's rows in shuffled order. The tensor's process
has all the memory there is; the others' may hold --limit-gb of it, the system's cache of the file
included (a memory cgroup, where this process may make one: it says when it could not), so that a
file beyond it is read from the disk in every epoch; once row by row, and once with
`TrainConfig.shuffle_block` at 256. Printed: median and mean time of a step with
its reading, and the mean as a multiple of the tensor's; rows a second that the source gives alone,
without steps, before and after them, and those that a step on the tensor's rows would need.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import Watch
from rows import add_outputs, machine, outputs, say_busy

from fastsae import SAE, SAEConfig, TopK
from fastsae.batches import Batches
from fastsae.data import open_source
from fastsae.shards import write_index, write_shard
from fastsae.train import TrainConfig, Trainer

CGROUPS = (  # where limits on memory are made, by what is there; version 2, version 1
    (Path("/sys/fs/cgroup"), "cgroup.controllers", "memory.max"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.limit_in_bytes"),
)


def write_files(folder: Path, rows: int, d: int) -> None:
    data = np.lib.format.open_memmap(folder / "x.npy", "w+", np.float32, (rows, d))
    shards = folder / "shards"
    shards.mkdir()
    sizes = []
    for number, first in enumerate(range(0, rows, 1 << 17)):
        n = min(1 << 17, rows - first)
        x = torch.randn(n, d, generator=torch.Generator().manual_seed(number))
        data[first : first + n] = x.numpy()
        label = torch.zeros(n, dtype=torch.int32)
        named = {"token": label, "window": label, "position": label}
        write_shard(shards / f"shard-{number:05}.safetensors", {"x": x, **named})
        sizes.append(n)
    data.flush()
    index = {"format": "fastsae-activations", "version": 1, "d": d, "dtype": "float32"}
    write_index(shards, {**index, "gradients": False, "shards": sizes})
    os.sync()


def forget(path: Path) -> None:
    """Drops what the system has cached of a file or folder: a process with a limit would be given
    it for nothing."""
    for file in [path] if path.is_file() else path.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def limit(n_bytes: int) -> tuple[Path, str] | None:
    """A cgroup with a limit; None where none can be made."""
    for root, sign, name in CGROUPS:
        if not (root / sign).exists():
            continue
        group = root / f"fastsae-{os.getpid()}"
        try:
            group.mkdir()
            (group / name).write_text(str(n_bytes))
        except OSError:
            if group.exists():
                group.rmdir()
            continue
        return group, str(group / "cgroup.procs")
    return None


def child(args: argparse.Namespace) -> None:
    kind, path, procs = args.child
    if procs:
        Path(procs).write_text(str(os.getpid()))
    source = open_source(torch.from_numpy(np.load(path)) if kind == "tensor" else path)
    config = SAEConfig(source.d_in, args.d_sae, TopK(32))
    trainer = Trainer(SAE(config), source, TrainConfig(steps=10**6, batch_size=args.batch_size))
    trainer.initialize()
    batches = source.batches(args.batch_size, block=args.block)
    alone = [rows_per_s(batches, args)]
    reading, step = [], []
    for i in range(args.steps + 3):
        start = time.perf_counter()
        batch = next(batches)
        middle = time.perf_counter()
        trainer.step(batch)
        if i >= 3:
            reading.append(middle - start)
            step.append(time.perf_counter() - start)
    alone.append(rows_per_s(batches, args))
    batches.close()
    figures = {
        "alone_rows_per_s": alone,
        "step_s": statistics.median(step),
        "mean_step_s": statistics.mean(step),
        "read_s": statistics.median(reading),
        "mean_read_s": statistics.mean(reading),
    }
    print(json.dumps(figures))


def rows_per_s(batches: Batches, args: argparse.Namespace) -> float:
    for _ in range(3):
        next(batches)
    start = time.perf_counter()
    for _ in range(args.steps):
        next(batches)
    return args.steps * args.batch_size / (time.perf_counter() - start)


def measure(
    kind: str, block: int, path: Path, procs: str, args: argparse.Namespace
) -> dict[str, Any]:
    own = [str(value) for value in ("--block", block, "--child", kind, path, procs)]
    shape = ["--steps", args.steps, "--batch-size", args.batch_size, "--d-sae", args.d_sae]
    command = [sys.executable, __file__, *own, *map(str, shape)]
    forget(path)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"source": kind, "block": block, "error": done.stderr.strip().splitlines()[-1]}
    return {"source": kind, "block": block, **json.loads(done.stdout)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--d-in", type=int, default=384)
    parser.add_argument("--d-sae", type=int, default=6144)
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--limit-gb", type=float, default=1.0)
    parser.add_argument(
        "--folder", type=Path, help="where the files are made; default: as tempfile"
    )
    add_outputs(parser)
    parser.add_argument("--block", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        write_files(folder, args.rows, args.d_in)
        group = limit(int(args.limit_gb * 2**30))
        if group is None:
            print("no memory cgroup can be made here: files may be cached whole", file=sys.stderr)
        names = {"tensor": "x.npy", "npy": "x.npy", "shards": "shards"}
        for kind, block in [("tensor", 1), *itertools.product(("npy", "shards"), (1, 256))]:
            procs = "" if group is None or kind == "tensor" else group[1]
            with Watch() as watch:
                row = measure(kind, block, folder / names[kind], procs, args)
            row |= {"bench": "sources", **watch.columns()}
            row |= {"rows": args.rows, "d": args.d_in, "f": args.d_sae, "n": args.batch_size}
            row |= {"limit_gb": args.limit_gb if procs else None}
            rows.append(row)
            if "error" not in row:
                row["of_tensor"] = row["mean_step_s"] / rows[0]["mean_step_s"]
                row["needed_rows_per_s"] = args.batch_size / rows[0]["mean_step_s"]
            print(row, file=sys.stderr, flush=True)
        if group is not None:
            group[0].rmdir()
    rows = [row | machine() for row in rows]
    say_busy(rows)
    outputs(rows, args)


if __name__ == "__main__":
    main()
