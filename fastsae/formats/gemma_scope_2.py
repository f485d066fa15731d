"""Gemma Scope 2: params.safetensors (w_enc [D,F], w_dec [F,D_out], b_enc, b_dec, threshold [F]) and
config.json: JumpReLU, b_dec not subtracted from the input.

A transcoder where config.json has another hook for the output, or where there is an
affine_skip_connection [D,D_out] (the transpose of W_skip).
"""

from __future__ import annotations

from pathlib import Path

from fastsae.files import read_json
from fastsae.formats.files import field, find, folder_of, need, need_matrix, need_tensor
from fastsae.formats.reading import build
from fastsae.sae import SAE
from fastsae.selection import JumpReLU
from fastsae.tensors import read_tensors

FILES = "params.safetensors and config.json"
WEIGHTS, CONFIG = "params.safetensors", "config.json"


def matches(path: Path) -> bool:
    return find(path, WEIGHTS) is not None


def read(path: Path, normalized: bool) -> SAE:
    """The SAE of a folder; a missing config.json is one of an SAE without another hook."""
    folder = folder_of(path)
    weights = read_tensors(need(folder, WEIGHTS))
    cfg = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    architecture = field(cfg, "architecture", str, "jump_relu")
    if architecture != "jump_relu":
        raise ValueError(f"architecture: expected jump_relu, got {architecture[:60]!r}")
    hook = field(cfg, "hf_hook_point_in", str, "")
    skip_name = "affine_skip_connection"
    skip = need_matrix(weights, skip_name) if skip_name in weights else None
    W_enc, W_dec = need_matrix(weights, "w_enc"), need_matrix(weights, "w_dec")
    return build(
        JumpReLU(),
        W_enc.T,
        W_dec,
        b_enc=need_tensor(weights, "b_enc"),
        b_dec=need_tensor(weights, "b_dec"),
        W_skip=None if skip is None else skip.T,
        transcoder=skip is not None or field(cfg, "hf_hook_point_out", str, hook) != hook,
        centred=False,
        state={"threshold": need_tensor(weights, "threshold")},
    )
