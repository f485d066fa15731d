"""Where width stops paying: held-out FVU and dead share against F, at equal tokens.

    python bench/width.py --data data/minilm_l3 --csv bench/results/width-minilm-l3.csv

Each width trains from the same rows in the same order, K 32, with exact Adam at one learning rate
and the encoder fitted at the start (`TrainConfig.fit_encoder`); the last fifth of the steps the
rate falls. A latent is dead that none of a quarter of the training rows activates: dead_share_rows.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from measure import Watch
from rows import Row, add_outputs, machine, outputs

from fastsae import SAE, SAEConfig, TopK
from fastsae.config import TrainConfig
from fastsae.data import Source, open_source, split
from fastsae.runs import final_figures
from fastsae.train import Trainer, evaluate


def trained(rows: Source, holdout: Source, d_sae: int, settings: TrainConfig) -> Row:
    sae = SAE(SAEConfig(rows.d_in, d_sae, TopK(32)), seed=settings.seed)
    trainer = Trainer(sae, rows, settings)
    with Watch() as watch:
        figures = trainer.run(progress=False)
    found = evaluate(sae, holdout)
    found |= final_figures(sae, rows, holdout, settings, figures["train_seconds"])
    names = ("fvu", "l0", "dead_share", "dead_share_rows")
    return {
        "bench": "width",
        "n": settings.batch_size,
        "d": rows.d_in,
        "f": d_sae,
        "k": 32,
        "steps": settings.steps,
        "lr": settings.lr,
        **{name: found[name] for name in names},
        "seconds": figures["train_seconds"],
        "threads": torch.get_num_threads(),
        **watch.columns(),
        **machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="a folder that harvest wrote")
    parser.add_argument("--powers", type=int, nargs=2, default=(12, 18), metavar=("FROM", "TO"))
    parser.add_argument("--steps", type=int, default=480)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=1e-3)
    add_outputs(parser)
    args = parser.parse_args()
    rows, holdout = split(open_source(args.data), 8192)
    settings = TrainConfig(
        steps=args.steps, batch_size=args.batch_size, lr=args.lr, fit_encoder=True
    )
    found = []
    for power in range(args.powers[0], args.powers[1] + 1):
        row = trained(rows, holdout, 2**power, settings)
        found.append(row)
        line = f"F {row['f']:8,}  FVU {row['fvu']:.4f}  dead {row['dead_share']:.1%}"
        print(f"{line}  {row['seconds']:.0f} s", file=sys.stderr, flush=True)
    outputs(found, args)


if __name__ == "__main__":
    main()
