"""``fastsae harvest | encode``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from fastsae import corpus, runs
from fastsae.data import open_source
from fastsae.harvest import HarvestConfig, harvest_sites
from fastsae.models import CACHE, load_model


@dataclass(frozen=True)
class Harvest:
    """Store a Hugging Face model's activations over text, to train on; goes on where it stopped."""

    model: tyro.conf.Positional[str]
    """A name on the hub, a local folder, or one of the tested minilm and smollm2."""
    text: tuple[Path, ...]
    """Files to read: .txt, or .jsonl with a field "text"."""
    out: Path
    """Folder of the set: index.json and shards; of several sites OUT/residual-3 and so on."""
    kept: HarvestConfig
    """What is kept."""
    cache: Path = CACHE
    """Where the dequantised weights of smollm2 are kept."""
    device: str = "cpu"
    """Where the model runs."""

    def run(self) -> None:
        self.kept.check()
        model = load_model(self.model, self.cache.expanduser(), self.device)
        harvest_sites(model, self.text, self.out, self.kept)


@dataclass(frozen=True)
class Encode:
    """Store the codes of activations, and the contexts each latent responds to most."""

    data: tyro.conf.Positional[str]
    """Activations, as for train."""
    sae: Path
    """What train wrote; of an unfinished run the newest checkpoint is taken."""
    out: Path
    """Folder of the set; one that was not finished goes on."""
    contexts: int = 20
    """Rows kept of each latent, those with its largest activations."""
    shard_rows: int = 16384
    """Rows of a shard."""
    device: str = "cpu"
    """Where the SAE runs."""

    def run(self) -> None:
        sae, source = runs.sae_of(self.sae).to(self.device), open_source(self.data)
        options = {"contexts": self.contexts, "shard_rows": self.shard_rows}
        found = corpus.encode_corpus(sae, source, self.out, **options, progress=True)
        pairs, silent = int(found.counts.sum()), int((found.counts == 0).sum())
        print(f"{found.n_rows:,} rows, {pairs:,} pairs (L0 {pairs / found.n_rows:.2f})")
        print(f"{silent:,} of {found.n_latents:,} latents are silent")
        print(self.out)
