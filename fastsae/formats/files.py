"""Files of strangers: nothing in them runs, and what is wrong with them is one ValueError."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_KINDS: dict[type, tuple[Any, str]] = {
    int: (int, "an integer"),
    float: ((int, float), "a finite number"),
    bool: (bool, "true or false"),
    str: (str, "a string"),
    dict: (dict, "an object"),
    list: (list, "a list"),
}
_MISSING = object()
_MOST_COMPRESSED = 64  # weights hardly compress; a file that expands more is a bomb


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Makes every error about the contents a ValueError of one line that names the path."""
    try:
        yield
    except (ValueError, TypeError, ArithmeticError, RuntimeError, MemoryError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        where = "" if lines[0].startswith(str(path)) else f"{path}: "
        raise ValueError(f"{where}{lines[0][:300]}") from None


def find(path: Path, *names: str) -> Path | None:
    """The first of these files in a folder, or the file itself where it has such a name."""
    if path.is_file():
        return path if any(name.rpartition("/")[2] == path.name for name in names) else None
    return next((path / name for name in names if (path / name).is_file()), None)


def folder_of(path: Path) -> Path:
    """The folder that a file is in; a folder itself."""
    return path.parent if path.is_file() else path


def has(path: Path, *names: str) -> bool:
    """Whether a folder has all these files, or a file is one of them beside the others."""
    if path.is_file() and path.name not in names:
        return False
    return all((folder_of(path) / name).is_file() for name in names)


def need(path: Path, *names: str) -> Path:
    """As `find`; ValueError where there is none."""
    found = find(path, *names)
    if found is None:
        raise ValueError(f"{path}: expected a file {' or '.join(names)}, got none")
    return found


def field(data: dict[str, Any], name: str, kind: type, default: Any = _MISSING) -> Any:
    """A value of JSON of this kind; null and a missing one are the default where there is one."""
    value = data.get(name)
    if value is None:
        if default is _MISSING:
            raise ValueError(f"{name}: expected {_KINDS[kind][1]}, got none")
        return default
    types, what = _KINDS[kind]
    if not isinstance(value, types) or (kind is not bool and isinstance(value, bool)):
        raise ValueError(f"{name}: expected {what}, got {str(value)[:60]!r}")
    if kind is float and not abs(value) < 1e30:
        raise ValueError(f"{name}: expected {what}, got {str(value)[:60]}")
    return value


def positive(data: dict[str, Any], name: str) -> float:
    """A number of JSON above 0."""
    value = float(field(data, name, float))
    if not value > 1e-30:
        raise ValueError(f"{name}: expected a number above 0, got {value}")
    return value


def need_tensor(tensors: dict[str, Any], name: str) -> Tensor:
    """A tensor of a state dict; ValueError where there is none of that name."""
    t = tensors.get(name)
    if not isinstance(t, Tensor):
        found = "none" if t is None else type(t).__name__
        known = ", ".join(str(key)[:60] for key in list(tensors)[:12])
        raise ValueError(f"{name}: expected a tensor, got {found}; there are {known}")
    return t


def need_matrix(tensors: dict[str, Any], name: str) -> Tensor:
    """A matrix of a state dict."""
    t = need_tensor(tensors, name)
    if t.ndim != 2:
        raise ValueError(f"{name}: expected a matrix, got shape {tuple(t.shape)}")
    return t


def scalar(t: Tensor, name: str) -> int | float:
    """The finite number that a tensor of one element holds."""
    if t.numel() != 1:
        raise ValueError(f"{name}: expected one number, got shape {tuple(t.shape)}")
    value = t.item()
    if not abs(value) < 1e30:
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return value


def read_pickled(path: Path) -> dict[str, Any]:
    """The state dict that torch.save wrote, mapped from the file; nothing else is unpickled.

    torch.load(weights_only=True) builds tensors and plain data alone. Each tensor must be stored
    whole: one that claims more elements than it has bytes for would be made only when it is used.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file, or not a regular file")
    try:
        mapped = zipfile.is_zipfile(path)
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:
        message = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: not readable as plain tensors: {message[:200]}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a dict of tensors, got {type(data).__name__}")
    for name, value in [*data.items(), *_inner(data)]:
        if isinstance(value, Tensor):
            with naming(path):
                _check_stored(str(name)[:80], value)
    return data


def _inner(data: dict[str, Any]) -> list[tuple[Any, Any]]:
    return [item for value in data.values() if isinstance(value, dict) for item in value.items()]


def _check_stored(name: str, t: Tensor) -> None:
    if t.layout != torch.strided or t.device.type != "cpu" or t.is_quantized:
        raise ValueError(f"{name}: expected a dense tensor, got {t.layout} on {t.device}")
    held = t.untyped_storage().nbytes()
    if t.numel() * t.element_size() > held:
        raise ValueError(f"{name}: expected the bytes of shape {tuple(t.shape)}, got {held}")


def read_npz(path: Path, names: tuple[str, ...]) -> dict[str, Tensor]:
    """The arrays of these names that an .npz file has, without pickles.

    ValueError: one whose header does not fit its size, or that expands beyond what weights do.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {info.filename: info for info in archive.infolist()}
            found = {}
            for name in names:
                info = entries.get(f"{name}.npy")
                if info is not None:
                    stored = min(info.compress_size, path.stat().st_size)
                    if info.file_size > _MOST_COMPRESSED * stored + 2**20:
                        raise ValueError(f"{name}: expands to {info.file_size} bytes")
                    _check_header(archive, info, name)
                    with archive.open(info) as file:
                        array = np.lib.format.read_array(file, allow_pickle=False)
                    found[name] = torch.from_numpy(array)
            return found
    except Exception as error:  # zipfile and NumPy raise whatever garbage makes them meet
        message = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: not readable as .npz: {message[:200]}") from None


def _check_header(archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> None:
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        readers = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        if version not in readers:
            raise ValueError(f"{name}: expected version 1.0 or 2.0 of .npy, got {version}")
        shape, _, dtype = readers[version](file)
        needed = file.tell() + dtype.itemsize * int(np.prod([int(n) for n in shape], dtype=object))
    if dtype.kind != "f" or needed != info.file_size:
        raise ValueError(
            f"{name}: expected {info.file_size} bytes of floats, got {dtype} of shape {shape}"
        )
