"""``fastsae pages``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from fastsae import runs
from fastsae.corpus import CodeSet
from fastsae.data import open_source
from fastsae.models import CACHE, load_model
from fastsae.report.pages import write_pages


@dataclass(frozen=True)
class Pages:
    """Write pages to browse all latents of a run: contexts, neighbours, logit effects."""

    run_directory: tyro.conf.Positional[Path]
    """What train wrote; of an unfinished run the newest checkpoint is taken."""
    codes: Path
    """What encode wrote with this SAE."""
    out: Path
    """Folder of the pages; there must be nothing in it. Open its index.html."""
    data: str | None = None
    """The activations that were encoded; None: the run's."""
    model: str | None = None
    """The model that they come from, as for harvest: gives token ids their text and, of a causal
    model, each latent its direct logit effects."""
    contexts: int = 10
    """Contexts shown of a latent, of those that encode kept."""
    cache: Path = CACHE
    """Where the dequantised weights of smollm2 are kept."""

    def run(self) -> None:
        sae, codes = runs.sae_of(self.run_directory), CodeSet(self.codes)
        source = open_source(self.data) if self.data else runs.data_of(self.run_directory)
        model = load_model(self.model, self.cache.expanduser()) if self.model else None
        name, options = self.run_directory.resolve().name, {"contexts": self.contexts}
        print(write_pages(self.out, name, sae, codes, source, model, **options, progress=True))
