"""What each selection rule's training step costs, beside TopK's, in one run.

    python bench/selection.py --shape 2048,768,24576,32
    python bench/selection.py --memory

The Trainer's own steps of all rules, taken in turn in one process, so that what else runs hits them
alike; a rule's figure is the median of its steps ÷ TopK's, and ÷ one dense encoder product. Tokens
have a few strong directions, as activations have. The rules without a budget start with K pairs a
token, and, as "NAME, dense", with half of all, which they take in blocks.

--memory: `fastsae train --selection NAME`, by default for 20 steps (2 in blocks) at N 2048, D 384,
F 262144, in a child process each, and the most memory it was resident, less that of weights and
optimiser state.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from measure import Shape, Watch, parse_shape, product_seconds
from rows import add_outputs, machine, outputs, say_busy

from fastsae import SAE, SAEConfig, Selection
from fastsae.batches import Batch
from fastsae.data import open_source
from fastsae.options import rule_from
from fastsae.shards import FORMAT, LABELS, VERSION, shard_path, write_index, write_shard
from fastsae.train import TrainConfig, Trainer

MEMORY_SHAPE = (2048, 384, 262144, 32)
CHILD = """
import sys
from pathlib import Path
from fastsae.cli import main
main(sys.argv[1:])
lines = Path("/proc/self/status").read_text().splitlines()
print("peak", next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")))
"""


def tokens(n: int, d: int, seed: int) -> torch.Tensor:
    """Gaussian tokens with 16 strong directions, each on in a quarter of them."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(16, d, generator=torch.Generator().manual_seed(99))
    on = torch.rand(n, 16, generator=generator) < 0.25
    return torch.randn(n, d, generator=generator) + on.float() @ directions


def forms(names: list[str]) -> dict[str, tuple[str, dict[str, str]]]:
    """What is measured: label → a rule and its parameters."""
    found: dict[str, tuple[str, dict[str, str]]] = {}
    for name in names:
        found[name] = name, {}
        if Selection.rules[name].k_name == "l0":
            thresholds = {"threshold": "0.001"} if name == "jumprelu" else {}
            found[f"{name}, dense"] = name, {"start": "0", **thresholds}
    return found


def trainer(rule: Selection, shape: Shape, x: torch.Tensor) -> Trainer:
    _, d, f, _ = shape
    sae = SAE(SAEConfig(d, f, rule, dead_after=10**9))
    made = Trainer(sae, open_source(x), TrainConfig(steps=10**6, warmup_steps=0))
    made.initialize()
    made.step_count = 10**6 // 2  # beyond the warm-up of rules that have one
    return made


def measure_rules(shape: Shape, names: list[str], steps: int) -> list[dict[str, object]]:
    n, d, _, k = shape
    batches = [Batch(tokens(n, d, seed), None, tokens(n, d, seed + 100)) for seed in range(1, 5)]
    trainers = {
        label: trainer(rule_from(name, k, parameters), shape, batches[0].x)
        for label, (name, parameters) in forms(list(dict.fromkeys(["topk", *names]))).items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    pairs: dict[str, float] = {}
    products = []
    for i in range(steps + 1):
        for name, made in trainers.items():
            start = time.perf_counter()
            output = made.step(batches[i % 4])
            if i:  # the first step allocates
                seconds[name].append(time.perf_counter() - start)
            pairs[name] = float(output.metrics["l0"])
        products.append(product_seconds(batches[0].x, trainers["topk"].sae.W_enc, repeats=1))
    median = {name: statistics.median(s) for name, s in seconds.items()}
    return [
        {
            "rule": name,
            **dict(zip("ndfk", shape, strict=True)),
            "pairs": pairs[name],
            "step_s": median[name],
            "of_topk": median[name] / median["topk"],
            "of_product": median[name] / min(products),
        }
        for name in trainers
    ]


def write_tokens(folder: Path, n: int, d: int) -> None:
    """An activation set of one shard, with gradients."""
    labels = {name: torch.zeros(n, dtype=torch.int32) for name in LABELS}
    write_shard(
        shard_path(folder, 0), {"x": tokens(n, d, 1), "gradient": tokens(n, d, 2), **labels}
    )
    index = {"format": FORMAT, "version": VERSION, "d": d, "dtype": "float32", "gradients": True}
    write_index(folder, {**index, "shards": [n]})


def measure_memory(
    label: str, name: str, parameters: dict[str, str], shape: Shape, steps: int
) -> dict[str, object]:
    n, d, f, k = shape
    with tempfile.TemporaryDirectory() as folder:
        write_tokens(Path(folder), 4 * n, d)
        options = {"data": folder, "d-sae": f, "k": k, "selection": name, "batch-size": n}
        options |= {"steps": steps, "holdout": 0, "out": f"{folder}/run"}
        options |= {f"selection.{key}": value for key, value in parameters.items()}
        command = [sys.executable, "-c", CHILD, "train"]
        command += [f"--{key}={value}" for key, value in options.items()]
        done = subprocess.run(command, capture_output=True, text=True)
    row: dict[str, object] = {"rule": label, **dict(zip("ndfk", shape, strict=True))}
    row["steps"] = steps
    if done.returncode:
        return row | {"error": done.stderr.strip().splitlines()[-1]}
    peak = int(done.stdout.split()[-1])
    state = 3 * 4 * (2 * f * d + f + d)  # weights and two moments, fp32
    return row | {"peak_bytes": peak, "state_bytes": state, "beside": peak - state}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", type=parse_shape, metavar="N,D,F,K")
    parser.add_argument("--rule", action="append", choices=sorted(Selection.rules))
    parser.add_argument("--steps", type=int, help="steps a rule (default 7; for --memory 20)")
    parser.add_argument("--memory", action="store_true", help="measure memory, not time")
    add_outputs(parser)
    args = parser.parse_args()
    names = args.rule or sorted(Selection.rules)
    with Watch() as watch:
        if args.memory:
            rows = []
            for label, form in forms(names).items():
                steps = args.steps or (2 if "dense" in label else 20)
                rows.append(measure_memory(label, *form, args.shape or MEMORY_SHAPE, steps))
                print(rows[-1], file=sys.stderr, flush=True)
        else:
            rows = measure_rules(args.shape or (2048, 768, 24576, 32), names, args.steps or 7)
            print(
                f"{'rule':18} {'pairs':>8} {'step s':>8} {'/ topk':>7} {'/ product':>9}",
                file=sys.stderr,
            )
            for row in rows:
                print(
                    f"{row['rule']:18} {row['pairs']:8.1f} {row['step_s']:8.3f} "
                    f"{row['of_topk']:7.2f} {row['of_product']:9.2f}",
                    file=sys.stderr,
                )
    kind = "selection-memory" if args.memory else "selection"
    rows = [{"bench": kind} | row | machine() | watch.columns() for row in rows]
    say_busy(rows)
    outputs(rows, args)


if __name__ == "__main__":
    main()
