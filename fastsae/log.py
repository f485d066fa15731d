"""Where a training says how it goes: log.jsonl, a bar on the terminal, Weights & Biases."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import select
import sys
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from tqdm import tqdm


class Terminal:
    """A stream for the bar that never holds a training up.

    What a full pipe or a slow terminal does not take at once is dropped; once the stream is broken
    (its terminal closed, its reader ended) everything is.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.broken = stream, False
        try:
            self.descriptor: int | None = stream.fileno()
        except (OSError, ValueError, AttributeError):  # a notebook's
            self.descriptor = None

    def write(self, text: str) -> int:
        try:
            if self.descriptor is None:
                self.stream.write(text)
            elif not self.broken and select.select([], [self.descriptor], [], 0)[1]:
                # What is ready takes PIPE_BUF bytes without waiting.
                os.write(self.descriptor, text.encode(errors="replace")[: select.PIPE_BUF])
        except (OSError, ValueError):
            self.broken = True
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        try:
            return self.stream.isatty()
        except (OSError, ValueError, AttributeError):
            return False


class RunLog:
    """The lines of a training: one JSON object each, numbers that are not finite as null.

    out: folder of log.jsonl (None: no file); of a log that is there its first keep_bytes stay.
    wandb: project of a Weights & Biases run, resumed under the folder's name.
    """

    def __init__(
        self,
        out: Path | None,
        *,
        keep_bytes: int = 0,
        steps: int,
        first_step: int = 0,
        progress: bool = True,
        wandb: str | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        self.file = None
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            path = out / "log.jsonl"
            path.touch()
            # Unbuffered: a line that could not be written is not tried again when it is closed.
            self.file = path.open("r+b", buffering=0)
            self.file.truncate(min(keep_bytes, path.stat().st_size))
            self.file.seek(0, os.SEEK_END)
        self.bar = tqdm(
            total=steps,
            initial=first_step,
            disable=None if progress else True,
            unit="step",
            file=Terminal(sys.stderr),
        )
        self.wandb = None if wandb is None else start_wandb(wandb, out, config)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.bar.close()
        if self.file is not None:
            self.file.close()
        if self.wandb is not None:
            self.wandb.finish(exit_code=0 if kind is None else 1)

    @property
    def n_bytes(self) -> int:
        """Length of log.jsonl so far."""
        return 0 if self.file is None else self.file.tell()

    def write(self, line: dict[str, Any]) -> None:
        """Adds a line. OSError names the file."""
        line = _finite(line)
        if self.file is not None:
            data = json.dumps(line).encode() + b"\n"
            try:
                written = self.file.write(data)
            except OSError as error:
                raise OSError(error.errno, f"{error.strerror}: {self.file.name}") from None
            if written != len(data):
                raise OSError(f"{self.file.name}: {written} of {len(data)} bytes written")
        if self.wandb is not None and "step" in line:
            try:
                self.wandb.log(_flat(line), step=line["step"])
            except Exception as error:  # whatever a service raises: log.jsonl has it all
                self.wandb = None
                warnings.warn(f"Weights & Biases gets no more lines: {error}", stacklevel=2)


def find_wandb() -> None:
    """ValueError: wandb is not installed."""
    if importlib.util.find_spec("wandb") is None:
        raise ValueError("wandb: expected the package, got none: pip install wandb")


def start_wandb(project: str, out: Path | None, config: dict[str, Any] | None) -> Any:
    """A Weights & Biases run, the same one for the same folder."""
    find_wandb()
    import wandb

    options: dict[str, Any] = {}
    if out is not None:
        digest = hashlib.sha256(str(out.resolve()).encode()).hexdigest()
        options = {"name": out.name, "id": digest[:16], "resume": "allow"}
    return wandb.init(project=project, config=config, **options)


def _finite(value: Any) -> Any:
    """JSON has no word for NaN and infinities."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flat(line: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested figures as "eval/fvu"."""
    flat: dict[str, Any] = {}
    for name, value in line.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}/")
        else:
            flat[prefix + name] = value
    return flat
