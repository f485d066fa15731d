"""Every operation of a step, on every backend, beside torch's ways and what the machine allows.

    python bench/ops.py --shape 2048,768,24576,32 --json -

First the machine's rates are measured (limits.py). Then, for each operation, every provider
(operations.py) passes a gate, or its row says WRONG and has no time; then they are timed in turns,
on inputs that take turns: median and range, as a multiple of the encoder product
(`fastsae.timing.product_seconds`), the rates reached, and the share of the limit: how long the
operation's products or its bytes take at the measured rates, whichever is longer. On a CPU, memory
that malloc got stays with the process, for all providers: no first touch of pages is timed. The
selection rules follow, at the first shape with a quarter of its tokens: plain forms are slow.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from clock import Clock
from limits import Rates, measure_rates
from measure import Shape, Watch, parse_shape, product_seconds, spread
from operations import Operations
from problem import Op, Run
from rows import Row, add_outputs, machine, outputs, say_busy
from rule_operations import RuleOperations

SHAPES: tuple[Shape, ...] = ((2048, 768, 24576, 32), (1024, 384, 131072, 32))


def keep_memory() -> None:
    """malloc keeps what is freed and takes nothing by mmap (glibc), so that pages stay touched."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for option, value in ((-4, 0), (-1, 2**31 - 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD
            libc.mallopt(option, value)


def backends_of(device: torch.device) -> list[str]:
    return ["cpu" if device.type == "cpu" else "triton", "reference"]


def gate(op: Op, run: Run) -> str | None:
    """Why a provider is not timed: WRONG, or an error; None where its result is right."""
    try:
        result = run(0)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    try:
        op.check(result)
    except AssertionError as error:
        return f"WRONG: {' '.join(str(error).split())[:200]}"
    return None


def measure_op(op: Op, clock: Clock, rates: Rates, product_ms: float) -> Iterator[Row]:
    """A row for each provider."""
    errors = {name: gate(op, run) for name, run in op.providers.items()}
    right = {name: run for name, run in op.providers.items() if errors[name] is None}
    with Watch() as watch:
        times = clock.turns(right)
    limit, bound = rates.limit(op.cost)
    uncached = rates.uncached(op.cost)
    for name in op.providers:
        row: Row = {"bench": "ops", "op": op.name, "provider": name}
        if errors[name]:
            yield row | {"error": errors[name]}
            continue
        found = spread(times[name])
        ms = found["ms"]
        yield (
            row
            | found
            | {
                "product_ms": product_ms,
                "ratio": ms / product_ms,
                "flops": op.cost.flops,
                "moved_bytes": op.cost.moved,
                "named_bytes": max(op.cost.named, op.cost.moved),
                "gflop_s": op.cost.flops / ms * 1e-6,
                "gb_s": op.cost.moved / ms * 1e-6,
                "limit_ms": limit,
                "of_limit": limit / ms,
                "bound": bound,
                "uncached_ms": uncached,
                "of_uncached": uncached / ms,
                "note": op.note,
                **watch.columns(),
            }
        )


def measure_shape(
    shape: Shape, ops: Iterable[Op], clock: Clock, rates: Rates, only: str
) -> Iterator[Row]:
    n, d, f, _ = shape
    product = product_seconds(
        torch.randn(n, d, device=clock.device), torch.randn(f, d, device=clock.device)
    )
    for op in ops:
        if only in op.name:
            for row in measure_op(op, clock, rates, product * 1e3):
                yield dict(zip("ndfk", shape, strict=True)) | row | rates.columns()
        torch.compiler.reset()
        gc.collect()


HEADER = ("provider", "ms", "(range)", "÷product", "GFLOP/s", "GB/s", "of limit", "uncached", "")


def print_row(row: Row) -> None:
    line = f"{row['op']:22} {row['provider']:24} "
    if "error" in row:
        line += row["error"]
    else:
        line += f"{row['ms']:9.2f} {row['min_ms']:8.2f}–{row['max_ms']:<8.2f} {row['ratio']:8.3f} "
        line += f"{row['gflop_s']:8.1f} {row['gb_s']:6.1f} {row['of_limit']:8.0%} "
        line += f"{row['of_uncached']:8.0%} "
        if row["provider"].startswith("fastsae"):
            in_memory = row["bound"] == "memory"
            work, unit = (
                row["moved_bytes" if in_memory else "flops"],
                "GB" if in_memory else "GFLOP",
            )
            line += f" {work / 1e9:.3g} {unit}, {row['bound']}: {row['limit_ms']:.3g} ms"
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape", type=parse_shape, action="append", metavar="N,D,F,K", help="may be repeated"
    )
    parser.add_argument(
        "--backend", choices=("cpu", "triton", "reference"), action="append",
        help="may be repeated (default: the device's and reference)",
    )  # fmt: skip
    parser.add_argument("--device", type=torch.device, help="default: a GPU, unless --backend cpu")
    parser.add_argument("--op", default="", help="only operations whose name contains this")
    parser.add_argument("--no-rules", action="store_true", help="leave the selection rules out")
    parser.add_argument("--repeats", type=int, default=9, help="runs at most (default 9)")
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="of a provider's runs, about (default 0.5)"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    add_outputs(parser)
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    if "triton" in (args.backend or ()) and not gpu:
        parser.error("--backend triton: expected a GPU that torch can use, got none")
    if args.device is None:
        args.device = torch.device("cuda" if gpu and "cpu" not in (args.backend or ()) else "cpu")
    torch.set_num_threads(args.threads)
    keep_memory()
    small = args.shape is not None and all(n * d * f < 1 << 28 for n, d, f, _ in args.shape)
    rates = measure_rates(args.device, small=small)
    backends = args.backend or backends_of(args.device)
    clock = Clock(args.device, args.repeats, args.seconds)
    print(rates.text(), f"{args.threads} threads, load {os.getloadavg()[0]:.1f}", file=sys.stderr)
    rows = []
    shared = machine() | {"threads": args.threads}
    for number, shape in enumerate(args.shape or SHAPES):
        kinds: list[tuple[Any, Shape]] = [(Operations, shape)]
        if not (args.no_rules or number):
            kinds.append((RuleOperations, (max(shape[0] // 4, 1), *shape[1:])))
        for kind, own in kinds:
            line = "{:24} {:>9} {:>17} {:>8} {:>8} {:>6} {:>8} {:>8} {}".format(*HEADER)
            print(f"{','.join(map(str, own)):22} {line}", file=sys.stderr)
            ops = kind(own, args.device, backends)
            for row in measure_shape(own, ops, clock, rates, args.op):
                print_row(row)
                rows.append(row | shared)
            del ops
    say_busy(rows)
    outputs(rows, args)


if __name__ == "__main__":
    main()
