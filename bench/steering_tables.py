"""The tables and the figure of docs/steering.md and docs/lora.md, from rows of bench/results/."""

from __future__ import annotations

import statistics

from rows import Row
from steering import WAYS
from svg import curves
from tables import measured_on, results, table

OF = "smollm2-l11"
SHOWN = (0.1, 0.2, 0.4)


def rows_of_ways() -> dict[str, list[Row]]:
    """Way → its rows, by concept and strength; in the order of `WAYS`."""
    rows = results("steering", OF)
    return {way: [row for row in rows if row["way"] == way] for way in WAYS}


def steering_table() -> str:
    """Gain and cost of each way, columns for some strengths of each concept."""
    concepts = list(dict.fromkeys(row["concept"] for row in results("steering", OF)))
    lines = []
    for way, rows in rows_of_ways().items():
        found = {(row["concept"], row["strength"]): row for row in rows}
        cells = [found[concept, strength] for concept in concepts for strength in SHOWN]
        lines.append([WAYS[way], *(f"{r['gain']:+.2f} (×{_ratio(r['ratio'])})" for r in cells)])
    head = ["", *(f"{concept}, {strength}" for concept in concepts for strength in SHOWN)]
    return table(head, lines)


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:,.0f}"


def texts_table() -> str:
    """How the model goes on with the prompt, for each way that has a text."""
    lines = []
    for row in results("steering", OF):
        if "text" in row and row["way"] != "random":
            name = WAYS.get(row["way"], "without steering")
            lines.append([row["concept"], name, row["text"].replace("|", "\\|")])
    return table(["", "", "the prompt goes on"], lines)


def steering_figure() -> str:
    """Gain against perplexity, a curve for each way: strengths along it, means over concepts."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for way, rows in rows_of_ways().items():
        for strength in sorted({row["strength"] for row in rows}):
            of = [row for row in rows if row["strength"] == strength]
            ratio = statistics.geometric_mean(row["ratio"] for row in of)
            gain = statistics.mean(row["gain"] for row in of)
            lines.setdefault(WAYS[way], []).append((ratio, gain))
    title = "What a concept's words gain, and what the text's perplexity costs"
    return curves(title, lines, "perplexity ÷ that without steering", "gain, nats")


def lora_table() -> str:
    """Held-out figures over training tokens."""
    lines = [
        [
            f"{row['lr']:g}",
            f"{row['held_out_tokens']:,}",
            f"{row['tokens']:,}",
            f"{row['seconds']:.0f} s",
            f"{row['ce_model']:.4f}",
            f"{row['ce_spliced']:.4f}",
            f"{row['gap']:.4f}",
            f"{row['kl']:.4f}",
        ]
        for row in results("lora", OF)
    ]
    head = [
        "learning rate",
        "held out",
        "training tokens",
        "training",
        "CE, model",
        "CE, spliced",
        "gap",
        "KL",
    ]
    return table(head, lines)


TABLES = {
    "steering": steering_table,
    "texts of steering": texts_table,
    "lora": lora_table,
    "machine of steering": lambda: measured_on(results("steering", OF)),
    "machine of lora": lambda: measured_on(results("lora", OF)),
}
