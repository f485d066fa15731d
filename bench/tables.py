"""The tables of README.md and docs/benchmarks.md, each from rows of bench/results/."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path

from rows import Row, read

RESULTS = Path(__file__).resolve().parent / "results"
MACHINE = "cpu-zen5-2core"
STEPS = {  # provider, optimizer, options → what a reader calls it
    ("fastsae", "adam", ""): "fastsae, exact Adam",
    ("fastsae", "adam-lazy", ""): "fastsae, lazy Adam (touched rows only)",
    ("fastsae", "adam", "clip"): "fastsae, exact Adam, clipped to norm 1",
    ("fastsae", "adam", "auxk"): "fastsae, exact Adam, AuxK with 10 % dead",
    ("fastsae", "torch-adam", ""): "fastsae, torch's Adam through plain autograd",
    ("torch-dense", "torch-adam", ""): "dense torch",
}
LIBRARIES = {"saelens": "SAELens"}
CASES = {
    ("sae_lens", "forward + backward + clip + Adam"): (
        "SAELens, `accelerate()`: forward, backward, clip, Adam"
    ),
    ("sae_lens", "in its SAETrainer"): "the same, in its SAETrainer",
    ("sae_lens", "in its SAETrainer, fused"): "SAELens, fused SAE and trainer",
    ("dictionary_learning", "TopKTrainer"): "dictionary_learning, fused TopK trainer",
    ("sparsify", "Trainer's step, functions alone"): "sparsify, its two functions replaced",
    ("sparsify", "Trainer's step"): "sparsify, `accelerate()`",
}
RULES = {
    "temporal-mask": "temporal-mask (our reading)",
    "jumprelu": "jumprelu, steered to L0 32",
    "batchtopk": "batchtopk; mutual-choice is the same",
    "gated": "gated, steered to L0 32",
    "feature-choice": "feature-choice (our reading)",
    "relu": "relu, steered to L0 32",
}


def results(part: str, machine: str = MACHINE) -> list[Row]:
    """The committed rows of a part; none where there is no such file."""
    file = RESULTS / f"{part}-{machine}.csv"
    return read(file) if file.exists() else []


def shape_of(row: Row) -> str:
    return f"N {row['n']}, D {row['d']}, F {row['f']}"


def short(value: float) -> str:
    """Three significant digits: 4.20, 0.210, 10.0, 412."""
    return f"{value:#.3g}".rstrip(".") if abs(value) < 1000 else f"{value:.0f}"


def table(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    head = list(head)
    rows = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join([*rows, *("| " + " | ".join(line) + " |" for line in lines)]).replace(
        "|  |", "| |"
    )


def measured_on(rows: list[Row]) -> str:
    """What a table's figures must be read with, in a line."""
    if not rows:
        return "Not measured yet."
    commits = sorted({str(row.get("commit", "?")) for row in rows})
    dates = sorted({str(row.get("date", "?")) for row in rows})
    first = rows[0]
    threads = ", ".join(sorted({str(row.get("threads", "?")) for row in rows}))
    text = f"{first.get('cpu', '?')}, threads: {threads}, {first.get('isa', '?')}"
    text += f", torch {first.get('torch', '?')}, commit {', '.join(commits)}, {', '.join(dates)}"
    loads = [row["load"] for row in rows if "load" in row]
    text += f", load {min(loads):.1f} to {max(loads):.1f}" if loads else ""
    others = max((row.get("others", 0.0) for row in rows), default=0.0)
    if others > 0.1:
        text += f"; BUSY: other processes took up to {others:.1f} cores meanwhile"
    return text + "."


def label_of(row: Row) -> str:
    key = row["provider"], row.get("optimizer", ""), str(row.get("options", ""))
    name = LIBRARIES.get(row["provider"], row["provider"])
    return STEPS.get(key) or f"{name} {row.get('version', '')}".strip()


