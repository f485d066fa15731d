"""Safetensors files, written and read without a second copy of what they hold."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

if TYPE_CHECKING:
    from fastsae.sharding import Shards

NAMES = {  # of dtypes, in the header
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
}


class Part(NamedTuple):
    """Which rows of some tensors in a file are a process's own."""

    names: tuple[str, ...]
    """Tensors of these names, and of NAME/anything with rows, are divided; others are in all."""
    rows: range
    total: int
    shards: Shards

    def divides(self, name: str, t: Tensor) -> bool:
        if name == "b_enc/last":  # Adam's, which counts the steps of a vector as a whole
            return False
        return t.ndim > 0 and name.split("/")[0] in self.names


def write_tensors(path: Path, tensors: Mapping[str, Tensor], part: Part | None = None) -> None:
    """Writes tensors of any device, one after the other, and syncs the file to the disk.

    The library's own save_file first makes bytes of all tensors, which doubles the memory. The
    format: 8 bytes with the length of a JSON header, the header (padded so that data begin at a
    multiple of 8), then the tensors' bytes, widest dtypes first so that all are aligned.

    part: all processes call this, and each writes its rows into the one file, which is therefore
    the same for any number of them; OSError in all of them where one could not.
    """
    for name, t in tensors.items():
        if t.dtype not in NAMES:
            known = ", ".join(str(dtype) for dtype in NAMES)
            raise TypeError(f"{name}: expected one of {known}, got {t.dtype}")
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, dict[str, Any]] = {}
    end = 0
    for name in order:
        t = tensors[name]
        shape = list(t.shape)
        if part is not None and part.divides(name, t):
            shape[0] = part.total
        start, end = end, end + math.prod(shape) * t.element_size()
        header[name] = {"dtype": NAMES[t.dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    if part is None:
        with path.open("wb") as file:
            file.write(head)
            for name in order:
                _write(file, tensors[name])
            _sync(file)
        return
    error = None
    try:
        if part.shards.first:
            with path.open("wb") as file:
                file.write(head)
                file.truncate(len(head) + end)
    except OSError as failed:
        error = failed
    _agree(path, part, error)
    try:
        with path.open("r+b") as file:
            for name in order:
                t, start = tensors[name], len(head) + header[name]["data_offsets"][0]
                if part.divides(name, t):
                    file.seek(start + part.rows.start * t[:1].numel() * t.element_size())
                    if part.shards.at_data == 0:
                        _write(file, t)
                elif part.shards.first:
                    file.seek(start)
                    _write(file, t)
            _sync(file)
    except OSError as failed:
        error = failed
    _agree(path, part, error)


def _write(file: BinaryIO, t: Tensor) -> None:
    flat = t.detach().cpu().contiguous().reshape(-1)
    file.write(flat.view(torch.uint8).numpy().data)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _agree(path: Path, part: Part, error: OSError | None) -> None:
    """OSError in all processes where one has one."""
    if part.shards.any(error is not None):
        raise error or OSError(errno.EIO, "another rank could not write", str(path))


def own_rows(tensors: dict[str, Tensor], part: Part | None) -> dict[str, Tensor]:
    """Of tensors that were read, a process's own rows. ValueError: not so many rows are there."""
    if part is None:
        return tensors
    own = {}
    for name, t in tensors.items():
        if part.divides(name, t):
            if len(t) != part.total:
                raise ValueError(f"{name}: expected {part.total} rows, got {len(t)}")
            t = t[part.rows.start : part.rows.stop]
        own[name] = t
    return own


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, each mapped from it: nothing is read before it is used.

    ValueError: no such file, or not a readable one. They stay valid when the file is removed or
    replaced, but not when it is cut short.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file, or not a regular file")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, KeyError) as error:
        raise ValueError(f"{path}: {error}") from None
