"""Training rows straight from a model, without a disk between.

    live:STREAM.toml:residual-11      a site of the model and the text that the file names

The file holds options of ``fastsae harvest`` by name, with underscores: model, text, layer, site
and so on; not gradients and shard_rows. ``buffer_rows``, 65536 unless said, are shuffled among each
other in memory. Paths in it begin at its folder. The site may be left out where there is one.

A pass over the rows is to the bit what ``fastsae harvest`` would store with these options, in that
order, but for the rows held out: those of the last windows, which no training row comes from. They
are read once, at the start, and stay in memory. The rest goes through the buffer of
`fastsae.iterable`, so the count of rows handed out is the whole state. A training that goes on
runs the model again only on the windows whose rows wait in the buffer: four to seven buffers of
them, the more the more windows the model reads at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import torch
from torch import Tensor

from fastsae.activations import HarvestConfig, SiteReader
from fastsae.batches import Batch
from fastsae.contexts import set_contexts
from fastsae.data import Source, open_source
from fastsae.files import sha256
from fastsae.iterable import IterableSource
from fastsae.models import CACHE, LanguageModel, load_model
from fastsae.options import Hints, read_options
from fastsae.order import RowIndex

_HARVEST = {
    name: hint
    for name, hint in get_type_hints(HarvestConfig).items()
    if name not in ("gradients", "shard_rows")
}
OPTIONS: Hints = {
    **{"model": str, "text": tuple[str, ...], "cache": str, "device": str, "buffer_rows": int},
    **_HARVEST,
}
"""The types of the options in a stream's file by name."""


class Stream:
    """A model and text, open. ValueError: as `SiteReader`, and a config with gradients."""

    def __init__(
        self,
        model: LanguageModel,
        text: Sequence[Path],
        config: HarvestConfig,
        *,
        buffer_rows: int = 65536,
        name: str = "live",
    ) -> None:
        if config.gradients:
            raise ValueError("gradients: expected False of a live model, got True")
        self.reader = SiteReader(model, text, config)
        self.widths = self.reader.widths()
        self.buffer_rows, self.name = buffer_rows, name
        options = asdict(config)
        kept = {name: options[name] for name in _HARVEST if name not in ("layer", "site")}
        of_text = [{"file": path.name, "sha256": sha256(path)} for path in text]
        self.facts = {
            "model": Path(model.name).name,
            "weights": model.weights,
            "text": of_text,
            **kept,
        }
        """What tells its rows from others."""

    def split(self, site: str, target: str | None, n_holdout: int) -> tuple[LiveSource, Source]:
        """(training rows without end, held-out rows in memory) of a site, perhaps with a target's.

        ValueError: no such site, or not at least one row for each of both.
        """
        for name in (site, *(() if target is None else (target,))):
            if name not in self.widths:
                raise ValueError(
                    f"{self.name}: expected one of {', '.join(self.widths)}, got {name}"
                )
        reader = self.reader
        n_all, n = len(reader.order), len(reader.positions)
        n_windows = -(-n_holdout // n)
        if not 1 <= n_windows < n_all:
            raise ValueError(
                f"holdout: expected 1 to {(n_all - 1) * n} rows of a live model, got {n_holdout}"
            )
        rows = LiveSource(self, (site,), target, n_windows)
        return rows, self._held_out(site, target, n_holdout, reader.order[-n_windows:])

    def _held_out(self, site: str, target: str | None, n_rows: int, windows: RowIndex) -> Source:
        sites = list(dict.fromkeys([site] if target is None else [site, target]))
        size, n = self.reader.config.batch_size, len(self.reader.positions)
        first_row = (len(self.reader.order) - len(windows)) * n
        found: dict[str, list[Tensor]] = {name: [] for name in sites}
        for first in range(0, len(windows), size):
            part = windows[first : first + size]
            for name, tensors in self.reader.read(part, first_row + first * n, sites).items():
                found[name].append(tensors["x"])
        x = {name: torch.cat(tensors)[:n_rows] for name, tensors in found.items()}
        source = open_source(x[site], None if target is None else x[target])
        labels = _Labels(self.reader.labels(windows), n_rows)
        return replace(source, name=f"{self.name}: held out", contexts=set_contexts(labels))


class LiveSource(IterableSource):
    """Rows of a stream without end: x, side by side where there are several sites, and a target."""

    def __init__(
        self, stream: Stream, sites: tuple[str, ...], target: str | None, n_held: int
    ) -> None:
        self.stream, self.sites, self.n_held = stream, sites, n_held
        self.target_site = target
        chunks = _Chunks(stream.reader, stream.reader.chosen(but_for=n_held), sites, target)
        super().__init__(chunks, buffer_rows=stream.buffer_rows, name=stream.name)

    def identity(self) -> dict[str, Any]:
        facts = {"sites": self.sites, "target": self.target_site, "held_windows": self.n_held}
        stream = {**self.stream.facts, **facts}
        return {**super().identity(), "stream": json.loads(json.dumps(stream))}

    @classmethod
    def of_all(cls, sources: Sequence[LiveSource]) -> LiveSource:
        """The source of all sites of some of a stream: one forward pass gives the rows of all."""
        first = sources[0]
        sites = [
            site
            for source in sources
            for site in (*source.sites, source.target_site)
            if site is not None
        ]
        return cls(first.stream, tuple(dict.fromkeys(sites)), None, first.n_held)

    def part(self, batch: Batch, of: LiveSource) -> Batch:
        """What a batch of this source holds for another one, whose sites are among its own."""
        widths = [self.stream.widths[site] for site in self.sites]
        columns = dict(zip(self.sites, batch.x.split(widths, dim=1), strict=True))
        x = torch.cat([columns[site] for site in of.sites], dim=1)
        return Batch(x, None if of.target_site is None else columns[of.target_site].contiguous())


def open_live(
    data: str, target: str | None, n_holdout: int, streams: dict[Path, Stream] | None = None
) -> tuple[LiveSource, Source]:
    """`Stream.split` of what ``live:FILE:SITE`` names. streams: those open already, by file.

    ValueError: a name or file that is not as it should be, a target of another file, and what
    `Stream` and `load_model` refuse.
    """
    streams = {} if streams is None else streams
    path, site = _named(data)
    to: str | None = None
    if target is not None:
        other, to = _named(target)
        if other != path or to is None:
            raise ValueError(f"target: expected live:{path}:SITE, got {target}")
    if path not in streams:
        streams[path] = open_stream(path)
    sites = streams[path].widths
    if site is None:
        if len(sites) > 1:
            names = ", ".join(f"{data}:{name}" for name in sites)
            raise ValueError(f"data: expected one of {names}, got {data}")
        (site,) = sites
    return streams[path].split(site, to, n_holdout)


def open_stream(path: Path) -> Stream:
    """The stream that a file names, its model loaded. ValueError: as `open_live`."""
    options = read_options(path, OPTIONS)
    for name in ("model", "text", "layer"):
        if name not in options:
            raise ValueError(f"{path}: expected {name}, got none")
    folder = path.absolute().parent
    given: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in options.items()
    }
    config = HarvestConfig(**{name: v for name, v in given.items() if name in _HARVEST})
    config.check()
    model = folder / given["model"]
    cache = folder / Path(given.get("cache", CACHE)).expanduser()
    name = str(model) if model.is_dir() else given["model"]
    return Stream(
        load_model(name, cache, given.get("device", "cpu")),
        [folder / file for file in given["text"]],
        config,
        buffer_rows=given.get("buffer_rows", 65536),
        name=f"live:{path}",
    )


