"""Files that appear whole or not at all, also where the machine stops, and how files are read."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_JSON_BYTES = 1 << 26  # far more than any of ours
_ROWS_AT_ONCE = 1024  # buffers that one preadv takes, on Linux and on macOS


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


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write in, which becomes `path` once all went well; else nothing appears.

    ValueError: there is something at `path` that is not an empty folder.
    """
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise ValueError(f"{path}: expected a new folder, got a file")
    if path.is_dir() and any(path.iterdir()):
        raise ValueError(f"{path}: expected a new or empty folder, got one with files in it")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    partial.mkdir()
    try:
        yield partial
        sync_folder(partial)
        os.rename(partial, path)  # over an empty folder at most
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    sync_folder(path.parent)


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


class RowFile:
    """A file open for reading rows of equal length by their numbers, in any thread.

    Not a memory map: to touch a page of one beyond the end of a file that was cut short kills the
    process, and while pages are waited for no other thread of Python runs. A file that was removed
    or replaced stays readable. ValueError, also of the methods: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.end = 0
        """The bytes that it must have: what is read from it is checked against them."""
        try:
            if not path.is_file():  # asked first: opening a named pipe would wait for its writer
                raise ValueError(f"{path}: no such file, or not a regular file")
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
        weakref.finalize(self, os.close, self._descriptor)
        if hasattr(os, "posix_fadvise"):  # else a row that is missed brings megabytes around it
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def size(self) -> int:
        return os.fstat(self._descriptor).st_size

    def head(self, n_bytes: int) -> bytes:
        """The first n_bytes, or all there are."""
        head = bytearray(n_bytes)
        try:
            return bytes(head[: self._read([memoryview(head)], 0)])
        except OSError as error:
            raise ValueError(f"{self.path}: cannot be read: {error.strerror}") from error

    def will_need(self, first: int, row_bytes: int, numbers: npt.NDArray[np.int64]) -> None:
        """Lets the system fetch rows, row 0 at byte `first`, before they are read.

        Some microseconds a row that is not in memory; without it each is waited for alone.
        """
        if not hasattr(os, "posix_fadvise"):
            return
        for start in (first + numbers * row_bytes).tolist():
            os.posix_fadvise(self._descriptor, start, row_bytes, os.POSIX_FADV_WILLNEED)

    def rows(
        self,
        first: int,
        numbers: npt.NDArray[np.int64],
        places: npt.NDArray[np.int64],
        out: npt.NDArray[np.uint8],
    ) -> None:
        """Reads row numbers[i] into out[places[i]]; out [m, bytes of a row], numbers ascending.

        Rows that follow each other in the file are read in one go.
        """
        if self.size() < self.end:
            raise self._cut_short()
        row_bytes, memory = out.shape[1], out.reshape(-1).data
        offsets, begins = (first + numbers * row_bytes).tolist(), (places * row_bytes).tolist()
        apart = (np.diff(numbers) != 1) | (np.arange(1, len(numbers)) % _ROWS_AT_ONCE == 0)
        bounds = [0, *(np.flatnonzero(apart) + 1).tolist(), len(numbers)]
        descriptor, preadv = self._descriptor, os.preadv
        try:
            for i, stop in itertools.pairwise(bounds):
                views = [memory[b : b + row_bytes] for b in begins[i:stop]]
                wanted = len(views) * row_bytes
                if views and preadv(descriptor, views, offsets[i]) < wanted:
                    if self._read(views, offsets[i]) < wanted:
                        raise self._cut_short()
        except OSError as error:
            raise ValueError(f"{self.path}: cannot be read: {error.strerror}") from error

    def _cut_short(self) -> ValueError:
        left = f"{self.size()} of {self.end} bytes left"
        return ValueError(f"{self.path}: cut short while in use: {left}")

    def _read(self, views: list[memoryview], start: int) -> int:
        """Fills the views with what follows byte `start`; returns how many bytes there were."""
        done = 0
        while views and (got := os.preadv(self._descriptor, views, start + done)):
            done += got
            while views and got >= len(views[0]):
                got -= len(views.pop(0))
            if got:
                views[0] = views[0][got:]
        return done
