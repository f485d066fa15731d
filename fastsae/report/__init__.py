"""``report.html``: what a run did and what its latents respond to, in one file.

    log.jsonl and RUN's .json files ──history──┐
    SAE, rows of activations ────────portrait──┴─▶ page (charts, tables) ─▶ RUN/report.html

The file holds its style, script and pictures, and sends no request. Its size is bounded: curves are
thinned, a few latents are shown up close, texts are cut. The same inputs give the same bytes.
`fastsae.report.pages` shows all latents, in a folder.
"""

from __future__ import annotations

from pathlib import Path

from fastsae.corpus import digest
from fastsae.data import Source
from fastsae.files import appear, write_text
from fastsae.report.history import read_history
from fastsae.report.page import document
from fastsae.report.portrait import portray
from fastsae.sae import SAE


def write_report(run: str | Path, sae: SAE, source: Source, train: Source | None = None) -> Path:
    """Writes RUN/report.html, whole or not at all, and returns its path.

    Latents are measured on rows of `source`, best those held out from training, then on rows of
    `train`: on at most `fastsae.report.portrait.MAX_ROWS` in all. What the run's log and figures
    lack, the report lacks; in_model.json of other weights is left out. ValueError: no rows, rows of
    another width, an unreadable .json file.
    """
    run = Path(run)
    sources = (source,) if train is None else (source, train)
    portrait = portray(sae, sources)
    name = run.resolve().name
    history = read_history(run)
    if history.in_model and history.in_model.get("sae") != digest(sae):
        history.in_model = {}
    text = document(name, sae.config, source.name, history, portrait)
    appear(run / "report.html", lambda partial: write_text(partial, text))
    return run / "report.html"
