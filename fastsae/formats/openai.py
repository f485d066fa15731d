"""OpenAI's sparse_autoencoder: {layer}.pt, a pickled state dict (encoder.weight [F,D],
decoder.weight [D,F], pre_bias, latent_bias) that names its activation: ReLU or TopK.

pre_bias is b_dec, subtracted from the input. The library normalises each token (mean 0, standard
deviation 1) where the activation is TopK, and undoes that on the reconstruction.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastsae.formats.files import field, need_matrix, need_tensor, read_pickled
from fastsae.formats.reading import build, refuse_normalization
from fastsae.sae import SAE
from fastsae.selection import ReLU, Selection, TopK

FILES = "a .pt file with pre_bias and latent_bias"


def matches(path: Path) -> bool:
    return path.is_file() and path.suffix == ".pt" and "pre_bias" in read_pickled(path)


def read(path: Path, normalized: bool) -> SAE:
    """The SAE of a file. `normalized`: see `fastsae.formats.read`."""
    state = read_pickled(path)
    return build(
        _rule(state, normalized),
        need_matrix(state, "encoder.weight"),
        need_matrix(state, "decoder.weight").T,
        b_enc=need_tensor(state, "latent_bias"),
        b_dec=need_tensor(state, "pre_bias"),
    )


def _rule(state: dict[str, Any], normalized: bool) -> Selection:
    activation = field(state, "activation", str, "ReLU")
    if activation == "ReLU":
        return ReLU()
    if activation != "TopK":
        raise ValueError(f"activation: expected ReLU or TopK, got {activation[:60]!r}")
    own = field(state, "activation_state_dict", dict)
    after = field(own, "postact_fn", str, "ReLU")
    if after != "ReLU":
        raise ValueError(f"postact_fn: expected ReLU, got {after[:60]!r}")
    refuse_normalization("TopK: normalisation of each token", normalized)
    return TopK(field(own, "k", int))