def _named(spec: str) -> tuple[Path, str | None]:
    found = re.fullmatch(r"live:(.+\.(?:toml|json))(?::([^:]+))?", spec)
    if found is None:
        raise ValueError(f"expected live:FILE.toml:SITE, got {spec!r:.80}")
    return Path(found[1]).absolute(), found[2]


@dataclass(frozen=True)
class _Chunks:
    """Rows of windows, those that the model reads at once a chunk: `iterable.NumberedChunks`."""

    reader: SiteReader
    windows: RowIndex
    sites: tuple[str, ...]
    target: str | None

    @property
    def sizes(self) -> list[int]:
        size, n = self.reader.config.batch_size, len(self.windows)
        rows = len(self.reader.positions)
        return [min(size, n - first) * rows for first in range(0, n, size)]

    def __getitem__(self, number: int) -> Tensor | tuple[Tensor, Tensor]:
        size = self.reader.config.batch_size
        part = self.windows[number * size : (number + 1) * size]
        read = [*self.sites, *(() if self.target is None else (self.target,))]
        first_row = number * size * len(self.reader.positions)
        found = self.reader.read(part, first_row, list(dict.fromkeys(read)))
        x = torch.cat([found[site]["x"] for site in self.sites], dim=1)
        return x if self.target is None else (x, found[self.target]["x"])

    def __iter__(self) -> Iterator[Any]:
        return (self[number] for number in range(len(self.sizes)))


@dataclass(frozen=True)
class _Labels:
    """Which token each row of a source in memory is of: `contexts.Labelled`."""

    labels: dict[str, Tensor]
    n_rows: int

    def gather(self, name: str, numbers: RowIndex) -> Tensor:
        return self.labels[name][torch.from_numpy(np.ascontiguousarray(numbers))]
