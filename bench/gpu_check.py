"""Everything to know about the kernels on a GPU, in one command: do they work, how fast are they.

    python bench/gpu_check.py --out bench/results

Runs the GPU tests, then for every shape: encode against a float64 product, torch's bf16 product x @
W_encᵀ, encode and its stages, the gather kernels, Adam, whole training steps, and eager torch. Rows
are added to gpu_check.csv and gpu_check.json as they come; `ratio` is to the bf16 product's time at
the same shape. A part runs in a process apart: whatever becomes of it, its row says so and the next
part follows, in a new process if need be. What does not fit or comes after --budget is "skipped".

Data     random: normal x, and rows of W of norm 1. real-like: tokens share a mean, D/8 directions
         of falling weight with heavy-tailed coefficients, and noise; rows of W are such tokens.
         x is fp32 in the kernels (the SAE centres it), W bf16 where not said otherwise.
Times    CUDA events around each run; medians. Before each run 1 GiB is written, which empties L2
         and gives the host time to queue the launches. Adam has seen every row before.
Memory   peak_bytes is all that is allocated at a time, weights and optimiser included.
GB/s     Bytes of the cost functions in kernels/ by the measured time: from memory, through L2.
--smoke  The same code on a CPU, at a tiny shape, with TRITON_INTERPRET=1 set outside.
"""

from __future__ import annotations

import argparse
import csv
import gc
import importlib.util
import itertools
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout is enough

import torch
import triton
from clock import Clock
from measure import Shape, parse_shape
from roofline import SHAPES, add, kernel_costs
from rows import Row, commit
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import embedding_bag

from fastsae import SAE, SAEConfig, TopK
from fastsae.kernels import (
    adam,
    decode,
    decode_error,
    encode,
    encode_batch,
    encode_columns,
    encode_threshold,
    index,
)
from fastsae.kernels import rows as row_kernels
from fastsae.kernels.checks import Cost
from fastsae.kernels.operands import screened
from fastsae.kernels.select import candidates, room_for
from fastsae.ops import Precision, RowGradient
from fastsae.optim import Adam

ROOT = Path(__file__).resolve().parent.parent
SMOKE_SHAPE: Shape = (3, 40, 16, 2)
PART_SECONDS = 120  # for one row of a part: compiling is in it


