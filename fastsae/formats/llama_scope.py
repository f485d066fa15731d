"""Llama Scope: hyperparams.json, checkpoints/final.safetensors (encoder.weight [F,D],
decoder.weight [D,F]).

As the authors' loader computes (OpenMOSS lm-saes, October 2024): the activations' scales are
√D / dataset_average_activation_norm of "in" and "out"; with sparsity_include_decoder_norm the one
jump_relu_threshold is of h·‖W_dec[i]‖ after both scales are folded into the weights, so of the
scaled h it is threshold·(scale of "out") / ‖W_dec[i]‖. SAELens takes the scale of "in", which
differs for transcoders, and no norm, which differs where a norm is not 1.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from fastsae.files import read_json
from fastsae.formats.files import field, find, folder_of, need, need_matrix, need_tensor, positive
from fastsae.formats.reading import build, check_sizes, refuse_normalization, score_of
from fastsae.sae import SAE
from fastsae.selection import JumpReLU, ReLU, Selection, TopK
from fastsae.tensors import read_tensors

FILES = "hyperparams.json and checkpoints/final.safetensors"
CONFIG = "hyperparams.json"
WEIGHTS = ("checkpoints/final.safetensors", "sae_weights.safetensors")


def matches(path: Path) -> bool:
    return find(path, CONFIG) is not None


def read(path: Path, normalized: bool) -> SAE:
    """The SAE of a folder. `normalized`: see `fastsae.formats.read`."""
    folder = folder_of(path)
    cfg = read_json(need(folder, CONFIG))
    weights = read_tensors(need(folder, *WEIGHTS))
    if field(cfg, "use_glu_encoder", bool, False):
        raise ValueError("use_glu_encoder: expected false, got true")
    scale_in, scale_out = _scales(cfg, normalized)
    rule = _rule(cfg)
    weighted = field(cfg, "sparsity_include_decoder_norm", bool, True)
    state = {}
    if isinstance(rule, JumpReLU):
        theta = torch.tensor(positive(cfg, "jump_relu_threshold") * scale_out, dtype=torch.float64)
        state["weighted_threshold" if weighted else "threshold"] = theta
    hook = field(cfg, "hook_point_in", str)
    transcoder = field(cfg, "hook_point_out", str, hook) != hook
    sae = build(
        rule,
        need_matrix(weights, "encoder.weight"),
        need_matrix(weights, "decoder.weight").T,
        b_enc=need_tensor(weights, "encoder.bias"),
        b_dec=need_tensor(weights, "decoder.bias")
        if field(cfg, "use_decoder_bias", bool, True)
        else None,
        transcoder=transcoder,
        centred=field(cfg, "apply_decoder_bias_to_pre_encoder", bool, False),
        input_scale=scale_in,
        output_scale=scale_out if transcoder else 1.0,
        state=state,
    )
    check_sizes(cfg, sae, d_in="d_model", d_sae="d_sae", d_out="d_model")
    return sae


def _scales(cfg: dict[str, Any], normalized: bool) -> tuple[float, float]:
    how = field(cfg, "norm_activation", str, "dataset-wise")
    if how in ("inference", "none"):
        return 1.0, 1.0
    if how != "dataset-wise":
        refuse_normalization(f"norm_activation: {how}", normalized)
        return 1.0, 1.0
    norms = field(cfg, "dataset_average_activation_norm", dict)
    root = math.sqrt(field(cfg, "d_model", int))
    return root / positive(norms, "in"), root / positive(norms, "out")


def _rule(cfg: dict[str, Any]) -> Selection:
    act = field(cfg, "act_fn", str, "jumprelu")
    has_threshold = field(cfg, "jump_relu_threshold", float, 0.0) > 0
    if act == "jumprelu" and not has_threshold:
        return ReLU()
    if act == "jumprelu" or (act == "topk" and has_threshold):
        return JumpReLU()
    if act == "topk":
        weighted = field(cfg, "sparsity_include_decoder_norm", bool, True)
        return TopK(field(cfg, "top_k", int), score=score_of(weighted))
    if act == "relu":
        return ReLU()
    raise ValueError(f"act_fn: expected jumprelu, topk or relu, got {act[:60]!r}")
