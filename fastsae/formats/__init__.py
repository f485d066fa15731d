"""SAEs in the files of other libraries: `read`, `write`, and `guess` of what a path holds.

    sae = fastsae.load("gemma-scope/params.npz")              # any format of FORMATS
    write(sae, "out", "sae_lens")                             # SAE.load_from_disk("out")

One module a format, which says what its files hold and what of it means what here. A file is data:
none is executed, and what does not fit is a ValueError of one line that names the file.
docs/formats.md has what each format can express.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fastsae.files import new_folder
from fastsae.formats import (
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    llama_scope,
    llamascopium,
    native,
    openai,
    sae_lens,
    sparsify,
)
from fastsae.formats.files import naming
from fastsae.sae import SAE

__all__ = ["FORMATS", "WRITABLE", "Format", "guess", "read", "write"]


@dataclass(frozen=True)
class Format:
    """What is known of a format."""

    files: str
    """What it looks like on disk."""
    matches: Callable[[Path], bool]
    """Whether a file or folder looks like it."""
    read: Callable[[Path, bool], SAE]
    """(path, normalized) → the SAE in evaluation mode."""
    write: Callable[[SAE, Path], None] | None = None
    """(sae, new folder), where it can be written."""


FORMATS: dict[str, Format] = {
    "fastsae": Format(native.FILES, native.matches, native.read, native.write),
    "sae_lens": Format(sae_lens.FILES, sae_lens.matches, sae_lens.read, sae_lens.write),
    "dictionary_learning": Format(
        dictionary_learning.FILES,
        dictionary_learning.matches,
        dictionary_learning.read,
        dictionary_learning.write,
    ),
    "sparsify": Format(sparsify.FILES, sparsify.matches, sparsify.read, sparsify.write),
    "llamascopium": Format(llamascopium.FILES, llamascopium.matches, llamascopium.read),
    "llama_scope": Format(llama_scope.FILES, llama_scope.matches, llama_scope.read),
    "gemma_scope": Format(gemma_scope.FILES, gemma_scope.matches, gemma_scope.read),
    "gemma_scope_2": Format(gemma_scope_2.FILES, gemma_scope_2.matches, gemma_scope_2.read),
    "openai": Format(openai.FILES, openai.matches, openai.read),
}
WRITABLE = tuple(name for name, known in FORMATS.items() if known.write is not None)


def read(path: str | Path, format: str | None = None, *, normalized: bool = False) -> SAE:
    """The SAE in a file or folder, in evaluation mode on the CPU; its format is guessed if None.

    normalized: the caller normalises each token before the SAE, where the file's library does so in
    a way that is no constant factor (OpenAI's TopK, SAELens's layer_norm); without it such files
    are refused. ValueError, in one line that names the file: what is wrong with it.
    """
    path = Path(path)
    with naming(path):
        return _known(format or guess(path)).read(path, normalized)


def write(sae: SAE, path: str | Path, format: str = "fastsae") -> None:
    """Writes an SAE as a new folder, which appears whole or not at all; sae stays as it is.

    ValueError: a format that is read only, an SAE that it cannot express, or something at path.
    """
    known = _known(format)
    if known.write is None:
        raise ValueError(f"format: expected one of {', '.join(WRITABLE)} to write, got {format}")
    with new_folder(Path(path)) as folder:
        known.write(sae, folder)


def guess(path: str | Path) -> str:
    """The format of a file or folder, by its files' names and keys; ValueError unless it is one."""
    path = Path(path)
    if not path.is_dir() and not path.is_file():
        raise ValueError(f"{path}: no such file or folder")
    found = [name for name, known in FORMATS.items() if known.matches(path)]
    if not found:
        kinds = "; ".join(f"{name}: {known.files}" for name, known in FORMATS.items())
        raise ValueError(f"{path}: expected the files of a format ({kinds}), got none")
    if len(found) > 1:
        raise ValueError(f"{path}: expected one format, got the files of {', '.join(found)}")
    return found[0]


def _known(format: str) -> Format:
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    return FORMATS[format]