@dataclass
class Problem:
    """A shape's data, made on the device; the same at each call."""

    shape: Shape
    device: torch.device

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

    def normal(self, *shape: int, seed: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator(seed), device=self.device)

    def tokens(self, n: int, data: str, seed: int) -> Tensor:
        """(n, D) fp32."""
        d = self.shape[1]
        if data == "random":
            return self.normal(n, d, seed=seed)
        rank = max(d // 8, 1)
        weight = torch.arange(1, rank + 1, device=self.device) ** -0.5
        directions = self.normal(rank, d, seed=1) * weight[:, None]
        tails = self.normal(n, rank, seed=seed + 1).exp()
        x = (self.normal(n, rank, seed=seed) * tails) @ directions
        return x + self.normal(d, seed=2) + 0.3 * self.normal(n, d, seed=seed + 2)

    def x(self, data: str = "random", dtype: torch.dtype = torch.float32) -> Tensor:
        return self.tokens(self.shape[0], data, 10).to(dtype)

    def weights(self, data: str = "random", dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """(F, D), rows of norm 1."""
        _, d, f, _ = self.shape
        W = torch.empty(f, d, dtype=dtype, device=self.device)
        for start in range(0, f, 1 << 15):
            part = W[start : start + (1 << 15)]
            rows = self.tokens(len(part), data, 100 + start)
            part.copy_(rows / rows.norm(dim=1, keepdim=True))
        return W

    def codes(self) -> tuple[Tensor, Tensor]:
        """vals fp32 and idx, latents drawn evenly."""
        n, _, f, k = self.shape
        idx = torch.randint(
            f, (n, k), generator=self.generator(3), dtype=torch.int32, device=self.device
        )
        return self.normal(n, k, seed=4), idx

    def costs(self, moved: int = 0, state_bytes: int = 0) -> dict[str, Cost]:
        """Where W is bf16."""
        return kernel_costs(self.shape, 2, moved, state_bytes, scored=0)


def rates(cost: Cost, ms: float) -> Row:
    return {
        "tflops": cost.flops / ms * 1e-9,
        "memory_gb_s": cost.bytes_once / ms * 1e-6,
        "l2_gb_s": cost.bytes_gathered / ms * 1e-6,
    }


# ---- parts ----


def product(p: Problem, clock: Clock) -> Iterator[Row]:
    n, _, f, _ = p.shape
    x, W = p.x(dtype=torch.bfloat16), p.weights()
    out = torch.empty(n, f, dtype=torch.bfloat16, device=p.device)
    timed = clock.time(lambda: torch.mm(x, W.T, out=out))
    yield {"name": "product", **timed, **rates(p.costs()["product"], timed["ms"])}


def encode_part(
    name: str, data: str = "random", dtype: torch.dtype = torch.bfloat16
) -> Callable[[Problem, Clock], Iterator[Row]]:
    return lambda p, clock: encode_rows(p, clock, name, data, dtype)


def encode_rows(
    p: Problem, clock: Clock, title: str, data: str, dtype: torch.dtype
) -> Iterator[Row]:
    """Whole and by stage; the stages are told apart where `encode` calls the next one."""
    n, d, f, k = p.shape
    x, W = p.x(data, dtype), p.weights(data, dtype)
    b = 0.01 * p.normal(f, seed=5).to(dtype)
    error = encode_error(x, W, b, k)
    timed = clock.time(lambda: encode.encode(x, W, b, k))
    yield {"name": title, "data": data, **timed, "note": f"largest error {error:.1e}"}

    marks: list[Any] = []
    counts = torch.empty(0)

    def marked(function: Callable[..., Any], before: bool, after: bool) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            nonlocal counts
            if before:
                marks.append(clock.mark())
            result = function(*args)
            if after:
                marks.append(clock.mark())
            if before:
                counts = result[1].clone()  # of `candidates`; `best` writes over some
            return result

        return call

    def staged() -> list[Any]:
        marks.clear()
        encode.encode(x, W, b, k)
        return marks[:]  # after screened; before and after candidates

    with (
        mock.patch.object(encode, "screened", marked(screened, False, True)),
        mock.patch.object(encode, "candidates", marked(candidates, True, True)),
    ):
        found = clock.runs(staged)
    if {len(run) for run in found} != {5}:
        raise RuntimeError(f"encode: expected 4 stages, got marks {[len(run) for run in found]}")
    counts = counts.float()
    scored = float(counts.mean())
    costs = kernel_costs(p.shape, W.element_size(), 0, 0, scored)
    for stage, name in enumerate(("norms", "screen", "select", "score")):
        timed = clock.figures([(run[stage], run[stage + 1]) for run in found])
        row = {"name": f"{title}.{name}", "data": data, **timed}
        yield row | rates(costs[f"encode.{name}"], timed["ms"])
    room = room_for(k)
    note = f"a token has {scored:.1f} on average, {int(counts.max())} at most; room {room}"
    multiply = "bf16" if dtype == torch.bfloat16 else "tf32"
    bucket = 1 << encode.screen_config(f, k, multiply, True, False, d, d % 16 == 0)["LOG2_G"]
    yield {
        "name": f"{title}.candidates",
        "data": data,
        "note": f"{note}; {int((counts >= k + bucket).sum())} of {n} tokens have {bucket} more "
        "than k, as a repair adds",
        "streamed": int((counts > room).sum()),
    }


def encode_error(x: Tensor, W: Tensor, b: Tensor, k: int, n: int = 8) -> float:
    """The largest difference from a float64 product, relative to ‖x‖·max‖W‖; n tokens are asked."""
    vals, idx = encode.encode(x, W, b, k)
    chosen = torch.linspace(0, len(x) - 1, min(n, len(x)), device=x.device).long()
    x, vals, idx = x[chosen].double(), vals[chosen].double(), idx[chosen].long()
    h = torch.cat([x @ part.double().T for part in W.split(1 << 14)], dim=1) + b.double()
    largest_row = max(float(part.float().norm(dim=1).max()) for part in W.split(1 << 14))
    scale = x.norm(dim=1, keepdim=True) * largest_row
    expected = h.topk(k).values.clamp(min=0)
    stored = idx >= 0
    own = h.gather(1, idx.clamp(min=0)).where(stored, 0.0)
    error = float((torch.maximum((vals - expected).abs(), (vals - own).abs()) / scale).max())
    limit = 2.0**-23 * (x.shape[1] / 64 + 16)
    if not error <= limit:
        raise AssertionError(f"encode: expected errors of at most {limit:.1e}, got {error:.1e}")
    ids = idx.where(stored, -1 - torch.arange(k, device=idx.device))
    if bool((ids.sort(dim=1).values.diff(dim=1) == 0).any()):
        raise AssertionError("encode: expected each latent once a token, got one twice")
    return error


def selections(p: Problem, clock: Clock) -> Iterator[Row]:
    """encode_batch, encode_columns with Zipf budgets, encode_threshold: N·K pairs or nearly."""
    n, _, f, k = p.shape
    x, W = p.x(), p.weights()
    b = 0.01 * p.normal(f, seed=5).to(W.dtype)
    share = 1 / torch.arange(1, f + 1, device=p.device)
    budgets = (share * (n * k / share.sum())).ceil().clamp(max=n).int()
    budgets = budgets[torch.randperm(f, generator=p.generator(6), device=p.device)]
    room = int(budgets.sum())
    last = encode_batch.encode_batch(x, W, b, n * k)[0].min()
    thresholds = last.expand(f).contiguous()
    works: dict[str, Callable[[], tuple[Tensor, Tensor, Tensor]]] = {
        "encode_batch": lambda: encode_batch.encode_batch(x, W, b, n * k),
        "encode_columns": lambda: encode_columns.encode_columns(x, W, b, budgets, room),
        "encode_threshold": lambda: encode_threshold.encode_threshold(x, W, b, thresholds),
    }
    costs = kernel_costs(p.shape, 2, 0, 0, scored=1.5 * k)
    for name, work in works.items():
        rows = work()
        bound = last_values(rows, budgets) if name == "encode_columns" else thresholds
        error = selection_error(name, x, W, b, rows, bound)
        timed = clock.time(work)
        cost = add(*(stage for part, stage in costs.items() if part.startswith(f"{name}.")))
        note = f"{int((rows[1] >= 0).sum())} pairs; largest error {error:.1e}"
        yield {"name": name, "data": "random", **timed, **rates(cost, timed["ms"]), "note": note}


def last_values(rows: tuple[Tensor, Tensor, Tensor], budgets: Tensor) -> Tensor:
    """(F) the least value of each latent, 0 where it has fewer than its budget."""
    vals, latent = rows[0], rows[1].clamp(min=0).long()
    vals = vals.where(rows[1] >= 0, torch.inf)
    least = torch.full(budgets.shape, torch.inf, device=vals.device)
    least = least.scatter_reduce(0, latent, vals, "amin")
    full = (rows[1] >= 0).long()
    full = torch.zeros_like(budgets, dtype=torch.int64).scatter_add(0, latent, full) >= budgets
    return least.where(full, 0.0)


def selection_error(
    name: str,
    x: Tensor,
    W: Tensor,
    b: Tensor,
    rows: tuple[Tensor, Tensor, Tensor],
    bound: Tensor,
    n: int = 8,
) -> float:
    """As encode_error; and every pair that is above its latent's bound for certain is selected."""
    vals, idx, row_ptr = rows
    limit = 2.0**-23 * (x.shape[1] / 64 + 16)
    largest_row = max(float(part.float().norm(dim=1).max()) for part in W.split(1 << 14))
    worst = 0.0
    for token in torch.linspace(0, len(x) - 1, min(n, len(x))).long().tolist():
        begin, end = row_ptr[token : token + 2].tolist()
        row, value = idx[begin:end].long(), vals[begin:end].double()
        row, value = row[row >= 0], value[row >= 0]
        one = x[token].double()
        h = torch.cat([part.double() @ one for part in W.split(1 << 14)]) + b.double()
        scale = float(one.norm()) * largest_row
        selected = torch.zeros_like(h, dtype=torch.bool)
        selected[row] = True
        if int(selected.sum()) != len(row):
            raise AssertionError(f"{name}: expected each latent once a token, got one twice")
        missed = int(((h > bound + limit * scale) & ~selected).sum())
        extra = int((value < bound[row]).sum())
        if missed or extra:
            raise AssertionError(f"{name}: {missed} pairs missing, {extra} too low: {token=}")
        if len(row):
            worst = max(worst, float((value - h[row]).abs().max()) / scale)
    if not worst <= limit:
        raise AssertionError(f"{name}: expected errors of at most {limit:.1e}, got {worst:.1e}")
    return worst


def gathers(p: Problem, clock: Clock) -> Iterator[Row]:
    """The kernels around W_dec, and the index."""
    _, _, f, _ = p.shape
    x, W, (vals, idx) = p.x(), p.weights(), p.codes()
    b = torch.zeros(x.shape[1], dtype=W.dtype, device=p.device)
    works: dict[str, Callable[[], object]] = {
        "decode_fwd": lambda: decode.decode_fwd(vals, idx, W, b),
        "decode_bwd_vals": lambda: decode.decode_bwd_vals(x, idx, W),
        "decode_error": lambda: decode_error.decode_error(vals, idx, W, b, x, None, False),
        "index": lambda: index.inverse_index(idx, f),
        "row_sums": lambda: row_kernels.row_gradients(vals, idx, x, f, need_rows=False),
        "row_gradients": lambda: row_kernels.row_gradients(vals, idx, x, f),
    }
    costs = p.costs()
    for name, work in works.items():
        timed = clock.time(work)
        yield {"name": name, **timed, **rates(costs[name], timed["ms"])}


ADAM = {  # β₁, the dtype of p and of its moments, lazy, unit rows
    "adam exact": (0.9, torch.float32, False, False),
    "adam exact, unit rows": (0.9, torch.float32, False, True),
    "adam lazy": (0.9, torch.float32, True, False),
    "adam beta1=0": (0.0, torch.float32, False, False),
    "adam bf16": (0.9, torch.bfloat16, False, False),
    "adam bf16, unit rows": (0.9, torch.bfloat16, False, True),
    "adam bf16 beta1=0": (0.0, torch.bfloat16, False, False),
}


def adam_part(name: str) -> Callable[[Problem, Clock], Iterator[Row]]:
    beta1, dtype, lazy, unit = ADAM[name]

    def part(p: Problem, clock: Clock) -> Iterator[Row]:
        f = p.shape[2]
        coef, idx = p.codes()
        gradient = RowGradient(coef, idx, p.x(), None)
        W = p.weights(dtype=dtype)
        m = torch.zeros_like(W) if beta1 else None
        v = torch.full_like(W, 1e-4)
        last = torch.ones(f, dtype=torch.int32, device=p.device)
        steps = itertools.count(2)

        def work() -> None:
            adam.adam_(
                W,
                None,
                [gradient],
                unit,
                m,
                v,
                last,
                lr=1e-4,
                beta1=beta1,
                beta2=0.999,
                eps=1e-8,
                weight_decay=0.0,
                scale=1.0,
                step=next(steps),
                lazy=lazy,
                stochastic_rounding=dtype == torch.bfloat16,
            )

        timed = clock.time(work)
        moved = f if beta1 and not lazy else len(idx.unique())
        state_bytes = W.element_size() * (3 if beta1 else 2)
        cost = p.costs(moved, state_bytes)["adam W_dec" if unit else "adam W_enc"]
        note = f"{moved} of {f} rows move; the index is in it"
        yield {"name": name, **timed, **rates(cost, timed["ms"]), "note": note}

    return part


STEPS: dict[str, tuple[Any, dict[str, Any]]] = {  # the SAE's dtype, Adam's options
    "step bf16": ("bfloat16", {}),
    "step bf16 lazy": ("bfloat16", {"lazy": True}),
    "step bf16 beta1=0": ("bfloat16", {"betas": (0.0, 0.999)}),
    "step fp32": ("float32", {}),
    "step fp32 lazy": ("float32", {"lazy": True}),
    "step fp32 beta1=0": ("float32", {"betas": (0.0, 0.999)}),
}


def step_part(name: str) -> Callable[[Problem, Clock], Iterator[Row]]:
    dtype, options = STEPS[name]

    def part(p: Problem, clock: Clock) -> Iterator[Row]:
        _, d, f, k = p.shape
        # Made small, then given its weights: its own start is drawn on the CPU.
        config = SAEConfig(d, k, TopK(k), dtype=dtype, dead_after=10**12)
        # Tokens lose nothing in bf16 weights' own product: a narrow margin, few candidates.
        precision: Precision = "bf16" if dtype == "bfloat16" else "screened"
        sae = SAE(config, device=p.device, precision=precision, backend="triton")
        sae.config = replace(config, d_sae=f)
        sae.W_enc = Parameter(p.weights(dtype=sae.W_enc.dtype))
        sae.W_dec = Parameter(sae.W_enc.detach().clone())
        sae.b_enc = Parameter(torch.zeros(f, dtype=sae.W_enc.dtype, device=p.device))
        sae.tokens_since_fired = torch.zeros(f, dtype=torch.int64, device=p.device)
        optimizer = Adam(
            sae.parameters(), lr=1e-4, unit_rows=[sae.W_dec], backend="triton", **options
        )
        x = p.x(dtype=torch.bfloat16)
        losses = []

        def work() -> None:
            optimizer.zero_grad()
            loss = sae.losses(x).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())

        work()
        for q in (sae.W_enc, sae.W_dec):
            optimizer.state[q]["last"].fill_(1)
        timed = clock.time(work)
        first, last = float(losses[0]), float(losses[-1])
        row = {"name": name, **timed, "note": f"the loss went from {first:.4f} to {last:.4f}"}
        yield row if last < first else row | {"error": f"expected a loss below {first}, got {last}"}

    return part


def eager_part(sparse: bool) -> Callable[[Problem, Clock], Iterator[Row]]:
    """The same step in eager torch; bf16 throughout, moments too."""

    def part(p: Problem, clock: Clock) -> Iterator[Row]:
        _, d, f, k = p.shape
        x = p.x(dtype=torch.bfloat16)
        W_enc = Parameter(p.weights())
        W_dec = Parameter(W_enc.detach().clone())
        b_enc = Parameter(torch.zeros(f, dtype=x.dtype, device=p.device))
        b_dec = Parameter(torch.zeros(d, dtype=x.dtype, device=p.device))
        optimizer = torch.optim.Adam([W_enc, W_dec, b_enc, b_dec], lr=1e-4, fused=True)

        def work() -> None:
            h = torch.relu((x - b_dec) @ W_enc.T + b_enc)
            top = h.topk(k)
            if sparse:
                xhat = embedding_bag(top.indices, W_dec, per_sample_weights=top.values, mode="sum")
            else:
                xhat = torch.zeros_like(h).scatter(1, top.indices, top.values) @ W_dec
            loss = (xhat + b_dec - x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        yield {"name": f"eager {'sparse' if sparse else 'dense'}", **clock.time(work)}

    return part


FIRST: dict[str, Callable[[Problem, Clock], Iterator[Row]]] = {
    "product": product,
    "encode": encode_part("encode"),
    "selections": selections,
    "gathers": gathers,
    "adam exact": adam_part("adam exact"),
    **{name: step_part(name) for name in STEPS if name.startswith("step bf16")},
}
THEN = {
    "encode real-like": encode_part("encode", "real-like"),
    "encode fp32": encode_part("encode fp32", dtype=torch.float32),
    **{name: adam_part(name) for name in ADAM if name not in FIRST},
    **{name: step_part(name) for name in STEPS if name not in FIRST},
    "eager dense": eager_part(False),
    "eager sparse": eager_part(True),
}
PARTS = FIRST | THEN
"""FIRST of all shapes go before THEN, in case the budget does not last."""


# ---- processes ----

Job = tuple[Shape, str]


def run_child(pipe: Connection, device: str, repeats: int, jobs: list[Job]) -> None:
    """Sends ("row", row), and after a job ("done", how many), or ("lost", how many) and ends."""
    clock = Clock(torch.device(device), repeats, seconds=2.0)
    for done, (shape, name) in enumerate(jobs, 1):
        try:
            for row in PARTS[name](Problem(shape, clock.device), clock):
                pipe.send(("row", row))
        except torch.OutOfMemoryError as error:
            pipe.send(("row", {"name": name, "skipped": str(error).split(". ")[0]}))
        except Exception as error:
            trace = traceback.format_exc().splitlines()[-7:]
            report = {"error": f"{type(error).__name__}: {error}", "note": "\n".join(trace)}
            pipe.send(("row", {"name": name, **report}))
        try:  # after a fault inside a kernel no call works any more
            gc.collect()
            clock.synchronize()
            if clock.cuda:
                torch.cuda.empty_cache()
        except Exception:
            pipe.send(("lost", done))
            return
        pipe.send(("done", done))


FIELDS = (
    *("n", "d", "f", "k", "name", "data", "ms", "min_ms", "max_ms", "runs", "ratio"),
    *("tflops", "memory_gb_s", "l2_gb_s", "peak_bytes", "streamed", "skipped", "error", "note"),
    *("device", "torch", "triton", "python", "commit", "date"),
)


class Report:
    """The rows so far, on disk and on stderr."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.json, self.csv = folder / "gpu_check.json", folder / "gpu_check.csv"
        self.rows: list[Row] = json.loads(self.json.read_text()) if self.json.exists() else []
        self.n_before = len(self.rows)
        self.units: dict[Any, float] = {}  # ms of the product by shape
        cuda = device.type == "cuda"
        self.machine = {
            "device": torch.cuda.get_device_name() if cuda else f"cpu {platform.machine()}",
            "torch": torch.__version__,
            "triton": triton.__version__,
            "python": platform.python_version(),
            "commit": commit(),
            "date": time.strftime("%Y-%m-%d %H:%M"),
        }
        if not self.csv.exists():
            with self.csv.open("w", newline="") as file:
                csv.DictWriter(file, FIELDS, lineterminator="\n").writeheader()

    def add(self, shape: Shape | None, row: Row) -> None:
        sizes = {} if shape is None else dict(zip("ndfk", shape, strict=True))
        if row["name"] == "product" and "ms" in row:
            self.units[shape] = row["ms"]
        if "ms" in row and shape in self.units:
            row["ratio"] = row["ms"] / self.units[shape]
        row = sizes | row | self.machine
        self.rows.append({field: row.get(field) for field in FIELDS})
        with self.csv.open("a", newline="") as file:
            csv.DictWriter(file, FIELDS, lineterminator="\n").writerow(row)
        new = self.json.with_suffix(".tmp")
        new.write_text(json.dumps(self.rows, indent=1) + "\n")
        os.replace(new, self.json)
        line = f"{','.join(map(str, shape or ())):22} {row['name']:22} {row.get('data', ''):10}"
        if "ms" in row:
            line += f"{row['ms']:9.3f} ms {row.get('ratio', float('nan')):7.3f} "
            if "memory_gb_s" in row:
                line += f"{row['memory_gb_s']:7.0f} GB/s {row['tflops']:6.1f} TFLOP/s "
        for field in ("skipped", "error"):
            if field in row:
                line += f"{field.upper()}: {row[field]} "
        print(line + str(row.get("note", "")), file=sys.stderr, flush=True)


def run_tests(report: Report, out: Path, tests: list[str], seconds: float) -> None:
    row: Row = {"name": "tests"}
    if importlib.util.find_spec("pytest") is None:
        report.add(None, row | {"skipped": "pytest is not installed"})
        return
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors", *tests]
    log = out / "gpu_tests.txt"
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = os.environ | {"PYTHONPATH": path}
    with log.open("w") as file:
        streams: dict[str, Any] = {"stdout": file, "stderr": subprocess.STDOUT}
        try:
            status = subprocess.run(command, cwd=ROOT, env=env, timeout=seconds, **streams)
            row |= {"note": f"exit status {status.returncode}"}
            if status.returncode == 5:
                row["skipped"] = "no test was selected"
            elif status.returncode:
                row["error"] = "tests failed"
        except subprocess.TimeoutExpired:
            row["error"] = f"not done after {seconds:.0f} s"
    lines = log.read_text().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))][:20]
    report.add(None, row | {"note": "\n".join([row.get("note", ""), *failed, *lines[-1:]])})


def run_jobs(report: Report, jobs: list[Job], device: str, repeats: int, deadline: float) -> None:
    """Each job in a child, a new one where one was lost."""
    context = multiprocessing.get_context("spawn")
    at = 0
    while at < len(jobs) and time.monotonic() < deadline:
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=run_child, args=(theirs, device, repeats, jobs[at:]))
        child.start()
        theirs.close()
        begin, why = at, ""
        while at < len(jobs):
            seconds = max(min(PART_SECONDS, deadline - time.monotonic()), 0)
            if not ours.poll(seconds):
                why = f"no answer for {seconds:.0f} s"
                break
            try:
                kind, value = ours.recv()
            except EOFError:
                child.join()
                why = f"the process ended with status {child.exitcode}"
                break
            if kind == "row":
                report.add(jobs[at][0], value)
                continue
            at = begin + value
            if kind == "lost":
                break
        if why and time.monotonic() < deadline:
            report.add(jobs[at][0], {"name": jobs[at][1], "error": why})
            at += 1
        if why:
            child.kill()
        child.join(10)  # not for ever: a driver may keep a process whose kernel hangs
    for shape, name in jobs[at:]:
        report.add(shape, {"name": name, "skipped": "the budget is spent"})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape", type=parse_shape, action="append", metavar="N,D,F,K", help="may be repeated"
    )
    parser.add_argument("--part", choices=PARTS, action="append", help="may be repeated")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--budget", type=float, default=500, help="seconds in all (default 500)")
    parser.add_argument("--tests-budget", type=float, default=120, help="of them (default 120)")
    parser.add_argument("--test", action="append", help="a test file (default: all of kernels)")
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="tiny, on the CPU, interpreted")
    args = parser.parse_args()
    deadline = time.monotonic() + args.budget
    if args.smoke and not triton.knobs.runtime.interpret:
        parser.error("--smoke: expected TRITON_INTERPRET=1 in the environment, got none")
    if not args.smoke and not torch.cuda.is_available():
        parser.error("expected a GPU that torch can use, got none; see --smoke")
    device = "cpu" if args.smoke else "cuda"
    report = Report(args.out, torch.device(device))
    if not args.no_tests:
        tests = args.test or sorted(str(path) for path in ROOT.glob("tests/test_kernels_*.py"))
        run_tests(report, args.out, tests, min(args.tests_budget, args.budget))
    shapes = args.shape or ((SMOKE_SHAPE,) if args.smoke else SHAPES)
    wanted = [[name for name in group if name in (args.part or PARTS)] for group in (FIRST, THEN)]
    jobs = [(shape, name) for group in wanted for shape in shapes for name in group]
    run_jobs(report, jobs, device, 10, deadline)
    rows = report.rows[report.n_before :]
    failed = sum(row["error"] is not None for row in rows)
    print(f"{len(rows)} rows to {report.csv}, {failed} with an error", file=sys.stderr)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
