"""A corpus as sparse codes on the disk, and what each latent responds to in it.

    DIR/index.json               how it was made: SAE, data, rows of each shard
    DIR/shard-00000.safetensors  vals float32, idx int32 (nnz), row_ptr int64 (n + 1): `Codes`
    DIR/shard-00001.safetensors  …
    DIR/latents.safetensors      the index latent → rows; appears last, so the set is whole

One pass over the rows: a shard is encoded, written, and counted in the index. A shard appears
whole; a folder that was not finished goes on with the shards it lacks, and those that are there are
only read. Memory: the codes of a shard, and `LatentIndex.bytes_a_latent` for each latent.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from fastsae.codes import Codes
from fastsae.data import Source
from fastsae.files import alone, read_json
from fastsae.latent_index import QUANTILES, Ids, LatentIndex
from fastsae.sae import SAE
from fastsae.shards import shard_path, write_index, write_shard
from fastsae.tensors import read_tensors

FORMAT, VERSION = "fastsae-codes", 1
MAX_BATCH_ROWS, MAX_BATCH_PAIRS = 4096, 1 << 23


def batches_of_codes(sae: SAE, sources: Sequence[Source], pairs: int) -> Iterator[Codes]:
    """All rows in order, as the module is (training or not).

    A batch is as large as `pairs` allows for codes like those of the one before.
    """

    def size(pairs_a_row: int) -> int:
        return max(1, min(MAX_BATCH_ROWS, pairs // max(1, pairs_a_row)))

    n = size(sae.config.d_sae)
    for source in sources:
        first = 0
        while first < source.n_rows:
            x = source.rows(np.arange(first, min(first + n, source.n_rows)))
            codes = sae.encode(x.to(sae.W_dec.device))
            yield codes
            first += len(x)
            n = size(codes.idx.numel() // len(x))


class CodeSet:
    """A complete set, open for reading. ValueError: a file is missing or not what it should be."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.index = read_json(self.folder / "index.json")
        if self.index.get("format") != FORMAT or self.index.get("version") != VERSION:
            found = f"{self.index.get('format')!r} {self.index.get('version')!r}"[:80]
            path = self.folder / "index.json"
            raise ValueError(f"{path}: expected {FORMAT!r} version {VERSION}, got {found}")
        counts = self.index.get("shards"), [self.index.get("d_sae"), self.index.get("contexts")]
        for values in counts:
            if not isinstance(values, list) or not all(type(n) is int and n >= 1 for n in values):
                path = self.folder / "index.json"
                raise ValueError(f"{path}: expected shards, d_sae and contexts as counts >= 1")
        self.n_latents: int = self.index["d_sae"]
        self.starts = np.cumsum([0, *self.index["shards"]])
        latents = read_tensors(self.folder / "latents.safetensors")
        shapes = {"counts": (), "rows": (self.index["contexts"],), "quantiles": (len(QUANTILES),)}
        shapes["values"] = shapes["rows"]
        for name, tail in shapes.items():
            got = tuple(latents[name].shape) if name in latents else "none"
            if got != (self.n_latents, *tail):
                path, expected = self.folder / "latents.safetensors", (self.n_latents, *tail)
                raise ValueError(f"{path}: {name}: expected shape {expected}, got {got}")
        self.counts: Tensor = latents["counts"]
        """(F) int64: on how many rows each latent is active."""
        self.rows: Tensor = latents["rows"]
        """(F, m) int64: the rows with the largest |value|, descending; -1 pads."""
        self.values: Tensor = latents["values"]
        """(F, m) float32: the values there; 0 pads."""
        self.quantiles: Tensor = latents["quantiles"]
        """(F, len(QUANTILES)) float32: of |value| where active; see `LatentIndex`."""

    @property
    def n_rows(self) -> int:
        return int(self.starts[-1])

    def shards(self) -> Iterator[tuple[int, Codes]]:
        """(number of the first row, codes) of each shard."""
        for number, first in enumerate(self.starts[:-1].tolist()):
            yield first, read_shard(self.folder, number, self.index)

    def means(self) -> Tensor:
        """(F) float64: the mean |value| where a latent is active, 0 if never. Reads all shards."""
        sums = torch.zeros(self.n_latents, dtype=torch.float64)
        for _, codes in self.shards():
            sizes = codes.vals.abs().double()
            sums += codes.idx.bincount(weights=sizes, minlength=self.n_latents)
        return sums / self.counts.clamp(min=1)

    def at(self, rows: Ids, latents: Ids) -> npt.NDArray[np.float32]:
        """The activations of pairs [m], 0 where there is none; rows beyond the set have none."""
        found = np.zeros(len(rows), np.float32)
        order = np.argsort(rows, kind="stable")
        bounds = np.searchsorted(rows[order], self.starts)
        for number in np.flatnonzero(np.diff(bounds)).tolist():
            codes, here = read_shard(self.folder, number, self.index), order[bounds[number] :]
            here = here[: bounds[number + 1] - bounds[number]]
            local = torch.from_numpy(rows[here] - self.starts[number])
            assert codes.row_ptr is not None
            begins, n = codes.row_ptr[local].numpy(), codes.row_ptr.diff()[local].numpy()
            entries = np.arange(n.sum()) + (begins - n.cumsum() + n).repeat(n)
            pairs = here.repeat(n)
            hit = codes.idx.numpy()[entries] == latents[pairs]
            found[pairs[hit]] = codes.vals.numpy()[entries[hit]]
        return found

    def check(self, sae: SAE, source: Source) -> None:
        """ValueError: it holds codes of another SAE, or of other rows."""
        for name, expected in json.loads(json.dumps(_origin(sae, source))).items():
            if self.index.get(name) != expected:
                raise ValueError(f"{self.folder}: expected codes of the same {name}, got another's")


