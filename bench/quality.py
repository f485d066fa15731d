"""FVU against seconds of training: fastsae, dense torch and the peer libraries, all from one start.

    python bench/quality.py --data data/minilm_l3 --csv bench/results/quality.csv

Everyone trains on the same rows in the same order, centred and scaled to a variance of 1, from the
same weights, with TopK, at the same constant learning rate of Adam (sparsify's Signum has its own),
in a process of its own. The FVU is that of held-out rows; evaluations do not count as seconds.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
from pathlib import Path

import numpy as np
import peers
import torch
from curve import Point, curve, write_problem
from measure import Shape, Start
from peer import PEERS
from rows import Row, add_outputs, machine, outputs, say_busy
from step import build_of

from fastsae.data import open_source, split
from fastsae.order import permutation

OURS = {"fastsae": "adam", "torch-dense": "torch-adam"}


def make_problem(folder: Path, args: argparse.Namespace) -> Shape:
    """Writes the rows and the start; the shape."""
    source, kept = split(open_source(args.data), args.holdout)
    train = source.rows(permutation(source.n_rows, seed=0))
    mean = train.double().mean(0).float()
    train -= mean
    scale = float(train.square().mean().sqrt())
    train /= scale
    holdout = (kept.rows(np.arange(kept.n_rows)) - mean) / scale
    d = train.shape[1]
    rows = torch.nn.functional.normalize(
        torch.randn(args.d_sae, d, generator=torch.Generator().manual_seed(0))
    )
    settings = {"seconds": args.seconds, "lr": args.lr}
    write_problem(folder, train, holdout, Start(rows, rows), settings)
    return args.batch_size, d, args.d_sae, args.k


def our_curve(provider: str, shape: Shape, folder: str, threads: int) -> list[Point]:
    torch.set_num_threads(threads)
    return curve(build_of(provider, OURS[provider], []), shape, folder)


def rows_of(args: argparse.Namespace, shape: Shape, folder: str) -> list[Row]:
    rows: list[Row] = []
    context = multiprocessing.get_context("spawn")
    for name in args.provider or (*OURS, *PEERS):
        row: Row = {"provider": name, **dict(zip("ndfk", shape, strict=True))}
        if name in OURS:
            with context.Pool(1) as child:
                points = child.apply(our_curve, (name, shape, folder, args.threads))
            row["optimizer"] = OURS[name]
        else:
            row = peers.run(name, shape, "--threads", args.threads, "--curve", folder)
            points = row.pop("curve", [{}])
        shared = {"lr": args.lr, "data": Path(args.data).name, "threads": args.threads}
        rows += [machine() | row | {"bench": "quality"} | shared | point for point in points]
        last = rows[-1]
        told = f"{last['steps']} steps, FVU {last['fvu']:.4f}" if "fvu" in last else last["error"]
        print(f"{name:20} {told}", file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="as for fastsae train")
    parser.add_argument("--provider", action="append", choices=[*OURS, *PEERS])
    parser.add_argument("--seconds", type=float, default=60, help="of each (default 60)")
    parser.add_argument("--d-sae", type=int, default=6144)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--holdout", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    add_outputs(parser)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = rows_of(args, make_problem(Path(folder), args), folder)
    say_busy(rows)
    outputs(rows, args)


if __name__ == "__main__":
    main()