def step_table() -> str:
    """Step ÷ product and memory of every provider, a pair of columns for each shape."""
    rows = results("step") + results("peers")
    shapes = list(dict.fromkeys(shape_of(row) for row in rows))
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(label_of(row), {})[shape_of(row)] = row
    head = ["", *(cell for shape in shapes for cell in (shape, ""))]
    lines = []
    for label, of in found.items():
        line = [label]
        for shape in shapes:
            row = of.get(shape, {"error": "not measured"})
            if "error" in row:
                line += [row["error"], ""]
            else:
                line += [f"{row['ratio']:.2f}", f"{row['peak_bytes'] / 1e6:.0f} MB"]
        lines.append(line)
    return table(head, lines)


def integrations_table() -> str:
    """Seconds of a step before and after, a pair of columns for each shape."""
    rows = results("integrations")
    shapes = list(dict.fromkeys(tuple(row[size] for size in "ndfk") for row in rows))
    named = [f"N {n}, D {d}, F {f}, K {k}" for n, d, f, k in shapes]
    found = {(r["library"], r["case"], tuple(r[size] for size in "ndfk")): r for r in rows}
    lines = []
    for case, label in CASES.items():
        line = [label]
        for shape in shapes:
            row = found[(*case, shape)]
            ratio = row["before_s"] / row["after_s"]
            line += [f"{short(row['before_s'])} → {short(row['after_s'])}"]
            line += [f"{ratio:.0f}×" if ratio >= 10 else f"{ratio:.1f}×"]
        lines.append(line)
    return table(["", *(cell for shape in named for cell in (shape, ""))], lines)


def rules_table() -> str:
    """What each rule reaches: mean ± deviation of its seeds, the best first."""
    seeds: dict[str, list[Row]] = {}
    for row in read(RESULTS / "rules-minilm-l3.csv"):
        seeds.setdefault(row["rule"], []).append(row)

    def mean(rows: list[Row], name: str) -> float:
        return statistics.mean(row[name] for row in rows)

    lines = []
    for rule, rows in sorted(seeds.items(), key=lambda item: mean(item[1], "fvu")):
        if rule == "mutual-choice":  # to the bit what batchtopk is
            continue
        spread = statistics.stdev(row["fvu"] for row in rows)
        quantiles = ", ".join(f"{mean(rows, name):.0f}" for name in ("l0_5", "l0_50", "l0_95"))
        lines.append(
            [
                RULES.get(rule, rule),
                f"{mean(rows, 'fvu'):.4f} ± {spread:.4f}",
                f"{mean(rows, 'l0'):.1f} ({quantiles})",
                f"{mean(rows, 'dead_share'):.1%}".replace("%", " %"),
            ]
        )
    return table(["", "FVU", "L0 (5 %, 50 %, 95 % of tokens)", "dead"], lines)


def limits_table() -> str:
    """fastsae's operations on the CPU against their limits."""
    lines = []
    for row in results("ops"):
        if row["provider"] != "fastsae cpu" or "error" in row:
            continue
        if row["bound"] == "memory":
            work, rate = f"{row['moved_bytes'] / 1e6:.0f} MB", row["memory_gb_s"]
        else:
            kind = row["bound"].partition(" ")[0]
            work, rate = f"{row['flops'] / 1e9:.3g} GFLOP", row[f"{kind}_gflop_s"]
        limit = f"{work} ÷ {rate:.0f} {'GB/s' if 'MB' in work else 'GFLOP/s'} = "
        limit += f"{short(row['limit_ms'])} ms ({row['bound']})"
        reached = f"{row['of_limit']:.0%}".replace("%", " %")
        uncached = f"{row['of_uncached']:.0%}".replace("%", " %")
        cells = [row["op"], limit, f"{short(row['ms'])} ms", reached, uncached, row["note"]]
        lines.append([shape_of(row), *cells])
    head = ["", "operation", "limit", "fastsae", "of limit", "of uncached limit", "what bounds it"]
    return table(head, lines)


def ops_table() -> str:
    """Every operation, provider and shape."""
    lines = []
    for row in results("ops"):
        line = [shape_of(row), row["op"], row["provider"]]
        if "error" in row:
            lines.append([*line, row["error"], "", ""])
            continue
        ms = f"{short(row['ms'])} ({short(row['min_ms'])} to {short(row['max_ms'])})"
        reached = f"{row['of_limit']:.0%}".replace("%", " %")
        lines.append([*line, ms, f"{row['ratio']:.3f}", reached])
    return table(["", "operation", "provider", "ms (range)", "÷ product", "of limit"], lines)


