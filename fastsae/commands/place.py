"""Options that commands share which look at an SAE inside its language model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsae import runs
from fastsae.corpus import digest
from fastsae.evaluation import At, Windows, read_windows
from fastsae.models import CACHE, LanguageModel, load_model
from fastsae.sae import SAE
from fastsae.sites import Site


@dataclass(frozen=True)
class Place:
    """A language model, a site in it, and text. Layer, site and window are by default those of the
    harvested set that the run was trained on."""

    text: tuple[Path, ...] = ()
    """Files to measure on, with a model: .txt, or .jsonl with a field "text"."""
    layer: int | None = None
    """The block, counted from 1."""
    site: Site | None = None
    """Output of the block (residual), of its MLP or of its attention."""
    window: int | None = None
    """Positions that the model reads at once, special tokens included."""
    tokens: int = 50_000
    """Positions to measure on, in random windows."""
    seen: bool = False
    """Also take windows that the run's data hold."""
    batch_size: int = 4
    """Windows that the model reads at a time."""
    bf16_model: bool = False
    """Run the model's products in bfloat16 (autocast)."""
    cache: Path = CACHE
    """Where the dequantised weights of smollm2 are kept."""
    device: str = "cpu"
    """Where model and SAE run."""

    def open(self, run: Path, name: str) -> Opened:
        """Loads the model `name` for a run. ValueError: what is missing or does not fit."""
        index = runs.harvest_of(run) or {}
        layer = index.get("layer") if self.layer is None else self.layer
        if layer is None:
            raise ValueError(
                f"layer: expected a number, as {run} does not say which (it was not trained on a "
                "folder that harvest wrote, or that is no longer there), got none"
            )
        site = self.site or index.get("site", "residual")
        at = At(layer, site, self.batch_size, self.bf16_model)
        model = load_model(name, self.cache.expanduser(), self.device)
        at.module(model)
        return Opened(self, model, at, index)


@dataclass(frozen=True)
class Opened:
    """A place with its model loaded."""

    place: Place
    model: LanguageModel
    at: At
    index: dict[str, Any]
    """Of the harvested set; empty where it is not there."""

    def windows(self) -> Windows:
        """The windows of text to measure on."""
        length = self.place.window
        if length is None:
            length = self.index.get("window", 128)
        found = read_windows(self.model.tokenizer, self.place.text, length, self.index or None)
        return found.sample(self.place.tokens, seen=self.place.seen)

    def said(self, sae: SAE, windows: Windows | None) -> dict[str, Any]:
        """What figures must be read with: weights, site, text, and what the SAE saw of it."""
        harvested = self.index.get("weights")
        found: dict[str, Any] = {
            "sae": digest(sae),
            "model": self.model.name,
            "weights": self.model.weights,
            "weights_as_harvested": harvested == self.model.weights if harvested else None,
            "layer": self.at.layer,
            "site": self.at.site,
            "bf16_model": self.at.bf16_model,
        }
        if windows is not None:
            seen = windows.seen
            found |= {
                "text": [path.name for path in self.place.text],
                "window": windows.ids.shape[1],
                "windows": len(windows.ids),
                "windows_seen": None if seen is None else int(seen.sum()),
            }
        return found
