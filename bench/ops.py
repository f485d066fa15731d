"""Every operation of a training step on the CPU, beside eager torch and as a share of the product.

    python bench/ops.py --shape 2048,768,24576,32 --json -

Product: `fastsae.timing.product_seconds`. An operation is timed in turns with its eager counterpart
in this process, after their results were compared; medians. rate: products of the encoder's and
sums over gathered rows in GFLOP/s, and what the operation must read and write of matrices in GB/s.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from measure import Shape, parse_shape, write_json
from step import SHAPES, machine
from torch import Tensor

from fastsae import cpu
from fastsae.ops import RowGradient
from fastsae.timing import product_seconds

Run = Callable[[], Any]


class Op(NamedTuple):
    """What is timed: fastsae's way, torch's, and what they must do."""

    name: str
    ours: Run
    eager: Run | None
    flops: int
    moved: int
    """Bytes."""


def eager_topk(x: Tensor, W: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    top = torch.relu(torch.addmm(b, x, W.T)).topk(k)
    return top.values, top.indices


def eager_rows(coef: Tensor, idx: Tensor, src: Tensor, f: int) -> Tensor:
    terms = (coef[..., None] * src[:, None]).view(-1, src.shape[1])
    return src.new_zeros(f, src.shape[1]).index_add_(0, idx.view(-1).long(), terms)


def eager_decode(vals: Tensor, idx: Tensor, W: Tensor) -> Tensor:
    return torch.nn.functional.embedding_bag(idx.long(), W, per_sample_weights=vals, mode="sum")


def operations(shape: Shape) -> list[Op]:
    n, d, f, k = shape
    torch.manual_seed(1)
    x, g = torch.randn(n, d), torch.randn(n, d)
    W = torch.nn.functional.normalize(torch.randn(f, d))
    b = torch.zeros(f)
    vals, idx = cpu.encode(x, W, b, k)
    one, pairs, row = x[:1], n * k, d * 4
    touched = len(idx.unique())
    dead = torch.arange(f // 10, dtype=torch.int32)
    low = torch.full((f,), -1.0)
    k_aux = min(d // 2, len(dead))
    aux_vals, aux_idx = cpu.encode(x, W, low, k_aux, dead)
    aux_pairs = int((aux_idx >= 0).sum())
    gradient = [RowGradient(vals, idx, g, None)]
    p, m, v = W.clone(), torch.zeros(f, d), torch.zeros(f, d)
    last = torch.ones(f, dtype=torch.int32)

    def adam(lazy: bool) -> Run:
        hyper = (1e-4, 0.9, 0.999, 1e-8, 0.0, 1.0, 2, lazy)
        return lambda: cpu.adam_(p, None, gradient, True, m, v, last, *hyper)

    q = torch.nn.Parameter(W.clone())
    q.grad = eager_rows(vals, idx, g, f)
    torch_adam = torch.optim.Adam([q], fused=True)
    product, weights = 2 * n * d * f, f * row
    return [
        Op(
            "encode",
            lambda: cpu.encode(x, W, b, k),
            lambda: eager_topk(x, W, b, k),
            product,
            weights,
        ),
        Op("encode, fp32", lambda: cpu.encode(x, W, b, k, None, "fp32"), None, product, weights),
        Op(
            "encode, one token",
            lambda: cpu.encode(one, W, b, k),
            lambda: eager_topk(one, W, b, k),
            product // n,
            weights,
        ),
        Op(
            "decode",
            lambda: cpu.decode_fwd(vals, idx, W),
            lambda: eager_decode(vals, idx, W),
            2 * pairs * d,
            pairs * row,
        ),
        Op(
            "decode, error, dvals",
            lambda: cpu.decode_error(vals, idx, W, None, g, None, False),
            None,
            4 * pairs * d,
            pairs * row,
        ),
        Op("index", lambda: cpu.inverse_index(idx, f), None, 0, 3 * 4 * pairs),
        Op(
            "row gradients",
            lambda: cpu.row_gradients(vals, idx, g, f)[0],
            lambda: eager_rows(vals, idx, g, f),
            2 * pairs * d,
            pairs * row + weights,
        ),
        Op("adam, from pairs", adam(False), torch_adam.step, 0, 6 * weights),
        Op("adam, lazy, from pairs", adam(True), None, 0, 6 * touched * row),
        Op(
            "auxk encode",
            lambda: cpu.encode(x, W, low, k_aux, dead),
            None,
            2 * n * d * len(dead) + 2 * aux_pairs * d,
            aux_pairs * row,
        ),
        Op(
            "auxk decode, error, dvals",
            lambda: cpu.decode_error(aux_vals, aux_idx, W, None, g, None, False),
            None,
            4 * aux_pairs * d,
            aux_pairs * row,
        ),
    ]


def seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def check(op: Op) -> None:
    """Raises where fastsae's result and torch's differ beyond rounding."""
    if op.eager is None or op.name.startswith("adam"):
        return  # tests/ compare these with the float64 reference
    ours, eager = op.ours(), op.eager()
    for a, e in zip(*((r if isinstance(r, tuple) else (r,)) for r in (ours, eager)), strict=True):
        if a.is_floating_point():
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


def measure(op: Op, repeats: int) -> dict[str, float | None]:
    check(op)
    runs = [run for run in (op.ours, op.eager) if run is not None]
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for run, found in zip(runs, times, strict=True):
            found.append(seconds(run))
    medians = [statistics.median(found) for found in times]
    return {"ours_s": medians[0], "eager_s": medians[1] if len(medians) > 1 else None}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape", type=parse_shape, action="append", metavar="N,D,F,K", help="may be repeated"
    )
    parser.add_argument("--repeats", type=int, default=7, help="the median counts (default 7)")
    parser.add_argument("--json", metavar="FILE", help="write the rows as JSON; - for stdout")
    args = parser.parse_args()
    rows = []
    header = "{:26} {:>9} {:>9} {:>9} {:>9} {:>9}"
    for shape in args.shape or SHAPES:
        n, d, f, k = shape
        product = product_seconds(torch.randn(n, d), torch.randn(f, d))
        print(f"N {n}, D {d}, F {f}, K {k}: product {product * 1e3:.1f} ms", file=sys.stderr)
        names = ("operation", "ms", "÷product", "eager ms", "GFLOP/s", "GB/s")
        print(header.format(*names), file=sys.stderr)
        for op in operations(shape):
            found = measure(op, args.repeats)
            ours, eager = found["ours_s"], found["eager_s"]
            assert ours is not None
            rates = {"gflops": op.flops / ours / 1e9, "gbytes_s": op.moved / ours / 1e9}
            sizes = {"n": n, "d": d, "f": f, "k": k, "product_s": product}
            rows.append({"op": op.name, **sizes, **found, **rates} | machine())
            cells = (ours * 1e3, ours / product, eager and eager * 1e3, *rates.values())
            texts = [
                "-" if c is None else f"{c:.{3 if i == 1 else 1}f}" for i, c in enumerate(cells)
            ]
            print(header.format(op.name, *texts), file=sys.stderr)
    write_json(rows, args.json)


if __name__ == "__main__":
    main()
