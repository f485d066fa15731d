"""Ours: config.json and sae.safetensors, as `SAE.save` writes them."""

from __future__ import annotations

from pathlib import Path

from fastsae.formats.files import folder_of, has
from fastsae.formats.reading import check_numbers
from fastsae.sae import SAE

FILES = "sae.safetensors and config.json"
WEIGHTS, CONFIG = "sae.safetensors", "config.json"


def matches(path: Path) -> bool:
    return has(path, WEIGHTS, CONFIG)


def read(path: Path, normalized: bool) -> SAE:
    """The SAE of a folder. ValueError also for numbers that `SAE.load` does not look at."""
    sae = SAE.load(folder_of(path))
    for name, t in sae.state_dict().items():
        check_numbers(name, t, infinities=name.startswith("selection_state."))
        if name in ("input_scale", "output_scale") and not t > 0:
            raise ValueError(f"{name}: expected a number above 0, got {float(t)}")
    return sae


def write(sae: SAE, folder: Path) -> None:
    """As `SAE.save`."""
    sae.save(folder)
