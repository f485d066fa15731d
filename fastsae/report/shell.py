"""What every page has around its contents: one HTML file with its style and its script in it.

Everything that comes from data, logs or names passes `esc`. The page's policy lets it run its own
script, known by its hash, and send no request.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from string import Template

import fastsae
from fastsae.report.text import esc

_HERE = Path(__file__).parent


def html_page(kind: str, title: str, lead: str, body: str, script: str = "") -> str:
    """The page as text. kind, title and lead are plain text, body is HTML; script is a file of
    this folder, "" for a page without one."""
    code = _file(script) if script else ""
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    return Template(_file("page.html")).substitute(
        kind=esc(kind),
        title=esc(title),
        lead=esc(lead),
        body=body,
        footer=esc(f"Written by fastsae {fastsae.__version__}. This file sends no request."),
        style=_file("page.css"),
        script=f"<script>{code}</script>" if script else "",
        scripts=f"'sha256-{digest}'" if script else "'none'",
    )


def section(title: str, about: str, content: str) -> str:
    """A part of a page's body; "" without content."""
    if not content:
        return ""
    about = f'<p class="about">{esc(about)}</p>\n' if about else ""
    return f"<section>\n<h2>{esc(title)}</h2>\n{about}{content}</section>"


def chart_grid(figures: list[str]) -> str:
    drawn = "".join(figures)
    return f'<div class="charts">\n{drawn}</div>\n' if drawn else ""


def tile(label: str, value: str, remark: str) -> str:
    return (
        f'<div class="tile"><dt>{esc(label)}</dt><dd><span class="value">{esc(value)}</span>'
        f"<small>{esc(remark)}</small></dd></div>\n"
    )


def _file(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")
