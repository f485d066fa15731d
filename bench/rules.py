"""What each selection rule reaches on real activations: FVU, dead share, L0 and its spread.

    python bench/rules.py --data data/minilm_l3 --seeds 3 --csv bench/results/rules-minilm-l3.csv

Every rule trains on the same rows with the same optimiser, learning rate and L0 (a budget, or a
penalty steered to it), one seed of data order and initial weights each, and is evaluated on held
out rows in its form of inference: FVU, the share of latents that no held-out row activates, the
mean L0, the L0 in the form of training, and quantiles of L0 over tokens. gradient-topk needs data
with gradients and is left out where there are none.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from measure import Watch
from rows import add_outputs, machine, outputs, say_busy

from fastsae import SAE, SAEConfig, Selection
from fastsae.data import Source, in_order, open_source, split
from fastsae.options import rule_from
from fastsae.train import TrainConfig, Trainer, evaluate

QUANTILES = (0.05, 0.5, 0.95)


@torch.no_grad()
def l0_quantiles(sae: SAE, source: Source) -> list[float]:
    counts = []
    for batch in in_order(source, 4096):
        codes = sae.encode(batch.x)
        token = codes.token_ids().reshape(-1)[(codes.vals != 0).reshape(-1)]
        counts.append(token.bincount(minlength=codes.n_tokens))
    return torch.cat(counts).float().quantile(torch.tensor(QUANTILES)).tolist()


def measure(
    name: str, parameters: dict[str, str], train: Source, holdout: Source, args: argparse.Namespace
) -> list[dict[str, object]]:
    rows = []
    for seed in range(args.seeds):
        rule = rule_from(name, args.k, parameters)
        config = SAEConfig(train.d_in, args.d_sae, rule, dead_after=args.dead_after)
        settings = TrainConfig(
            steps=args.rows // args.batch_size,
            batch_size=args.batch_size,
            lr=args.lr,
            seed=seed,
        )
        sae = SAE(config, seed=seed)
        start = time.perf_counter()
        Trainer(sae, train, settings).run(progress=False)
        seconds = time.perf_counter() - start
        low, median, high = l0_quantiles(sae.eval(), holdout)
        row = {"rule": name, "parameters": parameters, "seed": seed, **evaluate(sae, holdout)}
        row |= {"l0_5": low, "l0_50": median, "l0_95": high, "seconds": seconds}
        rows.append(row)
        print(
            f"{name:16} seed {seed}  fvu {row['fvu']:.4f}  l0 {row['l0']:6.2f} "
            f"({low:.0f} {median:.0f} {high:.0f})  dead {row['dead_share']:.3f}  {seconds:.0f} s",
            file=sys.stderr,
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--rule", action="append", choices=sorted(Selection.rules))
    parser.add_argument(
        "--set", action="append", default=[], metavar="RULE.PARAM=VALUE", help="a rule's parameter"
    )
    parser.add_argument("--d-sae", type=int, default=6144)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=1_000_000, help="training rows in all")
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--dead-after", type=int, default=200_000, help="tokens")
    parser.add_argument("--holdout", type=int, default=20480)
    add_outputs(parser)
    args = parser.parse_args()
    gradients = bool(args.rule) and any(Selection.rules[name].needs_gradient for name in args.rule)
    source = open_source(args.data, gradients=gradients)
    names = args.rule or [
        n for n in sorted(Selection.rules) if not Selection.rules[n].needs_gradient
    ]
    train, holdout = split(source, args.holdout)
    rows: list[dict[str, object]] = []
    for name in names:
        settings = [text.partition("=") for text in args.set if text.startswith(f"{name}.")]
        parameters = {left.removeprefix(f"{name}."): value for left, _, value in settings}
        with Watch() as watch:
            found = measure(name, parameters, train, holdout, args)
        shared = {"data": Path(args.data).name, "d_sae": args.d_sae, "k": args.k}
        shared |= {"rows": args.rows, "batch_size": args.batch_size, "lr": args.lr}
        shared |= {"bench": "rules", **machine(), **watch.columns()}
        rows += [row | shared for row in found]
        outputs(rows, args)  # as far as it has come: the whole takes long
    say_busy(rows)
    print(f"{'rule':16} {'FVU':>16} {'L0':>6} {'training L0':>11} {'dead':>6}")
    for name in names:
        of = [row for row in rows if row["rule"] == name]
        fvu = [float(row["fvu"]) for row in of]  # type: ignore[arg-type]
        mean = {
            key: statistics.mean(float(row.get(key, row["l0"])) for row in of)  # type: ignore[arg-type]
            for key in ("l0", "training_l0", "dead_share")
        }
        spread = statistics.stdev(fvu) if len(fvu) > 1 else 0.0
        print(
            f"{name:16} {statistics.mean(fvu):8.4f} ± {spread:.4f} {mean['l0']:6.2f} "
            f"{mean['training_l0']:11.2f} {mean['dead_share']:6.1%}"
        )


if __name__ == "__main__":
    main()
