"""What the kernels and a training step must cost on a GPU, from arithmetic and bytes alone.

    python bench/roofline.py                     H100, at the rates below
    python bench/roofline.py --hbm 4.3 --json -  another card, as JSON

A kernel takes as long as what bounds it: its products (tensor cores, or the vector units that do
all else), its bytes from memory or its bytes through L2. A step is the sum of its kernels; nothing
overlaps. FLOPs and bytes are the cost functions' in kernels/. Latents are taken to fire evenly, so
a batch touches F·(1 - exp(-NK/F)) of them. The unit of ratios is the time of a product in bf16;
where Adam keeps fp32 weights, the screen multiplies those, in tf32.

encode_batch, encode_columns and encode_threshold select as many pairs as encode: of the whole
batch, of each latent, or above thresholds. They are beside the step, not in it.

`encode` rescores its candidates from rows of W_enc that no slice holds: --candidates of them for
each of the k, those that the screen's margin leaves. Bytes through L2 are all that programs read.
Of the screen these are a byte for 64 FLOPs, which binds it, unless the card merges what neighbours
read at the same time; "merged" is the case that L2 binds it no more than torch's product.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from typing import Any, TextIO

from measure import Shape, parse_shape
from rows import add_outputs, outputs

from fastsae.kernels.adam import adam_cost
from fastsae.kernels.checks import Cost
from fastsae.kernels.column_sum import column_sum_cost
from fastsae.kernels.decode import decode_cost
from fastsae.kernels.decode_error import decode_error_cost
from fastsae.kernels.encode import encode_cost
from fastsae.kernels.encode_batch import encode_batch_cost
from fastsae.kernels.encode_columns import encode_columns_cost
from fastsae.kernels.encode_threshold import encode_threshold_cost
from fastsae.kernels.gradients import gradient_cost, row_config
from fastsae.kernels.index import index_cost
from fastsae.kernels.sums import vector_sum_cost
from fastsae.kernels.unit_rows import unit_rows_cost

SHAPES: tuple[Shape, ...] = (
    (4096, 768, 24576, 32),
    (8192, 2304, 65536, 64),
    (8192, 4096, 131072, 64),
    (8192, 4096, 1048576, 64),
    (4096, 2688, 1048576, 32),
)


@dataclass(frozen=True)
class Rates:
    """What a card achieves: TFLOP/s, TB/s."""

    bf16: float = 800.0
    tf32: float = 400.0
    vector: float = 30.0
    hbm: float = 3.0
    l2: float = 5.5


@dataclass(frozen=True)
class Optimizer:
    """How Adam runs: bytes of an element of W_enc and W_dec, and with their moments."""

    itemsize: int
    state_bytes: int
    moves_all: bool


OPTIMIZERS = {
    "exact fp32": Optimizer(4, 12, True),
    "lazy fp32": Optimizer(4, 12, False),
    "beta1=0 fp32": Optimizer(4, 8, False),
    "bf16 p, fp32 m+v": Optimizer(2, 10, True),
    "bf16 p+m+v": Optimizer(2, 6, True),
    "bf16 p+m+v lazy": Optimizer(2, 6, False),
}
SELECTIONS = ("encode_batch", "encode_columns", "encode_threshold")
TENSOR_CORES = ("product", "encode.screen", *(f"{name}.screen" for name in SELECTIONS))


def add(*costs: Cost) -> Cost:
    return Cost(*map(sum, zip(*costs, strict=True)))


def touched_latents(shape: Shape) -> int:
    n, _, f, k = shape
    return round(f * -math.expm1(-n * k / f))


def gradient(shape: Shape, project: bool) -> Cost:
    """What Adam reads to make the gradient of W_enc, or with project of W_dec."""
    n, d, _, k = shape
    width = d if project else min(d, 1 << row_config(d, False)["LOG2_D"])
    return gradient_cost(n, d, n * k, width)


def kernel_costs(
    shape: Shape, itemsize: int, moved: int, state_bytes: int, scored: float
) -> dict[str, Cost]:
    """Of every kernel: weights of itemsize, Adam on `moved` rows, `scored` candidates a token."""
    n, d, f, k = shape
    stages = encode_cost(n, d, f, k, itemsize, scored)
    product = Cost(2 * n * d * f, *[2 * (n * d + f * d + n * f)] * 2)
    selections = zip(
        SELECTIONS, (encode_batch_cost, encode_columns_cost, encode_threshold_cost), strict=True
    )
    index, update = index_cost(n * k, f), adam_cost(moved * d, state_bytes)
    rows = add(gradient_cost(n, d, n * k, 128), Cost(0, 4 * f * d, 4 * f * d))
    rows_read = Cost(8 * f * d, *[f * d * itemsize + 4 * f] * 2)
    units = unit_rows_cost(f, d, itemsize)
    return {
        "product": product,
        **{f"encode.{stage}": cost for stage, cost in stages.items()},
        **{
            f"{name}.{stage}": cost
            for name, cost_of in selections
            for stage, cost in cost_of(n, d, f, n * k, itemsize, scored / k).items()
        },
        "decode_fwd": decode_cost(n, d, f, k, itemsize),
        "decode_bwd_vals": decode_cost(n, d, f, k, itemsize),
        "decode_error": decode_error_cost(n, d, f, k, itemsize),
        "index": index,
        "row_gradients": add(index, rows),
        "row_sums": add(index, gradient_cost(n, 1, n * k, 128)),
        "column_sum W_enc": column_sum_cost(f, d, itemsize),
        "column_sum error": column_sum_cost(n, d, 4),
        "vector_sum": vector_sum_cost(n),
        "square_norm": add(index, gradient(shape, True), rows_read, vector_sum_cost(f)),
        "project_rows": units["project"],
        "normalize_rows": units["normalize"],
        "adam W_enc": add(index, gradient(shape, False), update),
        "adam W_dec": add(index, gradient(shape, True), update),
        "elementwise": elementwise(shape),
    }


def elementwise(shape: Shape) -> Cost:
    """torch's part: x (bf16) scaled, centred and rounded to bf16; which latents fired."""
    n, d, f, _ = shape
    size = n * d * ((2 + 4) + (4 + 4) + (4 + 2)) + f * (16 + 8 + 1)
    return Cost(3 * n * d + 2 * f, size, size)


