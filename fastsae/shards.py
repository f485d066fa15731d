"""Activation sets: what ``fastsae harvest`` writes and ``fastsae.data.open_source`` reads.

    DIR/index.json               how the set was made, and the rows of each shard
    DIR/shard-00000.safetensors  x, perhaps gradient [n, D]; token, window, position int32 [n]
    DIR/shard-00001.safetensors  …

Row r of the set is row r − (rows of the shards before) of its shard. ``x`` and ``gradient`` are
float16, bfloat16 or float32. ``token`` is the id that the model read at ``position`` of ``window``;
windows are numbered in the order of the text, positions from 0.

A shard is written beside its place, brought to the disk and renamed: a file of that name is whole.
Rows are read by number, only those asked for, so a set may be larger than RAM; at most
``_OPEN_SHARDS`` files are kept open, so it may have more shards than a process may open files.
Headers are parsed here, from a bounded part of the file, and every extent is checked at once.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastsae.files import RowFile, appear, json_object, read_json, write_json
from fastsae.tensors import NAMES, write_tensors

FORMAT, VERSION = "fastsae-activations", 1
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
LABELS = ("token", "window", "position")

_HEADER_BYTES = 1 << 16  # far more than it needs
_OPEN_SHARDS = 128


class _Shard(NamedTuple):
    file: RowFile
    first: dict[str, int]  # the byte where each tensor begins


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05}.safetensors"


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    appear(path, lambda partial: write_tensors(partial, tensors))


def write_index(folder: Path, index: Mapping[str, Any]) -> None:
    appear(folder / "index.json", lambda partial: write_json(partial, index))


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a set, with what its reader relies on checked. ValueError: anything wrong."""
    path = folder / "index.json"
    index = read_json(path)
    if index.get("format") != FORMAT or index.get("version") != VERSION:
        found = f"{index.get('format')!r} {index.get('version')!r}"[:80]
        raise ValueError(f"{path}: expected {FORMAT!r} version {VERSION}, got {found}")
    if not _is_count(index.get("d")):
        raise ValueError(f"{path}: expected a width d >= 1, got {index.get('d')!r:.80}")
    if not isinstance(index.get("dtype"), str) or index["dtype"] not in DTYPES:
        expected = ", ".join(DTYPES)
        raise ValueError(f"{path}: expected a dtype of {expected}, got {index.get('dtype')!r:.80}")
    if not isinstance(index.get("gradients"), bool):
        got = repr(index.get("gradients"))
        raise ValueError(f"{path}: expected gradients true or false, got {got:.80}")
    shards = index.get("shards")
    if not isinstance(shards, list) or not shards or not all(map(_is_count, shards)):
        raise ValueError(f"{path}: expected shards as the row counts >= 1 of at least one shard")
    return index


class ActivationSet:
    """A complete set, open for reading. ValueError: a file is missing or not what it should be."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.index = read_index(self.folder)
        self.d: int = self.index["d"]
        self.starts = np.cumsum([0, *self.index["shards"]])  # the first row of each shard, the end
        dtype = DTYPES[self.index["dtype"]]
        matrices = ("x", "gradient") if self.index["gradients"] else ("x",)
        self.tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            **{name: (dtype, (self.d,)) for name in matrices},
            **{name: (torch.int32, ()) for name in LABELS},
        }
        self._shard = functools.lru_cache(_OPEN_SHARDS)(self._open)
        for number in range(len(self.starts) - 1):
            self._shard(number)

    @property
    def n_rows(self) -> int:
        return int(self.starts[-1])

    def gather(self, name: str, numbers: npt.NDArray[np.int64]) -> Tensor:
        """Rows ``numbers`` [m] (in [0, n_rows)) of a tensor → [m, D] or [m], in its own dtype."""
        dtype, tail = self.tensors[name]
        rows = torch.empty(len(numbers), *tail, dtype=dtype)
        stored = rows.view(len(numbers), math.prod(tail)).view(torch.uint8).numpy()
        order = np.argsort(numbers, kind="stable")
        bounds = np.searchsorted(numbers[order], self.starts)
        for number in np.flatnonzero(np.diff(bounds)).tolist():
            shard = self._shard(number)
            here = order[bounds[number] : bounds[number + 1]]
            shard.file.rows(shard.first[name], numbers[here] - self.starts[number], here, stored)
        return rows

    def will_need(self, name: str, numbers: npt.NDArray[np.int64]) -> None:
        """Lets the system fetch rows ``numbers`` of a tensor before ``gather`` reads them."""
        dtype, tail = self.tensors[name]
        row_bytes = math.prod(tail) * dtype.itemsize
        shards = np.searchsorted(self.starts, numbers, side="right") - 1
        for number in np.unique(shards).tolist():
            shard = self._shard(number)
            here = numbers[shards == number] - self.starts[number]
            shard.file.will_need(shard.first[name], row_bytes, here)

    def _open(self, number: int) -> _Shard:
        path = shard_path(self.folder, number)
        if not os.path.isfile(path):
            raise ValueError(
                f"{path}: no such file, or not a regular file; a harvest that was interrupted goes "
                "on where it stopped when it is started again"
            )
        file = RowFile(path)
        header, start = _header(str(path), file.head(8 + _HEADER_BYTES))
        first = {}
        for name, (dtype, tail) in self.tensors.items():
            shape = (self.index["shards"][number], *tail)
            size = math.prod(shape) * dtype.itemsize
            begin, end = _extent(
                f"{path}: tensor {name}", header.get(name), NAMES[dtype], shape, size
            )
            if file.size() < start + end:
                raise ValueError(
                    f"{path}: truncated: tensor {name} ends at byte {start + end}, "
                    f"the file has {file.size()}"
                )
            first[name] = start + begin
            file.end = max(file.end, start + end)
        return _Shard(file, first)


def _header(name: str, head: bytes) -> tuple[dict[str, Any], int]:
    """The JSON header of a safetensors file and the offset of its data."""
    length = int.from_bytes(head[:8], "little")
    if len(head) < 8 or length > _HEADER_BYTES:
        raise ValueError(f"{name}: not a readable safetensors file: the header's length is wrong")
    if len(head) < 8 + length:
        raise ValueError(f"{name}: truncated: the header needs {length} bytes")
    return json_object(name, head[8 : 8 + length]), 8 + length


def _extent(
    name: str, entry: Any, dtype: str, shape: tuple[int, ...], size: int
) -> tuple[int, int]:
    """Where a tensor begins and ends in the data, its entry in the header checked."""
    if not isinstance(entry, dict):
        raise ValueError(f"{name}: expected {dtype} {list(shape)}, got none")
    if entry.get("dtype") != dtype or entry.get("shape") != list(shape):
        found = f"{entry.get('dtype')} {entry.get('shape')}"
        raise ValueError(f"{name}: expected {dtype} {list(shape)}, got {found:.80}")
    offsets = entry.get("data_offsets")
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or any(type(i) is not int for i in offsets)
    ):
        raise ValueError(f"{name}: expected two data offsets, got {offsets!r:.80}")
    begin, end = offsets
    if begin < 0 or end - begin != size:
        raise ValueError(f"{name}: expected offsets {size} bytes apart, got {offsets!r:.80}")
    return begin, end


def _is_count(value: Any) -> bool:
    return type(value) is int and 1 <= value < 1 << 48
