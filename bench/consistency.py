"""How consistent dictionaries are, and what it costs to say so.

    python bench/consistency.py tokens --data data/minilm_l3 --csv FILE --svg FILE
    python bench/consistency.py organism --csv FILE
    python bench/consistency.py scale --shape 131072,768 --csv FILE

tokens: three seeds (of weights and order) of each rule are trained on more and more tokens, each a
training of its own with its whole schedule, and compared: PW-MCC and its deviation over the pairs,
the encoders' MCC, the share of latents shared, beside FVU and dead latents on held-out rows. --svg
draws PW-MCC over tokens.

organism: the same on data with known features, with GT-MCC beside PW-MCC.

scale: one sparse matching of two dictionaries: seconds, most memory resident, and the certified
gap. B has A's rows in another order with noise of various sizes, 30 % of them replaced by random
ones; with --random all are.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from measure import memory
from rows import Row, add_outputs, machine, outputs

from fastsae import SAE, SAEConfig
from fastsae.consistency import compare, gt_mcc
from fastsae.data import Source, open_source, split
from fastsae.matching import match
from fastsae.options import rule_from
from fastsae.organism import Organism
from fastsae.report.charts import Scale
from fastsae.train import TrainConfig, Trainer, evaluate

RULES = ("topk", "batchtopk", "jumprelu")
SEEDS = 3


def trained(rule: str, d_sae: int, k: int, data: Source, settings: TrainConfig) -> SAE:
    config = SAEConfig(data.d_in, d_sae, rule_from(rule, k, {}), dead_after=200_000)
    sae = SAE(config, seed=settings.seed)
    Trainer(sae, data, settings).run(progress=False)
    return sae.eval()


def compared(saes: list[SAE], holdout: Source) -> Row:
    found = compare(saes)
    assert all(pair.encoder is not None for pair in found.pairs)
    figures = [evaluate(sae, holdout) for sae in saes]
    mean = {
        key: statistics.mean(figure[key] for figure in figures)
        for key in ("fvu", "l0", "dead_share")
    }
    return {
        "pw_mcc": found.pw_mcc,
        "deviation": found.deviation,
        "pairs": [pair.decoder.mean for pair in found.pairs],
        "encoder_mcc": statistics.mean(p.encoder.mean for p in found.pairs if p.encoder),
        "agreement": statistics.mean(pair.agreement for pair in found.pairs),
        "shared": statistics.mean(pair.shared() for pair in found.pairs),
        **mean,
    }


def told(row: Row) -> None:
    keys = ("pw_mcc", "gt_mcc", "shared", "fvu", "l0", "dead_share")
    figures = "  ".join(f"{key} {row[key]:.4f}" for key in keys if key in row)
    print(f"{row['rule']:10} {row['tokens']:>9,} tokens  {figures}", file=sys.stderr, flush=True)


def over_tokens(args: argparse.Namespace) -> list[Row]:
    train, holdout = split(open_source(args.data), args.holdout)
    rows = []
    for tokens in args.tokens:
        for rule in args.rule or RULES:
            saes = []
            for seed in range(SEEDS):
                settings = TrainConfig(
                    steps=tokens // args.batch_size,
                    batch_size=args.batch_size,
                    lr=args.lr,
                    seed=seed,
                )
                saes.append(trained(rule, args.d_sae, args.k, train, settings))
            row = {"rule": rule, "tokens": tokens, "data": Path(args.data).name}
            row |= {name: getattr(args, name) for name in ("d_sae", "k", "batch_size", "lr")}
            row |= compared(saes, holdout)
            rows.append(row | machine())
            told(row)
            outputs(rows, args)  # as far as it has come
        if args.svg:
            Path(args.svg).write_text(drawing(rows))
    return rows


def on_organism(args: argparse.Namespace) -> list[Row]:
    organism, rows = Organism(), []
    x, _ = organism.sample()
    holdout, _ = organism.sample(4096, seed=1)
    for tokens in args.tokens:
        for rule in args.rule or RULES:
            saes = []
            for seed in range(5):
                settings = TrainConfig(
                    steps=tokens // 1024, batch_size=1024, lr=args.lr, seed=seed, b_dec="zero"
                )
                saes.append(trained(rule, 32, 3, open_source(x), settings))
            row = {"rule": rule, "tokens": tokens, "lr": args.lr}
            row |= compared(saes, open_source(holdout))
            truths = [gt_mcc(organism.features, sae.W_dec).mean for sae in saes]
            row |= {"gt_mcc": statistics.mean(truths), "gt_mccs": truths}
            rows.append(row | machine())
            told(row)
    return rows


def at_scale(args: argparse.Namespace) -> list[Row]:
    f, d = args.shape
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(f, d, generator=generator)
    B = torch.randn(f, d, generator=generator)
    if not args.random:
        noise = 2.5 * torch.rand(f, 1, generator=generator)
        noise[torch.rand(f, generator=generator) < 0.3] = 1e6
        B.mul_(noise).add_(A)
        B = B[torch.randperm(f, generator=generator)]
    start = time.perf_counter()
    found = match(A, B, method="sparse", gap=args.gap)
    row = {"f": f, "d": d, "rows": "random" if args.random else "planted", "asked_gap": args.gap}
    row |= {"mcc": found.mean, "upper": found.upper, "gap": found.gap}
    row |= {"seconds": time.perf_counter() - start, "peak_bytes": memory("VmHWM")}
    row |= {"threads": torch.get_num_threads()}
    print(row, file=sys.stderr)
    return [row | machine()]


# ---- the drawing ----

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 640, 400, 56, 40, 48
COLOURS = ("#14697a", "#b4531a", "#6b4fa0", "#3f7d3a")


def drawing(rows: list[Row]) -> str:
    """PW-MCC over training tokens, a line a rule, ± a deviation of the pairs: an SVG."""
    x = Scale(min(r["tokens"] for r in rows), max(r["tokens"] for r in rows), log=True)
    y = Scale(0, 1)

    def at(tokens: float, value: float) -> tuple[float, float]:
        plot = WIDTH - LEFT - 16, HEIGHT - TOP - BOTTOM
        return LEFT + x.at(tokens) * plot[0], TOP + (1 - y.at(value)) * plot[1]

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="13" fill="#333">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
    ]
    for value in y.ticks(5):
        (left, height), (right, _) = at(x.low, value), at(x.high, value)
        parts.append(f'<path d="M{left:.1f} {height:.1f}H{right:.1f}" stroke="#ddd"/>')
        parts.append(
            f'<text x="{left - 8:.1f}" y="{height + 4:.1f}" text-anchor="end">{value:g}</text>'
        )
    for tokens in sorted({r["tokens"] for r in rows}):
        place, bottom = at(tokens, 0)
        text = f"{tokens / 1e6:.3g}M" if tokens >= 1e6 else f"{tokens / 1e3:.3g}k"
        parts.append(
            f'<text x="{place:.1f}" y="{bottom + 18:.1f}" text-anchor="middle">{text}</text>'
        )
    parts.append(
        f'<text x="{LEFT}" y="{HEIGHT - 10}">PW-MCC over training tokens (log scale)</text>'
    )
    for i, rule in enumerate(dict.fromkeys(r["rule"] for r in rows)):
        of = [r for r in rows if r["rule"] == rule]
        points = [at(r["tokens"], r["pw_mcc"]) for r in of]
        line = "L".join(f"{px:.1f} {py:.1f}" for px, py in points)
        marks = "".join(
            f"M{at(r['tokens'], r['pw_mcc'] - r['deviation'])[0]:.1f} "
            f"{at(r['tokens'], r['pw_mcc'] - r['deviation'])[1]:.1f}"
            f"V{at(r['tokens'], r['pw_mcc'] + r['deviation'])[1]:.1f}"
            for r in of
        )
        stroke = f'fill="none" stroke="{COLOURS[i % len(COLOURS)]}"'
        parts.append(f'<path d="M{line}" {stroke} stroke-width="2"/>')
        parts.append(f'<path d="{marks}" {stroke} stroke-width="5" stroke-opacity="0.5"/>')
        parts.append(f'<path d="M{LEFT + 120 * i} 20h18" {stroke} stroke-width="2"/>')
        parts.append(f'<text x="{LEFT + 24 + 120 * i}" y="24">{rule}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("tokens", "organism", "scale"))
    parser.add_argument("--data")
    parser.add_argument("--rule", action="append")
    parser.add_argument("--d-sae", type=int, default=3072)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--holdout", type=int, default=20480)
    parser.add_argument(
        "--shape",
        default=(131072, 768),
        metavar="F,D",
        type=lambda text: tuple(map(int, text.split(","))),
    )
    parser.add_argument("--random", action="store_true")
    parser.add_argument("--gap", type=float, default=0.01)
    parser.add_argument("--svg", metavar="FILE")
    add_outputs(parser)
    args = parser.parse_args()
    if args.part == "tokens":
        args.tokens = args.tokens or [62_500 * 2**i for i in range(6)]
        rows = over_tokens(args)
    elif args.part == "organism":
        args.tokens = args.tokens or [62_500 * 4**i for i in range(4)]
        rows = on_organism(args)
    else:
        rows = at_scale(args)
    outputs(rows, args)


if __name__ == "__main__":
    main()