# What a training step runs, once each.
STEP = (
    "elementwise",
    "encode.norms",
    "encode.screen",
    "encode.select",
    "encode.score",
    "decode_error",
    "vector_sum",
    "column_sum error",
    "row_sums",
    "column_sum W_enc",
    "adam W_enc",
    "adam W_dec",
)


def predict(
    name: str, cost: Cost, itemsize: int, rates: Rates, merged: bool = False
) -> tuple[float, str]:
    """Milliseconds, and what bounds them; merged: L2 does not bind the tensor cores."""
    flops = rates.vector
    if name in TENSOR_CORES:
        flops = rates.bf16 if itemsize == 2 else rates.tf32
    bounds = {
        "flops": cost.flops / flops,
        "hbm": cost.bytes_once / rates.hbm,
        "l2": cost.bytes_gathered / rates.l2,
    }
    if merged and name in TENSOR_CORES:
        del bounds["l2"]
    bound = max(bounds, key=lambda what: bounds[what])
    return bounds[bound] * 1e-9, bound


def rows_of(shape: Shape, rates: Rates, candidates: float) -> list[dict[str, Any]]:
    """Kernels of every optimiser's step, then the step: ratio is to a bf16 product's time."""
    n, d, f, k = shape
    rows = []
    groups = {"encode": [s for s in STEP if s.startswith("encode.")], "step": list(STEP)}
    stages = kernel_costs(shape, 2, 0, 0, 0)
    groups |= {name: [s for s in stages if s.startswith(f"{name}.")] for name in SELECTIONS}
    for optimizer, how in OPTIMIZERS.items():
        moved = f if how.moves_all else touched_latents(shape)
        costs = kernel_costs(shape, how.itemsize, moved, how.state_bytes, k * candidates)
        unit = predict("product", costs["product"], 2, rates)
        times, merged = (
            {name: predict(name, cost, how.itemsize, rates, m) for name, cost in costs.items()}
            for m in (False, True)
        )
        times["product"] = merged["product"] = unit
        for group, names in groups.items():
            costs[group] = add(*(costs[name] for name in names))
            for found in (times, merged):
                parts = {name: found[name][0] for name in names}
                found[group] = sum(parts.values()), f"mostly {max(parts, key=parts.__getitem__)}"
        for name, cost in costs.items():
            ms, bound = times[name]
            rows.append(
                {
                    **{"n": n, "d": d, "f": f, "k": k, "optimizer": optimizer, "kernel": name},
                    **{"flops": cost.flops, "hbm_bytes": cost.bytes_once},
                    **{"l2_bytes": cost.bytes_gathered, "ms": ms, "bound": bound},
                    **{"ratio": ms / unit[0], "ratio_merged": merged[name][0] / unit[0]},
                }
            )
    return rows


