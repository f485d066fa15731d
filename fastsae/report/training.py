"""The page's charts of a run's course."""

from __future__ import annotations

import math

import numpy as np

from fastsae.config import SAEConfig
from fastsae.report.charts import Curve, curves
from fastsae.report.history import History, number
from fastsae.report.text import percent, percent_tick, short


def training_about(history: History) -> str:
    left_out = history.unreadable
    return f"{left_out} unreadable lines of log.jsonl are left out." if left_out else ""


def training_charts(config: SAEConfig, history: History) -> list[str]:
    log, evals = history.log, history.evals
    pca = number(history.metrics.get("pca_fvu"))
    steps, rates, step_seconds = history.speed()
    return [
        _loss(log.curve("loss")),
        curves(
            "FVU",
            [
                Curve("training batch", *log.curve("fvu")),
                Curve("held-out", *evals.curve("fvu"), dots=True),
            ],
            "Fraction of variance unexplained. The held-out value is the one to judge by; a "
            "training batch lies below it where the SAE fits its own rows too well.",
            unit="Σ‖x − x̂‖² / Σ‖x − x̄‖²",
            level=("PCA", pca) if math.isfinite(pca) else None,
            from_zero=True,
        ),
        _dead(config, history),
        _speed(history, steps, rates, step_seconds),
        _l0_curve(log.curve("l0")),
    ]


def _loss(curve: tuple[list[float], list[float]]) -> str:
    steps, values = curve
    if not values:
        return ""
    log = min(values) > 0 and max(values) > 8 * min(values)
    return curves(
        "Loss",
        [Curve("loss", steps, values)],
        f"What training minimises; it ended at {short(values[-1])}. Where it falls steadily before "
        "the learning rate does, more steps would help.",
        unit="mean over tokens and width, scaled data" + (" (log scale)" if log else ""),
        log=log,
        from_zero=not log,
    )


def _dead(config: SAEConfig, history: History) -> str:
    steps, counts = history.log.curve("n_dead")
    tokens = history.log.curve("tokens")[1]
    lines = [
        Curve("in training", steps, [n / config.d_sae for n in counts]),
        Curve("silent on held-out rows", *history.evals.curve("dead_share"), dots=True),
    ]
    after = f"{config.dead_after:,} tokens"
    caption = f"Share of the latents that have not fired for {after}."
    if tokens and tokens[-1] < config.dead_after:
        caption += f" None can be, in a run of {int(tokens[-1]):,} tokens."
    return curves(
        "Dead latents",
        lines,
        caption,
        unit="share of latents",
        from_zero=True,
        top=0.01,
        form=percent,
        tick_form=percent_tick,
    )


def _speed(
    history: History, steps: list[float], rates: list[float], step_seconds: list[float]
) -> str:
    if not rates:
        return ""
    caption = (
        f"Between neighbouring lines of the log. The median is {np.median(rates):,.0f} tokens/s"
    )
    product = number(history.metrics.get("product_seconds"))
    if product > 0:
        ratio = float(np.median(step_seconds)) / product
        caption += f", a step in the time of {short(ratio)} dense encoder products"
    return curves(
        "Speed", [Curve("tokens/s", steps, rates)], caption + ".", unit="tokens/s", from_zero=True
    )


def _l0_curve(curve: tuple[list[float], list[float]]) -> str:
    steps, values = curve
    if not values or max(values) - min(values) < 0.01 * max(values):
        return ""
    return curves(
        "L0 in training",
        [Curve("L0", steps, values)],
        "Mean number of active latents a token in the training batches: whether the rule holds, "
        "or has reached, its budget.",
        unit="active latents a token",
        from_zero=True,
    )
