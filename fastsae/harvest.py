"""Activations of a Hugging Face model over text, row by row, to a folder of shards.

    text ──▶ windows ──▶ model up to the deepest site ──▶ shards of each site (fastsae.shards)

What rows there are, and in which order, says `fastsae.activations`. One site is written to OUT
itself; several to OUT/residual-3, OUT/mlp-5 and so on, each a set of its own, with the same rows in
the same order and the same labels.

A shard depends on the model, the text and the options alone, not on the other shards or sites; a
harvest that was stopped goes on at the first shard that a site lacks and ends with the files that
it would have ended with. Beside the model and the ids of all windows, a shard of each site is in
memory.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastsae.activations import HarvestConfig, SiteReader
from fastsae.files import alone, sha256
from fastsae.models import LanguageModel
from fastsae.order import RowIndex
from fastsae.shards import (
    DTYPES,
    FORMAT,
    LABELS,
    VERSION,
    ActivationSet,
    read_index,
    shard_path,
    write_index,
    write_shard,
)

__all__ = ["HarvestConfig", "harvest", "harvest_sites"]


def harvest(
    model: LanguageModel, text: Sequence[Path], out: Path, config: HarvestConfig
) -> ActivationSet:
    """`harvest_sites` of one layer and site, whose set lies in ``out`` itself."""
    (found,) = harvest_sites(model, text, out, config).values()
    return found


def harvest_sites(
    model: LanguageModel, text: Sequence[Path], out: Path, config: HarvestConfig
) -> dict[str, ActivationSet]:
    """Writes a set for each site, or what is missing of them, and opens them, by name.

    ValueError: options, text or a model that they cannot be made with, too little room on the disk,
    a folder with another set, and an activation that is not finite in the dtype of storage.
    """
    reader = SiteReader(model, text, config)
    order = reader.chosen()
    n, batch = len(reader.positions), config.batch_size
    per_shard = max(1, config.shard_rows // (n * batch)) * batch
    parts = [order[first : first + per_shard] for first in range(0, len(order), per_shard)]
    folders = {site: out / site for site in config.sites}
    if len(folders) == 1:
        folders = dict.fromkeys(folders, out)
    elif (out / "index.json").exists():
        raise ValueError(f"{out}: expected a folder for sets of several sites, got a set's own")
    with contextlib.ExitStack() as stack:
        for folder in dict.fromkeys((out, *folders.values())):
            stack.enter_context(alone(folder, "harvesting into"))
        of_all = {
            "format": FORMAT,
            "version": VERSION,
            "model": model.name,
            "weights": model.weights,
            "text": [{"file": path.name, "sha256": sha256(path)} for path in text],
        }
        options = {name: value for name, value in asdict(config).items() if name != "rows"}
        rows = {
            "rows": len(order) * n,
            "dropped_positions": sorted(set(range(config.window)) - set(reader.positions.tolist())),
            "shards": [len(part) * n for part in parts],
        }
        indexes: dict[str, dict[str, Any]] = {}
        for site, d in reader.widths().items():
            kind, layer = config.sites[site]
            own = {**options, "layer": layer, "site": kind}
            indexes[site] = {**of_all, "d": d, **own, **rows}
            if (folders[site] / "index.json").exists():
                _check_same(folders[site], read_index(folders[site]), indexes[site])
        missing = {
            site: [i for i in range(len(parts)) if not shard_path(folder, i).exists()]
            for site, folder in folders.items()
        }
        _check_room(out, indexes, missing)
        for site, folder in folders.items():
            write_index(folder, indexes[site])
        _write(reader, folders, parts, missing)
    return {site: ActivationSet(folder) for site, folder in folders.items()}


def _write(
    reader: SiteReader,
    folders: Mapping[str, Path],
    parts: Sequence[RowIndex],
    missing: Mapping[str, Sequence[int]],
) -> None:
    rows = [len(part) * len(reader.positions) for part in parts]
    todo = sorted({i for numbers in missing.values() for i in numbers})
    done = sum(rows) - sum(rows[i] for i in todo)
    with tqdm(total=sum(rows), initial=done, unit=" rows", unit_scale=True) as progress:
        for i in todo:
            sites = [site for site in folders if i in missing[site]]
            shard = _shard(reader, parts[i], sum(rows[:i]), sites, progress)
            for site, tensors in shard.items():
                write_shard(shard_path(folders[site], i), tensors)


def _shard(
    reader: SiteReader, part: RowIndex, first_row: int, sites: Sequence[str], progress: Any
) -> dict[str, dict[str, Tensor]]:
    """For each of the sites, the tensors of windows `part`, their rows numbered from first_row."""
    names = ("x", "gradient") if reader.config.gradients else ("x",)
    batches: dict[str, dict[str, list[Tensor]]] = {
        site: {name: [] for name in names} for site in sites
    }
    size = reader.config.batch_size
    for first in range(0, len(part), size):
        row = first_row + first * len(reader.positions)
        windows = part[first : first + size]
        for site, tensors in reader.read(windows, row, sites).items():
            for name, tensor in tensors.items():
                batches[site][name].append(tensor)
        progress.update(len(windows) * len(reader.positions))
    labels = reader.labels(part)
    return {
        site: labels | {name: torch.cat(of_site.pop(name)) for name in names}
        for site, of_site in batches.items()
    }


def _check_same(out: Path, there: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name in wanted | there:
        if there.get(name) != wanted.get(name):
            raise ValueError(
                f"{out}: expected an empty folder or a harvest with the same options to go on "
                f"with, got one with {name} {there.get(name)!r:.60} instead of "
                f"{wanted.get(name)!r:.60}"
            )


def _check_room(
    out: Path, indexes: Mapping[str, dict[str, Any]], missing: Mapping[str, Sequence[int]]
) -> None:
    """Prints what will be written, and refuses what the disk has no room for."""
    needed = n_missing = n_shards = 0
    for site, index in indexes.items():
        matrices = 2 if index["gradients"] else 1
        row_bytes = matrices * index["d"] * DTYPES[index["dtype"]].itemsize + 4 * len(LABELS)
        needed += sum(index["shards"][i] for i in missing[site]) * row_bytes
        n_missing, n_shards = n_missing + len(missing[site]), n_shards + len(index["shards"])
        what = "activations and gradients" if index["gradients"] else "activations"
        print(
            f"{index['model']}, {index['site']} of layer {index['layer']}: {index['rows']:,} rows "
            f"× {index['d']} {index['dtype']}, {what}"
        )
    free = shutil.disk_usage(out).free
    print(
        f"{out}: {n_missing} of {n_shards} shards to write, {needed / 1e6:,.1f} MB; "
        f"{free / 1e6:,.1f} MB free",
        flush=True,
    )
    if needed > free:
        raise ValueError(f"{out}: expected {needed} bytes of free space on the disk, got {free}")
