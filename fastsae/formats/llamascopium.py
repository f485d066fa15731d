"""llamascopium (OpenMOSS): sae_weights.safetensors or .pt (W_E [D,F], W_D [F,D]) and config.json.

norm_activation dataset-wise is the SAE's input scale, √D / the mean norm in
`dataset_average_activation_norm.{hook}`; inference has it in the weights. Where the two hooks
differ it is a transcoder. sparsity_include_decoder_norm weighs scores, and so JumpReLU's
thresholds, with the norms of the decoder. b_D is not subtracted from the input.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from fastsae.files import read_json
from fastsae.formats.files import (
    field,
    find,
    folder_of,
    has,
    need,
    need_matrix,
    need_tensor,
    read_pickled,
    scalar,
)
from fastsae.formats.reading import build, check_sizes, refuse_normalization, score_of
from fastsae.sae import SAE
from fastsae.selection import BatchTopK, JumpReLU, ReLU, Selection, TopK
from fastsae.tensors import read_tensors

FILES = "sae_weights.safetensors (or .pt) and config.json"
CONFIG = "config.json"
WEIGHTS = tuple(
    f"{name}.{kind}"
    for name in ("sae_weights", "checkpoints/pruned", "checkpoints/final")
    for kind in ("safetensors", "pt")
)


def matches(path: Path) -> bool:
    folder = folder_of(path)
    named = find(path, CONFIG, *WEIGHTS) is not None
    return named and has(folder, CONFIG) and find(folder, *WEIGHTS) is not None


def read(path: Path, normalized: bool) -> SAE:
    """The SAE of a folder. `normalized`: see `fastsae.formats.read`."""
    folder = folder_of(path)
    cfg = read_json(need(folder, CONFIG))
    kind = field(cfg, "sae_type", str, "sae")
    if kind != "sae":
        raise ValueError(f"sae_type: expected sae, got {kind[:60]!r}")
    if field(cfg, "use_glu_encoder", bool, False):
        raise ValueError("use_glu_encoder: expected false, got true")
    weights = _weights(need(folder, *WEIGHTS))
    hooks = [field(cfg, f"hook_point_{end}", str) for end in ("in", "out")]
    scales = _scales(cfg, weights, hooks, normalized)
    selection, state = _rule(cfg, weights)
    transcoder = hooks[0] != hooks[1]
    sae = build(
        selection,
        need_matrix(weights, "W_E").T,
        need_matrix(weights, "W_D"),
        b_enc=need_tensor(weights, "b_E"),
        b_dec=need_tensor(weights, "b_D") if field(cfg, "use_decoder_bias", bool, True) else None,
        transcoder=transcoder,
        centred=False,
        input_scale=scales[0],
        output_scale=scales[1] if transcoder else 1.0,
        state=state,
    )
    check_sizes(cfg, sae, d_in="d_model", d_out="d_model")
    return sae


def _weights(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        return dict(read_tensors(path))
    return field(read_pickled(path), "sae", dict)


def _scales(
    cfg: dict[str, Any], weights: dict[str, Any], hooks: list[str], normalized: bool
) -> list[float]:
    how = field(cfg, "norm_activation", str, "dataset-wise")
    if how == "inference":
        return [1.0, 1.0]
    if how != "dataset-wise":
        refuse_normalization(f"norm_activation: {how}", normalized)
        return [1.0, 1.0]
    root = math.sqrt(field(cfg, "d_model", int))
    names = [f"dataset_average_activation_norm.{hook}" for hook in hooks]
    norms = [float(scalar(need_tensor(weights, name), name)) for name in names]
    if not min(norms) > 1e-30:
        raise ValueError(f"dataset_average_activation_norm: expected norms above 0, got {norms}")
    return [root / norm for norm in norms]


def _rule(cfg: dict[str, Any], weights: dict[str, Any]) -> tuple[Selection, dict[str, Tensor]]:
    act, weighted = (
        field(cfg, "act_fn", str),
        field(cfg, "sparsity_include_decoder_norm", bool, True),
    )
    if act == "relu":
        return ReLU(), {}
    if act == "topk":
        return TopK(field(cfg, "top_k", int), score=score_of(weighted)), {}
    if act == "batchtopk":
        return BatchTopK(field(cfg, "top_k", int), score=score_of(weighted)), {}
    if act != "jumprelu":
        raise ValueError(f"act_fn: expected relu, jumprelu, topk or batchtopk, got {act[:60]!r}")
    name = "activation_function.log_jumprelu_threshold"
    threshold = need_tensor(weights, name).float().exp()
    return JumpReLU(), {"weighted_threshold" if weighted else "threshold": threshold}
