"""The page: what was read and measured, as one HTML file.

Everything that comes from data, logs or names passes `esc`. The page's policy lets it run its own
script, known by its hash, and send no request.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import fastsae
from fastsae.config import SAEConfig
from fastsae.report.history import History, number
from fastsae.report.latents import examples_about, latent_cards, latent_charts, latents_about
from fastsae.report.portrait import Portrait
from fastsae.report.text import cut, duration, esc, percent, short
from fastsae.report.training import training_about, training_charts

_SETTING, _SETTINGS = 200, 100  # characters of a setting; settings shown of a table


def document(
    name: str, config: SAEConfig, source: str, history: History, portrait: Portrait
) -> str:
    """The whole document. `source` names the data that the portrait was measured on."""
    steps = int(history.log.step[-1]) if history.log.step else 0
    tokens = history.log.curve("tokens")[1]
    lead = (
        f"{config.selection.name}, {config.d_sae:,} latents, activations of width {config.d_in:,}"
    )
    if config.is_transcoder:
        lead += f" to {config.d_out:,}"
    if steps:
        lead += f"; {steps:,} steps"
        lead += f", {int(tokens[-1]):,} tokens" if tokens else ""
    body = [
        _tiles(config, history, portrait),
        _section("Training", training_about(history), _charts(training_charts(config, history))),
        _section(
            "Latents", latents_about(source, portrait), _charts(latent_charts(config, portrait))
        ),
        _section("What latents respond to", examples_about(portrait), latent_cards(portrait)),
        _section("Configuration", "", _settings(config, history)),
    ]
    here = Path(__file__)
    script = here.with_name("page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return Template(here.with_name("page.html").read_text(encoding="utf-8")).substitute(
        title=esc(name),
        lead=esc(lead),
        body="\n".join(filter(None, body)),
        footer=esc(f"Written by fastsae {fastsae.__version__}. This file sends no request."),
        style=here.with_name("page.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=f"sha256-{digest}",
    )


def _section(title: str, about: str, content: str) -> str:
    if not content:
        return ""
    about = f'<p class="about">{esc(about)}</p>\n' if about else ""
    return f"<section>\n<h2>{esc(title)}</h2>\n{about}{content}</section>"


def _charts(figures: Iterable[str]) -> str:
    drawn = "".join(figures)
    return f'<div class="charts">\n{drawn}</div>\n' if drawn else ""


# ---- the numbers that matter ----


def _tiles(config: SAEConfig, history: History, portrait: Portrait) -> str:
    m = {name: number(value) for name, value in history.metrics.items()}
    m = {name: value for name, value in m.items() if math.isfinite(value)}
    tiles = []
    evaluated = history.evals.curve("fvu")[1]
    if "fvu" not in m and evaluated:
        m["fvu"] = evaluated[-1]
    if "fvu" in m:
        tiles.append(_fvu_tile(m))
    tiles += _in_model_tile(history.in_model)
    l0 = m.get("l0", float(portrait.l0.mean()))
    remark = "active latents a token, on average"
    if "training_l0" in m:
        remark += f"; {short(m['training_l0'])} in the rule's form of training"
    tiles.append(_tile("L0", short(l0), remark))
    if "dead_share" in m:
        dead, silent = m["dead_share"], "silent in training"
        if "dead_share_rows" in m:
            silent = f"silent on {m['dead_share_rows']:,.0f} training rows"
    else:
        dead = float((portrait.counts == 0).mean())
        silent = f"silent on {portrait.n_rows:,} rows"
    tiles.append(_tile("Dead", percent(dead), f"of {config.d_sae:,} latents, {silent}"))
    if "tokens_per_s" in m:
        seconds = f"trained in {duration(m['train_seconds'])}" if "train_seconds" in m else ""
        tiles.append(_tile("Tokens per second", f"{m['tokens_per_s']:,.0f}", seconds))
    if "step_ratio" in m:
        product = ""
        if "product_seconds" in m:
            product = f", {duration(m['product_seconds'])}"
        about = f"time of a step over that of one dense fp32 encoder product{product}"
        tiles.append(_tile("Step ÷ product", short(m["step_ratio"]), about))
    return f'<dl class="tiles">\n{"".join(tiles)}</dl>\n'


def _tile(label: str, value: str, remark: str) -> str:
    return (
        f'<div class="tile"><dt>{esc(label)}</dt><dd><span class="value">{esc(value)}</span>'
        f"<small>{esc(remark)}</small></dd></div>\n"
    )


def _fvu_tile(m: Mapping[str, float]) -> str:
    rows = [("own", "this SAE", m["fvu"])]
    if "pca_fvu" in m:
        name = f"PCA, {short(m['pca_components'])} components" if "pca_components" in m else "PCA"
        rows.append(("", name, m["pca_fvu"]))
    compared = "".join(
        f"<span>{esc(name)}</span><b>{value:.4f}</b>"
        f'<i class="{kind}" style="--share:{min(1.0, max(0.0, value)):.4f}"></i>'
        for kind, name, value in rows
    )
    return (
        '<div class="tile wide"><dt>FVU on held-out rows</dt>'
        f'<dd><span class="value">{m["fvu"]:.4f}</span><div class="compare">{compared}</div>'
        "<small>Fraction of variance unexplained, Σ‖x − x̂‖² / Σ‖x − x̄‖². 0 is a perfect "
        "reconstruction; 1, the full width, is predicting the mean.</small></dd></div>\n"
    )


def _in_model_tile(found: Mapping[str, Any]) -> list[str]:
    names = ("delta_ce_loss", "ce_loss_score", "kl_div_score")
    loss, ce, kl = (number(found.get(name)) for name in names)
    if not math.isfinite(loss + ce + kl):
        return []
    model = cut(str(found.get("model")), 60)
    remark = (
        f"nats of next-token loss with the SAE in {model}; CE score {ce:.4f}, KL score {kl:.4f}"
    )
    return [_tile("Loss in the model", f"{loss:+.4f}", remark)]


# ---- configuration ----


def _settings(config: SAEConfig, history: History) -> str:
    sae, train = config.to_dict(), history.config.get("config", {}).get("train")
    known = {*sae, *(train if isinstance(train, dict) else ())}
    tables: list[tuple[str, Any]] = [
        ("SAE", sae),
        ("Training", train),
        ("Run", {name: value for name, value in history.run.items() if name not in known}),
        ("Engine", history.config.get("engine")),
    ]
    shown = []
    for title, values in tables:
        if isinstance(values, dict) and values:
            rows = _flat(values)[:_SETTINGS]
            items = "".join(f"<dt>{esc(k)}</dt><dd>{esc(v)}</dd>" for k, v in rows)
            shown.append(f"<div><h3>{title}</h3><dl>{items}</dl></div>\n")
    return f'<div class="settings">\n{"".join(shown)}</div>\n'


def _flat(values: Mapping[str, Any], prefix: str = "") -> Sequence[tuple[str, str]]:
    """Settings by dotted name, each cut to a bounded length."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, dict) and value and prefix.count(".") < 3:
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append((cut(f"{prefix}{key}", _SETTING), cut(_setting(value), _SETTING)))
    return rows


def _setting(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "–"
    return f"{value:g}" if isinstance(value, float) else str(value)
