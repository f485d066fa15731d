"""EleutherAI's sparsify: sae.safetensors (encoder.weight [F,D], W_dec [F,D]) and cfg.json.

activation topk is TopK and groupmax GroupTopK; b_dec is subtracted from the input unless transcode.
Its SAEs with a skip connection but without transcode become transcoders of their own input.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae.files import read_json, write_json
from fastsae.formats.files import field, folder_of, has, need, need_matrix, need_tensor
from fastsae.formats.reading import build, check_sizes
from fastsae.formats.writing import bias_of, cannot, form_of_inference, unscaled, with_unit_rows
from fastsae.sae import SAE
from fastsae.selection import GroupTopK, Selection, TopK
from fastsae.tensors import read_tensors, write_tensors

FILES = "sae.safetensors and cfg.json"
WEIGHTS, CONFIG = "sae.safetensors", "cfg.json"


def matches(path: Path) -> bool:
    return has(path, WEIGHTS, CONFIG)


def read(path: Path, normalized: bool) -> SAE:
    """The SAE of a folder."""
    folder = folder_of(path)
    cfg = read_json(need(folder, CONFIG))
    weights = read_tensors(need(folder, WEIGHTS))
    if field(cfg, "signed", bool, False):
        raise ValueError("signed: expected false (positive activations), got true")
    skip, transcode = (field(cfg, name, bool, False) for name in ("skip_connection", "transcode"))
    sae = build(
        _rule(cfg),
        need_matrix(weights, "encoder.weight"),
        need_matrix(weights, "W_dec"),
        b_enc=need_tensor(weights, "encoder.bias"),
        b_dec=need_tensor(weights, "b_dec"),
        W_skip=need_matrix(weights, "W_skip") if skip else None,
        transcoder=transcode or skip,
        centred=not transcode,
    )
    if cfg.get("num_latents") == 0:
        cfg = {**cfg, "num_latents": None}
    check_sizes(cfg, sae, d_in="d_in", d_sae="num_latents")
    return sae


def _rule(cfg: dict[str, Any]) -> Selection:
    activation, k = field(cfg, "activation", str, "topk"), field(cfg, "k", int)
    if activation not in ("topk", "groupmax"):
        raise ValueError(f"activation: expected topk or groupmax, got {activation[:60]!r}")
    return TopK(k) if activation == "topk" else GroupTopK(k)


def write(sae: SAE, folder: Path) -> None:
    """What `SparseCoder.load_from_disk` reads; scales are folded into the weights, and the
    decoder's norms where the score is weighted by them."""
    c = sae.config
    sae = unscaled(sae)
    rule, thresholds = form_of_inference(sae)
    if thresholds is not None or not isinstance(rule, TopK | GroupTopK):
        raise cannot("sparsify", sae, "topk, group-topk")
    if c.is_transcoder and c.d_out != c.d_in:
        raise ValueError(f"d_out: expected d_in = {c.d_in} for sparsify, got {c.d_out}")
    if isinstance(rule, TopK) and rule.score != "activation":
        sae = with_unit_rows(sae)
    tensors: dict[str, Tensor] = {
        "encoder.weight": sae.W_enc,
        "encoder.bias": bias_of(sae, centred=not c.is_transcoder),
        "W_dec": sae.W_dec,
        "b_dec": sae.b_dec,
    }
    if sae.W_skip is not None:
        tensors["W_skip"] = sae.W_skip
    dtype = tensors["encoder.weight"].dtype  # it loads all in the dtype of the first
    for t in tensors.values():
        dtype = torch.promote_types(dtype, t.dtype)
    write_tensors(folder / WEIGHTS, {name: t.to(dtype) for name, t in tensors.items()})
    cfg = {
        "activation": "topk" if isinstance(rule, TopK) else "groupmax",
        "expansion_factor": max(1, c.d_sae // c.d_in),
        "normalize_decoder": c.decoder_norm == "unit",
        "num_latents": c.d_sae,
        "k": rule.k,
        "multi_topk": bool(c.multi_topk_coef),
        "skip_connection": c.skip,
        "transcode": c.is_transcoder,
        "d_in": c.d_in,
    }
    write_json(folder / CONFIG, cfg)
