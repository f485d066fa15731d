"""Numbers and texts as the page shows them."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping
from typing import Any

NBSP = "\u00a0"
SETTING = 200  # characters of a setting
_UNSHOWN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # controls, surrogates


def clean(text: str) -> str:
    """Text with U+FFFD in the place of what no file may hold."""
    return _UNSHOWN.sub("\ufffd", text)


def esc(text: object) -> str:
    """Text for HTML, inside elements and quoted attributes, clean."""
    return html.escape(clean(str(text)), quote=True)


def short(value: float) -> str:
    """A number with three or four significant digits: 0.2154, 32.9, 1,228,800."""
    if not math.isfinite(value):
        return "–"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}".replace("-", "−")
    size = abs(value)
    if size < 1e-3 or size >= 1e15:
        return f"{value:.2e}".replace("-", "−")
    digits = 0 if size >= 1000 else max(1, 3 - math.floor(math.log10(size)))
    return f"{value:,.{min(digits, 4)}f}".replace("-", "−")


def activation(value: float) -> str:
    """An activation, a cosine or an effect: 12.34, −0.07, 1.2e−03."""
    form = f"{value:.2f}" if value == 0 or 0.05 <= abs(value) < 1e4 else f"{value:.1e}"
    return form.replace("-", "−")


def tick(value: float) -> str:
    """A round number as short as it can be: 0.2, 1,500, 50k, 1.5M, 2e−05."""
    text = f"{value:,.0f}" if 1000 <= abs(value) < 10_000 else f"{value:g}"
    for unit, letter in ((1e3, "k"), (1e6, "M"), (1e9, "G")):
        if 10_000 <= abs(value) and unit <= abs(value) < 1000 * unit:
            text = f"{value / unit:g}{letter}"
    return text.replace("-", "−")


def percent_tick(share: float) -> str:
    return f"{tick(100 * share)}{NBSP}%"


def percent(share: float) -> str:
    """A share as 2.1 %, with two significant digits where it is small."""
    value = 100 * share
    if value in (0, 100):
        return f"{value:.0f}{NBSP}%"
    if value < 0.001:
        return f"<{NBSP}0.001{NBSP}%"
    digits = 1 if value >= 1 else 1 - math.floor(math.log10(value))
    return f"{value:.{digits}f}{NBSP}%"


def duration(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.1f}{NBSP}ms"
    if seconds < 120:
        return f"{seconds:.1f}{NBSP}s"
    minutes, hours = round(seconds / 60), seconds / 3600
    return f"{minutes}{NBSP}min" if minutes < 120 else f"{hours:.1f}{NBSP}h"


def cut(text: str, length: int) -> str:
    """At most that many characters of a text."""
    return text if len(text) <= length else text[: length - 1] + "…"


def setting(value: Any) -> str:
    """What a JSON file says, in few words."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "–"
    return cut(f"{value:g}" if isinstance(value, float) else str(value), SETTING)


def flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """What a JSON object says by dotted name, each cut to a bounded length."""
    rows: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, dict) and value and prefix.count(".") < 3:
            rows += flat(value, f"{prefix}{key}.")
        else:
            rows.append((cut(f"{prefix}{key}", SETTING), value))
    return rows
