"""The page of a run: what was read and measured, as one HTML file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fastsae.config import SAEConfig
from fastsae.report.history import History, number
from fastsae.report.latents import examples_about, latent_cards, latent_charts, latents_about
from fastsae.report.portrait import Portrait
from fastsae.report.shell import chart_grid, html_page, section, tile
from fastsae.report.tables import consistency_content, in_model_content
from fastsae.report.text import cut, duration, esc, flat, percent, setting, short
from fastsae.report.training import training_about, training_charts

_SETTINGS = 100  # shown of a table


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
        section("Training", training_about(history), chart_grid(training_charts(config, history))),
        section("In the language model", *in_model_content(history.in_model)),
        section(
            "Latents", latents_about(source, portrait), chart_grid(latent_charts(config, portrait))
        ),
        section("What latents respond to", examples_about(portrait), latent_cards(portrait)),
        section("In common with other runs", *consistency_content(history.consistency)),
        section("Configuration", "", _settings(config, history)),
    ]
    return html_page("report", name, lead, "\n".join(filter(None, body)), "page.js")


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
    tiles.append(tile("L0", short(l0), remark))
    if "dead_share" in m:
        dead, silent = m["dead_share"], "silent in training"
        if "dead_share_rows" in m:
            silent = f"silent on {m['dead_share_rows']:,.0f} rows"
    else:
        dead = float((portrait.counts == 0).mean())
        silent = f"silent on {portrait.n_rows:,} rows"
    tiles.append(tile("Dead", percent(dead), f"of {config.d_sae:,} latents, {silent}"))
    if "tokens_per_s" in m:
        seconds = f"trained in {duration(m['train_seconds'])}" if "train_seconds" in m else ""
        tiles.append(tile("Tokens per second", f"{m['tokens_per_s']:,.0f}", seconds))
    if "step_ratio" in m:
        product = ""
        if "product_seconds" in m:
            product = f", {duration(m['product_seconds'])}"
        about = f"time of a step over that of one dense fp32 encoder product{product}"
        tiles.append(tile("Step ÷ product", short(m["step_ratio"]), about))
    return f'<dl class="tiles">\n{"".join(tiles)}</dl>\n'


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
    return [tile("Loss in the model", f"{loss:+.4f}", remark)]


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
            rows = flat(values)[:_SETTINGS]
            items = "".join(f"<dt>{esc(k)}</dt><dd>{esc(setting(v))}</dd>" for k, v in rows)
            shown.append(f"<div><h3>{title}</h3><dl>{items}</dl></div>\n")
    return f'<div class="settings">\n{"".join(shown)}</div>\n'
