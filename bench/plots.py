"""Makes the tables of README.md and pages of docs/ and the figures from bench/results/.

    python bench/plots.py             rewrites them
    python bench/plots.py --check     fails where a file is not what the rows say

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; tables.py makes it.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from in_model import TABLES as IN_MODEL
from rows import Row
from steering_tables import TABLES as STEERING_TABLES
from steering_tables import steering_figure
from svg import COLOURS, Bar, bars, curves
from tables import TABLES as STEP_TABLES
from tables import label_of, results, shape_of, short

ROOT = Path(__file__).resolve().parent.parent
TABLES = STEP_TABLES | STEERING_TABLES | IN_MODEL
PAGES = tuple(
    ROOT / page
    for page in (
        "README.md",
        *(
            f"docs/{name}.md"
            for name in ("benchmarks", "evaluation", "harvest", "wide", "steering", "lora")
        ),
    )
)
FIGURES = ROOT / "docs" / "figures"
MARKED = re.compile(r"(<!-- table: ([^>]+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(page: str) -> str:
    """A page with its tables made anew. ValueError for a name that no table has."""

    def make(match: re.Match[str]) -> str:
        if match[2] not in TABLES:
            raise ValueError(f"table: expected one of {', '.join(TABLES)}, got {match[2]!r}")
        return f"{match[1]}{TABLES[match[2]]()}\n{match[3]}"

    return MARKED.sub(make, page)


def step_figure() -> str:
    """Bars of step ÷ product, for every provider and shape."""
    groups: dict[str, list[Bar]] = {}
    for row in results("step") + results("peers"):
        if "error" not in row and row.get("options") not in ("clip", "auxk"):
            ours = row["provider"] == "fastsae"
            text = f"{row['ratio']:.2f} · {row['peak_bytes'] / 1e9:.1f} GB"
            label = label_of(row).partition(" (")[0].partition(" through")[0]
            bar = Bar(label, row["ratio"], text, COLOURS[0] if ours else COLOURS[1])
            groups.setdefault(shape_of(row), []).append(bar)
    title = "A whole training step: fastsae (blue), dense torch and other libraries"
    return bars(title, groups, "time of a step ÷ time of one dense encoder product; memory")


def ops_figure() -> str:
    """Bars of the limit's share of fastsae's time and of the best of torch's ways."""
    groups: dict[str, list[Bar]] = {}
    best: dict[tuple[str, str], tuple[Row | None, Row | None]] = {}
    for row in results("ops"):
        is_rule = row["op"].startswith("encode, ") and "token" not in row["op"]
        if "error" in row or is_rule or row["provider"] == "torch, gradient given":
            continue
        key = shape_of(row), row["op"]
        ours, theirs = best.get(key, (None, None))
        if row["provider"] == "fastsae cpu":
            ours = row
        elif row["provider"].startswith("torch") and (not theirs or row["ms"] < theirs["ms"]):
            theirs = row
        best[key] = ours, theirs
    for (shape, op), pair in best.items():
        for row, colour in zip(pair, COLOURS, strict=False):
            if row is not None:
                ours = row["provider"].startswith("fastsae")
                label = op if ours else f"{op}: {row['provider']}"
                text = f"{row['of_limit']:.0%} · {short(row['ms'])} ms"
                groups.setdefault(shape, []).append(Bar(label, row["of_limit"], text, colour))
    title = "Operations: fastsae (blue) and the fastest of torch's ways (orange)"
    return bars(title, groups, "limit of this machine ÷ time")


def quality_figure() -> str:
    """FVU against seconds, a curve for each provider."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in results("quality"):
        if "fvu" in row and row["seconds"] > 0:
            name = label_of(row) if row["provider"] != "fastsae" else "fastsae"
            lines.setdefault(name, []).append((row["seconds"], row["fvu"]))
    title = "FVU of held-out rows while training, all from the same start"
    return curves(title, lines, "seconds of training", "FVU")


def scaling_figure() -> str:
    """Milliseconds against width: a step, its product, and dense torch's step."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in results("scaling"):
        if "ranks" in row or "error" in row:
            continue
        ours = row["provider"] == "fastsae"
        lines.setdefault("fastsae" if ours else "dense torch", []).append((row["f"], row["ms"]))
        if ours:
            lines.setdefault("one product", []).append((row["f"], row["product_ms"]))
            lines.setdefault("its encode", []).append((row["f"], row["forward_ms"]))
            lines.setdefault("its update", []).append((row["f"], row["update_ms"]))
    return curves("A training step by width", lines, "latents, F", "ms")


def width_figure() -> str:
    """FVU and dead share against width."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in results("width", "minilm-l3"):
        lines.setdefault("FVU", []).append((row["f"], row["fvu"]))
        if row["dead_share"] > 0:
            lines.setdefault("dead share", []).append((row["f"], row["dead_share"]))
    return curves("FVU and dead share by width, at equal tokens", lines, "latents, F", "share")


FIGURE = {
    "step": step_figure,
    "ops": ops_figure,
    "quality": quality_figure,
    "scaling": scaling_figure,
    "width": width_figure,
    "steering": steering_figure,
}
MADE_OF = {
    "step": ("peers",),
    "width": ("width", "minilm-l3"),
    "steering": ("steering", "smollm2-l11"),
}
"""Which rows a figure needs, where these have another name."""


def wanted() -> dict[Path, str]:
    """Every file that is made here → what should be in it."""
    pages = {page: filled(page.read_text()) for page in PAGES}
    figures = {
        FIGURES / f"{name}.svg": make()
        for name, make in FIGURE.items()
        if results(*MADE_OF.get(name, (name,)))
    }
    return pages | figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    stale = [
        path for path, text in wanted().items() if not path.exists() or path.read_text() != text
    ]
    if args.check:
        if stale:
            names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
            sys.exit(f"plots: not what bench/results/ says: {names}; run python bench/plots.py")
        return
    FIGURES.mkdir(exist_ok=True)
    texts = wanted()
    for path in stale:
        path.write_text(texts[path])
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
