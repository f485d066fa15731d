"""Ours: config.json and sae.safetensors, as `SAE.save` writes them."""

from __future__ import annotations

from pathlib import Path

from fastsae.formats.files import folder_of, has
from fastsae.sae import SAE

FILES = "sae.safetensors and config.json"
WEIGHTS, CONFIG = "sae.safetensors", "config.json"


def matches(path: Path) -> bool:
    return has(path, WEIGHTS, CONFIG)


def read(path: Path, normalized: bool) -> SAE:
    """The SAE of a folder."""
    return SAE.load(folder_of(path))


def write(sae: SAE, folder: Path) -> None:
    """As `SAE.save`."""
    sae.save(folder)