def read_shard(folder: Path, number: int, index: dict[str, Any]) -> Codes:
    """The codes of a shard. ValueError: it is not what the index says."""
    path = shard_path(folder, number)
    tensors = read_tensors(path)
    try:
        codes = Codes(tensors["vals"], tensors["idx"], index["d_sae"], tensors["row_ptr"])
        if codes.n_tokens != index["shards"][number]:
            raise ValueError(f"expected {index['shards'][number]} rows, got {codes.n_tokens}")
        return codes.validate()
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


@torch.no_grad()
def encode_corpus(
    sae: SAE,
    source: Source,
    out: str | os.PathLike[str],
    *,
    contexts: int = 20,
    shard_rows: int = 16384,
    progress: bool = False,
) -> CodeSet:
    """Writes the codes of a source's rows, as at inference, or what is missing of them.

    contexts: rows kept of each latent. ValueError: numbers below 1, rows of another width, a folder
    with another set, or one that another process writes.
    """
    out = Path(out)
    if contexts < 1 or shard_rows < 1:
        raise ValueError(
            f"expected contexts and shard_rows of at least 1, got {contexts} and {shard_rows}"
        )
    if source.d_in != sae.config.d_in:
        raise ValueError(f"{source.name}: expected width {sae.config.d_in}, got {source.d_in}")
    if source.n_rows < 1:
        raise ValueError(f"{source.name}: expected at least one row, got none")
    firsts = range(0, source.n_rows, shard_rows)
    index: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        **_origin(sae, source),
        "d_sae": sae.config.d_sae,
        "contexts": contexts,
        "quantiles": QUANTILES,
        "shards": [min(shard_rows, source.n_rows - first) for first in firsts],
    }
    with alone(out, "encoding into"):
        _check_same(out, index)
        write_index(out, index)
        found = LatentIndex(sae.config.d_sae, contexts)
        with tqdm(total=source.n_rows, unit=" rows", unit_scale=True, disable=not progress) as bar:
            for number, first in enumerate(firsts):
                if not shard_path(out, number).exists():
                    rows = np.arange(first, first + index["shards"][number])
                    codes = codes_of(sae, source.select(rows))
                    assert codes.row_ptr is not None
                    pairs = {"vals": codes.vals, "idx": codes.idx, "row_ptr": codes.row_ptr}
                    write_shard(shard_path(out, number), pairs)
                found.update(read_shard(out, number, index), first)
                bar.update(index["shards"][number])
        write_shard(out / "latents.safetensors", found.tensors())
    return CodeSet(out)


@torch.no_grad()
def codes_of(sae: SAE, source: Source) -> Codes:
    """The pairs of all rows with a value that is not 0, as at inference; float32, on the CPU."""
    vals, idx, lengths = [], [], []
    was_training = sae.training
    sae.eval()
    try:
        for codes in batches_of_codes(sae, [source], MAX_BATCH_PAIRS):
            active = ((codes.idx >= 0) & (codes.vals != 0)).reshape(-1)
            vals.append(codes.vals.reshape(-1)[active].float().cpu())
            idx.append(codes.idx.reshape(-1)[active].cpu())
            lengths.append(codes.l0().cpu())
    finally:
        sae.train(was_training)
    row_ptr = torch.cat([torch.zeros(1, dtype=torch.int64), *lengths]).cumsum(0)
    return Codes(torch.cat(vals), torch.cat(idx), sae.config.d_sae, row_ptr)


def _origin(sae: SAE, source: Source) -> dict[str, Any]:
    """What a set says of where its codes come from."""
    weights = {"config": sae.config.to_dict(), "weights": digest(sae)}
    return {"sae": weights, "data": source.identity()}


def digest(sae: SAE) -> str:
    """What tells an SAE's weights from others."""
    found = hashlib.sha256()
    for name, t in sorted(sae.state_dict().items()):
        found.update(name.encode())
        found.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def _check_same(out: Path, index: dict[str, Any]) -> None:
    path = out / "index.json"
    if not path.exists():
        return
    there = read_json(path)
    for name, expected in json.loads(json.dumps(index)).items():
        if there.get(name) != expected:
            raise ValueError(
                f"{path}: a set goes on with what it began with: expected the same {name}, got "
                "another; choose another folder"
            )