def print_tables(rows: list[dict[str, Any]], out: TextIO) -> None:
    shapes = list(dict.fromkeys(tuple(row[size] for size in "ndfk") for row in rows))
    for shape in shapes:
        here = [row for row in rows if tuple(row[size] for size in "ndfk") == shape]
        print("\nN,D,F,K = " + ",".join(map(str, shape)), file=out)
        shown = "bf16 p+m+v"
        heads = (shown, "GFLOP", "HBM MB", "L2 MB", "ms", "÷ product", "bound")
        print("{:23} {:>10} {:>10} {:>10} {:>9} {:>9}  {}".format(*heads), file=out)
        for row in here:
            if row["optimizer"] == shown:
                sizes = (row["flops"] / 1e9, row["hbm_bytes"] / 1e6, row["l2_bytes"] / 1e6)
                line = "{:23} {:10.1f} {:10.1f} {:10.1f}".format(row["kernel"], *sizes)
                print(f"{line} {row['ms']:9.3f} {row['ratio']:9.3f}  {row['bound']}", file=out)
        ratios = ("÷ product", "encode", "step", "merged:", "encode", "step")
        print("{:23} {:>10} {:>10} {:>10} {:>9} {:>9}".format(*ratios), file=out)
        for optimizer in OPTIMIZERS:
            of = {r["kernel"]: r for r in here if r["optimizer"] == optimizer}
            encode, step = of["encode"], of["step"]
            line = f"{optimizer:23} {encode['ratio']:10.2f} {step['ratio']:10.2f} {'':10} "
            line += f"{encode['ratio_merged']:9.2f} {step['ratio_merged']:9.2f}"
            print(line, file=out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape", type=parse_shape, action="append", metavar="N,D,F,K", help="may be repeated"
    )
    for name, unit in (
        ("bf16", "TFLOP/s of bf16 products"),
        ("tf32", "TFLOP/s of tf32 products, the screen's where W_enc is fp32"),
        ("vector", "TFLOP/s of separate fp32 products and sums"),
        ("hbm", "TB/s from memory"),
        ("l2", "TB/s from L2"),
    ):
        default = getattr(Rates, name)
        parser.add_argument(
            f"--{name}", type=float, default=default, help=f"{unit} (default {default})"
        )
    parser.add_argument(
        "--candidates", type=float, default=1.5, help="rescored for each of the k (default 1.5)"
    )
    add_outputs(parser)
    args = parser.parse_args()
    rates = Rates(args.bf16, args.tf32, args.vector, args.hbm, args.l2)
    if min(*vars(rates).values(), args.candidates - 1) < 0 or 0 in vars(rates).values():
        parser.error("expected rates above 0 and at least 1 candidate for each of the k")
    shapes = args.shape or SHAPES
    rows = [row for shape in shapes for row in rows_of(shape, rates, args.candidates)]
    print_tables(rows, sys.stderr if args.json == "-" else sys.stdout)
    outputs(rows, args)


if __name__ == "__main__":
    main()
