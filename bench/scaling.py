"""How the cost of a step grows with the width of the dictionary, and with the number of processes.

    python bench/scaling.py
    python bench/scaling.py --shape 1024,384,16384,32 --shape 1024,384,1048576,32
    python bench/scaling.py --ranks 2 --ranks 4 --shape 1024,384,131072,32

Widths, F = 2¹⁴ … 2²¹ where no shape is given: a step of the Trainer with lazy Adam, its parts, the
most memory that its process held beside what `fastsae plan` says, and the same of dense torch,
beside one dense encoder product, made in blocks where N×F would not fit. Each is a process of its
own under a limit on memory (--limit-gb, RLIMIT_DATA), until it runs out: then the row says so.

Ranks, 2, 4 and 8 where no shape is given: the latents on P processes over gloo
(`fastsae.sharding`), each with the cores ÷ P threads.
What a rank receives in a step by exchange, counted and in seconds, the share of the step, and what
the bytes would take at the rates of NVLink (450 GB/s) and of InfiniBand (50 GB/s), each one way. On
one machine's cores no speed is to be gained: a row shows what the exchange costs.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measure import Shape, Watch, memory, parse_shape, product_seconds, spread, timed
from rows import Row, add_outputs, machine, outputs, say_busy
from step import dense_step, new_trainer, step_of

from fastsae import SAE, SAEConfig, TopK
from fastsae.config import TrainConfig
from fastsae.data import open_source
from fastsae.plan import available, plan
from fastsae.sharding import Shards
from fastsae.train import Trainer

N, D, K = 1024, 384, 32
WIDTHS = [(N, D, 2**power, K) for power in range(14, 22)]
PROVIDERS = (("fastsae", "adam-lazy"), ("torch-dense", "torch-adam"))
RATES = {"nvlink": 450e9, "infiniband": 50e9}
"""Bytes a second that one GPU receives: NVLink 4 of an H100, and 400 Gb/s of NDR InfiniBand."""


class Parts:
    """Seconds that a Trainer's step spends in its losses and in its update; the rest is backward's
    and small."""

    def __init__(self, trainer: Trainer) -> None:
        self.ms: dict[str, list[float]] = {"forward": [], "update": []}
        trainer.sae.losses = self._timed("forward", trainer.sae.losses)  # type: ignore[method-assign]
        trainer.optimizer.step = self._timed("update", trainer.optimizer.step)  # type: ignore[method-assign]

    def _timed(self, part: str, call: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = call(*args, **kwargs)
            self.ms[part].append((time.perf_counter() - start) * 1e3)
            return result

        return timed

    def columns(self, runs: int) -> Row:
        return {f"{part}_ms": statistics.median(ms[-runs:]) for part, ms in self.ms.items()}


def width_row(shape: Shape, provider: str, optimizer: Any, steps: int) -> Row:
    """The figures of one width; in this process, which is new."""
    n, d, f, k = shape
    torch.manual_seed(1)
    batches = [torch.randn(n, d) for _ in range(4)]
    parts = None
    if provider == "fastsae":
        trainer = new_trainer(shape, batches[0], optimizer, [])
        step, sae, parts = step_of(trainer), trainer.sae, Parts(trainer)
    else:
        step, sae = dense_step(shape, batches[0], optimizer, [])
    step(batches[0])
    ms, watch = timed(step, batches, steps, seconds=20)
    peak = memory("VmHWM")
    product = product_seconds(batches[0], sae.W_enc, repeats=3, most_bytes=2**28) * 1e3
    said = plan(SAEConfig(d, f, TopK(k)), TrainConfig(batch_size=n, optimizer=optimizer))
    return {
        **spread(ms),
        **({} if parts is None else parts.columns(len(ms))),
        "product_ms": product,
        "ratio": statistics.median(ms) / product,
        "peak_bytes": peak,
        "plan_bytes": said.memory if provider == "fastsae" else None,
        "threads": torch.get_num_threads(),
        **watch.columns(),
    }


def rank_row(shape: Shape, steps: int) -> Row:
    """The figures of one number of processes, of which this is one; started by torchrun."""
    n, d, f, k = shape
    shards = Shards.connect(int(os.environ["WORLD_SIZE"]), 1)
    torch.manual_seed(1)
    source = open_source(torch.randn(4 * n, d))
    sae = SAE(SAEConfig(d, f, TopK(k)), shards=shards)
    settings = TrainConfig(steps=10**9, batch_size=n, warmup_steps=0, optimizer="adam-lazy")
    trainer = Trainer(sae, source, settings)
    batches = trainer._batches()
    trainer.step(trainer._read(batches))
    shards.traffic.clear()
    ms: list[float] = []
    with Watch() as watch:
        for _ in range(steps):
            start = time.perf_counter()
            trainer.step(trainer._read(batches))
            shards.any(False)
            ms.append((time.perf_counter() - start) * 1e3)
    traffic = {what: list(entry) for what, entry in shards.traffic.items()}
    load = watch.columns()["load"]  # what others took would be that of the other ranks
    row: Row = {**spread(ms), "threads": torch.get_num_threads(), "load": load}
    received = 0.0
    for what, (n_bytes, seconds) in traffic.items():
        received += n_bytes / steps
        row |= {f"{what}_bytes": n_bytes / steps, f"{what}_ms": seconds / steps * 1e3}
    exchange = sum(seconds for _, seconds in traffic.values()) / steps * 1e3
    row |= {"received_bytes": received, "exchange_ms": exchange}
    row["exchange_share"] = exchange / statistics.mean(ms)
    row |= {f"{name}_ms": received / rate * 1e3 for name, rate in RATES.items()}
    return row


def child(args: argparse.Namespace) -> None:
    """What a process of its own does; its row goes to a file."""
    provider, optimizer, file = args.child
    if args.limit_gb is not None:
        limit = int(args.limit_gb * 1e9)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        if provider == "ranks":
            row = rank_row(args.shape[0], args.steps)
            if os.environ["RANK"] != "0":
                return
        else:
            row = width_row(args.shape[0], provider, optimizer, args.steps)
    except (RuntimeError, MemoryError) as error:
        row = {"error": " ".join(str(error).split())[:160]}
    Path(file).write_text(json.dumps(row))


def measure(shape: Shape, provider: str, optimizer: str, ranks: int, args: Any) -> Row:
    """A row, measured by processes of their own."""
    what: Row = {"bench": "scaling", "provider": provider, "optimizer": optimizer}
    what |= dict(zip("ndfk", shape, strict=True)) | {"limit_gb": args.limit_gb}
    threads = max(1, args.threads // ranks)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "row.json"
        launcher = [sys.executable]
        if ranks > 1:
            what["ranks"] = ranks
            launcher += ["-m", "torch.distributed.run", "--standalone"]
            launcher += ["--nproc-per-node", str(ranks)]
        own = ["--child", "ranks" if ranks > 1 else provider, optimizer, str(file)]
        own += ["--shape", ",".join(map(str, shape)), "--steps", str(args.steps)]
        if args.limit_gb is not None:
            own += ["--limit-gb", str(args.limit_gb)]
        done = subprocess.run(
            [*launcher, __file__, *own],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
        if not file.exists():  # killed for memory, or an error that is no row
            last = (done.stderr.strip().splitlines() or ["no output"])[-1][:160]
            return what | {"error": f"status {done.returncode}: {last}"} | machine()
        return what | json.loads(file.read_text()) | machine()


def print_row(row: Row) -> None:
    line = f"{row['provider']:12} {row.get('ranks', 1):2} {row['f']:9,} "
    if "error" in row:
        line += row["error"]
    elif "ranks" in row:
        line += f"{row['ms']:9.1f} ms  {row['received_bytes'] / 1e6:7.2f} MB a rank in "
        line += f"{row['exchange_ms']:7.1f} ms, {row['exchange_share']:.0%} of the step"
    else:
        line += f"{row['ms']:9.1f} ms  product {row['product_ms']:9.1f}  ratio {row['ratio']:6.2f}"
        line += f"  {row['peak_bytes'] / 1e9:7.2f} GB"
        if row.get("plan_bytes"):
            line += f" of {row['plan_bytes'] / 1e9:.2f} planned"
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape", type=parse_shape, action="append", metavar="N,D,F,K", help="may be repeated"
    )
    parser.add_argument("--ranks", type=int, action="append", help="processes; may be repeated")
    parser.add_argument("--steps", type=int, default=7, help="timed steps at most (default 7)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--limit-gb",
        type=float,
        default=None,
        help="memory of a process, 10⁹ bytes; default: what is free, or no limit with --ranks",
    )
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    add_outputs(parser)
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    rows = []
    if args.ranks or not args.shape:
        for shape in args.shape or [(N, D, 2**17, K)]:
            for ranks in args.ranks or (2, 4, 8):
                rows.append(measure(shape, "fastsae", "adam-lazy", ranks, args))
                print_row(rows[-1])
    if not args.ranks:
        args.limit_gb = args.limit_gb or round(0.9 * available() / 1e9, 1)
        gone: set[str] = set()
        for shape in args.shape or WIDTHS:
            for provider, optimizer in PROVIDERS:
                if provider in gone:
                    continue
                rows.append(measure(shape, provider, optimizer, 1, args))
                print_row(rows[-1])
                if "error" in rows[-1]:  # wider ones would not fit either
                    gone.add(provider)
    say_busy(rows)
    outputs(rows, args)


if __name__ == "__main__":
    main()
