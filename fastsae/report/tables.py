"""The page's sections of what was measured beside the training: in the model, between runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastsae.report.charts import Scale, histogram
from fastsae.report.history import number
from fastsae.report.latents import cosine_bars
from fastsae.report.shell import chart_grid, tile
from fastsae.report.text import SETTING, cut, esc, flat, setting, short, tick

_FIGURES, _PAIRS, _CHARTS = 100, 60, 8  # shown at most

IN_MODEL = {
    "ce_loss_without_sae": "next-token cross-entropy of the model as it is, nats a token",
    "ce_loss_with_sae": "with the SAE's reconstructions in the place of its activations",
    "delta_ce_loss": "the difference of the two: what the SAE costs",
    "ce_loss_with_ablation": "with zeros in their place",
    "ce_loss_with_mean_ablation": "with their mean in their place",
    "ce_loss_score": "how much of what zeros cost the SAE saves: 1 is all, 0 is nothing",
    "ce_loss_score_mean_ablation": "how much of what the mean costs it saves",
    "kl_div_with_sae": "KL divergence from the model's predictions to those with the SAE, nats",
    "kl_div_with_ablation": "to those with zeros",
    "kl_div_with_mean_ablation": "to those with the mean",
    "kl_div_score": "how much of the divergence with zeros the SAE saves",
    "kl_div_score_mean_ablation": "how much of that with the mean it saves",
    "fvu": "fraction of variance unexplained",
    "explained_variance": "1 − FVU",
    "cossim": "cosine of an activation and its reconstruction, mean",
    "l2_ratio": "norm of reconstructions over that of activations, mean",
    "relative_reconstruction_bias": "below 1 reconstructions are too short",
    "l0": "active latents a token",
}
"""Known figures of in_model.json in the order of the page, with what they mean."""


def in_model_content(figures: Mapping[str, Any]) -> tuple[str, str]:
    """(about, HTML) of in_model.json; other names than the known come last, as they are."""
    if not figures:
        return "", ""
    found = dict(flat(figures))
    names = [name for name in IN_MODEL if name in found]
    names += [name for name in found if name not in IN_MODEL][:_FIGURES]
    rows = [(name, _figure(found[name]), IN_MODEL.get(name, "")) for name in names]
    about = "The SAE spliced into its language model; from in_model.json."
    return about, _table("meanings", ("figure", "value", "what it is"), rows)


def consistency_content(figures: Mapping[str, Any]) -> tuple[str, str]:
    """(about, HTML) of consistency.json. What is not as `fastsae compare` writes it is left out."""
    if not figures:
        return "", ""
    names = [cut(str(name), SETTING) for name in _list(figures.get("runs"))]
    pairs = [pair for pair in _list(figures.get("pairs")) if isinstance(pair, dict)]
    tiles = []
    if "pw_mcc" in figures:
        remark = "mean cosine of matched decoder rows"
        if len(pairs) > 1:
            remark += f", ± {short(number(figures.get('deviation')))} over {len(pairs)} pairs"
        tiles.append(tile("PW-MCC", short(number(figures["pw_mcc"])), remark))
    for name, value in zip(names, _list(figures.get("gt_mcc"))[:_PAIRS], strict=False):
        tiles.append(tile("GT-MCC", short(number(value)), f"with the true directions: {name}"))
    rows: list[tuple[str, ...]] = []
    drawn: list[str] = []
    for pair in pairs[:_PAIRS]:
        title = _pair_name(pair, names)
        columns = ("mcc", "gap", "shared", "agreement")
        rows.append((title, *(short(number(pair.get(name))) for name in columns)))
        if len(drawn) < _CHARTS:
            drawn.append(_matched(title, pair))
    about = (
        "Decoder rows of two runs, matched one to one for the largest mean cosine (mcc). Shared: "
        "latents whose decoder and encoder rows have one partner, both at a cosine above 0.7. From "
        "consistency.json."
    )
    head = ("runs", "mcc", "gap", "shared", "agreement")
    table = _table("pairs", head, rows) if rows else ""
    shown = f'<dl class="tiles even">\n{"".join(tiles)}</dl>\n' if tiles else ""
    return about, shown + table + chart_grid([chart for chart in drawn if chart])


def _matched(title: str, pair: Mapping[str, Any]) -> str:
    counts = _list(pair.get("histogram"))
    if len(counts) != 40 or not all(type(n) is int and 0 <= n < 1 << 48 for n in counts):
        return ""
    bars = cosine_bars(counts)
    mean = number(pair.get("mcc"))
    return histogram(
        f"Matched cosines: {title}",
        bars,
        f"Of {sum(counts):,} latents, the cosine of their decoder row with its partner's.",
        unit="latents",
        x_title="cosine",
        ticks=[(t, tick(t)) for t in Scale(bars[0].low, 1.0).ticks(5)],
        marker=(f"mean {short(mean)}", mean) if bars[0].low <= mean <= 1 else None,
    )


def _pair_name(pair: Mapping[str, Any], names: Sequence[str]) -> str:
    places = _list(pair.get("runs"))[:2]
    return ", ".join(
        names[i] if type(i) is int and 0 <= i < len(names) else cut(str(i), SETTING) for i in places
    )


def _table(kind: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        texts = "".join(f"<{tag}>{esc(cell)}</{tag}>" for cell in cells[1:])
        return f"<tr><th>{esc(cells[0])}</th>{texts}</tr>\n"

    body = "".join(line("td", cells) for cells in rows)
    return (
        f'<table class="{kind}">\n<thead>\n{line("th", head)}</thead>\n'
        f"<tbody>\n{body}</tbody>\n</table>\n"
    )


def _figure(value: Any) -> str:
    found = number(value)
    return short(found) if math.isfinite(found) else setting(value)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
