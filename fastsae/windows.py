"""Text as windows of token ids, what a model reads at once.

A document is a .txt file, or the "text" of a line of a .jsonl file. Its tokens are cut from its
start into windows of equal length, without padding; what remains at its end is left out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastsae.order import WINDOWS, RowIndex, permutation

Ids = npt.NDArray[np.int32]


def documents(path: Path) -> list[str]:
    """The documents of a .txt or .jsonl file."""
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"{path}: expected a .txt or .jsonl file")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8: {error}") from error
    if path.suffix == ".txt":
        return [text]
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)["text"]
            if not isinstance(document, str):
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(f'{path}: line {number}: expected an object with "text"') from None
        found.append(document)
    return found


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before a text, and those behind it."""
    plain, full = (
        tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True)
    )
    before = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), None)
    if not plain or before is None:
        raise ValueError(f"expected special tokens around those of the text, got {full}")
    return full[:before], full[before + len(plain) :]


def cut_windows(tokenizer: Any, text: Sequence[Path], window: int) -> tuple[Ids, tuple[int, int]]:
    """All windows of the text, int32 [n, window], and how many special tokens begin and end one."""
    prefix, suffix = special_tokens(tokenizer)
    n_text = window - len(prefix) - len(suffix)
    if n_text < 1:
        raise ValueError(f"window: expected more than {window - n_text} positions, got {window}")
    pieces = []
    for path in text:
        texts = documents(path)
        for first in range(0, len(texts), 64):
            for ids in tokenizer(texts[first : first + 64], add_special_tokens=False)["input_ids"]:
                n = len(ids) // n_text
                pieces.append(np.array(ids[: n * n_text], dtype=np.int32).reshape(n, n_text))
    inner = np.concatenate(pieces) if pieces else np.empty((0, n_text), np.int32)
    if not len(inner):
        raise ValueError(f"expected a document of at least {n_text} tokens, got none")
    windows = np.empty((len(inner), window), np.int32)
    windows[:, : len(prefix)] = prefix
    windows[:, len(prefix) : window - len(suffix)] = inner
    windows[:, window - len(suffix) :] = suffix
    return windows, (len(prefix), len(suffix))


def window_order(n: int, seed: int) -> RowIndex:
    """The order in which the n windows of a text are read; int64 [n]."""
    return permutation(n, seed, WINDOWS)
