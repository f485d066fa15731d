"""Gemma Scope: params.npz (W_enc [D,F], W_dec [F,D], b_enc, b_dec, threshold [F]): JumpReLU.

b_dec is not subtracted from the input. The same arrays of the Gemma Scope transcoders read as an
SAE with the same reconstruction. The SAEs of embeddings take them unscaled; a model multiplies them
by √D first.
"""

from __future__ import annotations

from pathlib import Path

from fastsae.formats.files import find, need, need_matrix, need_tensor, read_npz
from fastsae.formats.reading import build
from fastsae.sae import SAE
from fastsae.selection import JumpReLU

FILES = "params.npz"
_NAMES = ("W_enc", "W_dec", "w_enc", "w_dec", "b_enc", "b_dec", "threshold")


def matches(path: Path) -> bool:
    return path.suffix == ".npz" if path.is_file() else find(path, FILES) is not None


def read(path: Path, normalized: bool) -> SAE:
    """The SAE of a folder or an .npz file."""
    arrays = read_npz(path if path.is_file() else need(path, FILES), _NAMES)
    for name in ("W_enc", "W_dec"):
        if name.lower() in arrays:
            arrays[name] = arrays[name.lower()]
    return build(
        JumpReLU(),
        need_matrix(arrays, "W_enc").T,
        need_matrix(arrays, "W_dec"),
        b_enc=need_tensor(arrays, "b_enc"),
        b_dec=need_tensor(arrays, "b_dec"),
        centred=False,
        state={"threshold": need_tensor(arrays, "threshold")},
    )
