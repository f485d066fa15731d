"""Files that appear whole or not at all, also where the machine stops, and how files are read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_JSON_BYTES = 1 << 26  # far more than any of ours


def appear(path: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` write a file beside its place and renames it; `write` syncs it itself."""
    partial = path.with_name(path.name + ".tmp")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Brings what was created, renamed or removed in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def alone(folder: Path, doing: str) -> Iterator[None]:
    """Holds a folder, which is made. ValueError: another process holds it, `doing` something."""
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another process is {doing} this folder") from None
        yield
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Writes a text file and syncs it."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, data: Any) -> None:
    """Writes JSON and syncs it."""
    write_text(path, json.dumps(data, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. ValueError: there is none, named with the file."""
    try:
        if not path.is_file():  # asked first: opening a named pipe would wait for its writer
            raise ValueError(f"{path}: no such file, or not a regular file")
        with path.open("rb") as file:
            return json_object(str(path), file.read(_JSON_BYTES))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error


def json_object(name: str, text: bytes) -> dict[str, Any]:
    """The JSON object in a text. ValueError: there is none, `name` said first."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: not readable as JSON: {str(error)[:120]}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name}: expected a JSON object, got {type(value).__name__}")
    return value


def sha256(path: Path) -> str:
    """The digest of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def will_need(mapped: mmap.mmap, first: int, row_bytes: int, rows: list[int]) -> None:
    """Lets the system fetch rows of a mapped file, row 0 at byte `first`, before they are read.

    About a microsecond a row; without it each row that is not in memory is waited for alone.
    """
    if not hasattr(mapped, "madvise"):  # Windows
        return
    page = mmap.PAGESIZE
    for row in rows:
        start = first + row * row_bytes
        aligned = start - start % page
        mapped.madvise(mmap.MADV_WILLNEED, aligned, start + row_bytes - aligned)