def scaling_table() -> str:
    """A step by width: fastsae's, its memory beside the plan's, and dense torch's."""
    found: dict[int, dict[str, Row]] = {}
    for row in results("scaling"):
        if "ranks" not in row:
            found.setdefault(row["f"], {})[row["provider"]] = row
    lines = []
    for f, of in found.items():
        line = [f"{f:,}"]
        for provider in ("fastsae", "torch-dense"):
            row = of.get(provider)
            if row is None or "error" in row:
                gone = "" if row is None else "does not fit"
                line += [gone, "", ""] + ([""] if provider == "fastsae" else [])
                continue
            line += [f"{short(row['ms'])} ms", f"{row['ratio']:.2f}"]
            line += [f"{row['peak_bytes'] / 1e9:.2f} GB"]
            if provider == "fastsae":
                line.append(f"{row['plan_bytes'] / 1e9:.2f} GB")
        lines.append(line)
    head = ["F", "fastsae, a step", "÷ product", "memory", "planned"]
    return table([*head, "dense torch", "÷ product", "memory"], lines)


def ranks_table() -> str:
    """What ranks exchange in a step."""
    lines = []
    for row in results("scaling"):
        if "ranks" not in row:
            continue
        if "error" in row:
            lines.append([str(row["ranks"]), row["error"], "", "", "", ""])
            continue
        share = f"{row['exchange_share']:.0%}".replace("%", " %")
        cells = [f"{row['received_bytes'] / 1e6:.2f} MB", f"{row['exchange_ms']:.1f} ms", share]
        cells += [f"{row[f'{name}_ms']:.3f} ms" for name in ("nvlink", "infiniband")]
        lines.append([str(row["ranks"]), f"{row['ms']:.0f} ms", *cells])
    head = ["P", "step", "received a rank", "in exchanges", "of the step"]
    return table([*head, "at 450 GB/s (NVLink)", "at 50 GB/s (InfiniBand)"], lines)


def width_table() -> str:
    """FVU and dead share by width."""
    lines = [
        [f"{row['f']:,}", f"{row['fvu']:.4f}", f"{row['dead_share']:.1%}".replace("%", " %")]
        for row in results("width", "minilm-l3")
    ]
    return table(["F", "FVU", "dead"], lines)


def quality_table() -> str:
    """How far each provider got in the time of `bench/quality.py`."""
    last = {
        label_of(row) if row["provider"] != "fastsae" else "fastsae": row
        for row in results("quality")
        if "fvu" in row
    }
    lines = [
        [name, str(row["steps"]), f"{row['seconds']:.0f} s", f"{row['fvu']:.4f}"]
        for name, row in last.items()
    ]
    return table(["", "steps", "in", "held-out FVU"], lines)


def harvesting_table() -> str:
    """Seconds of the clock and of the CPU, and what was harvested in one of these."""
    lines = [
        [
            row["op"],
            f"{row['seconds']:.0f} s",
            f"{row['cpu_seconds']:.0f} s",
            f"{row['rows_per_cpu_s']:.0f}" if "rows_per_cpu_s" in row else "",
        ]
        for row in results("harvesting", "smollm2")
    ]
    return table(["", "clock", "CPU", "rows of each site a second of the CPU"], lines)


def machine_line(*parts: str) -> str:
    return measured_on([row for part in parts for row in results(part)])


TABLES = {
    "step": step_table,
    "integrations": integrations_table,
    "rules": rules_table,
    "limits": limits_table,
    "ops": ops_table,
    "scaling": scaling_table,
    "ranks": ranks_table,
    "width": width_table,
    "quality": quality_table,
    "harvesting": harvesting_table,
    "machine of harvesting": lambda: measured_on(results("harvesting", "smollm2")),
    "machine of scaling": lambda: machine_line("scaling"),
    "machine of step": lambda: machine_line("step", "peers"),
    "machine of ops": lambda: machine_line("ops"),
    "machine of quality": lambda: machine_line("quality"),
}
