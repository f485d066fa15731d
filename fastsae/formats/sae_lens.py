"""SAELens: sae_weights.safetensors (W_enc [D,F], W_dec [F,D_out]) and cfg.json.

Training checkpoints (`final_{n}/`, `{n}/`) and saved inference models, from 4.x (another cfg.json)
to 6.54. Their activations of rescale_acts_by_decoder_norm are h·‖W_dec[i]‖; ours are h, and the
decoder is not divided: the reconstruction is the same.

    standard, transcoder, skip_transcoder                     ReLU
    jumprelu, jumprelu_transcoder, jumprelu_skip_transcoder   JumpReLU
    topk, abstopk, gated                                      TopK, AbsTopK, Gated
    batchtopk, matryoshka_batchtopk (training)                BatchTopK, Matryoshka

activation_scaler.json beside a training checkpoint is the scale of its input.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae.config import DTYPES
from fastsae.files import read_json, write_json
from fastsae.formats.files import (
    field,
    folder_of,
    has,
    need,
    need_matrix,
    need_tensor,
    positive,
    scalar,
)
from fastsae.formats.reading import (
    build,
    check_sizes,
    decoder_norms,
    name_of,
    refuse_normalization,
    score_of,
)
from fastsae.formats.writing import bias_of, cannot, form_of_inference, unscaled
from fastsae.sae import SAE
from fastsae.selection import (
    AbsTopK,
    BatchTopK,
    Gated,
    JumpReLU,
    Matryoshka,
    MutualChoice,
    ReLU,
    Selection,
    TopK,
)
from fastsae.tensors import read_tensors, write_tensors

FILES = "sae_weights.safetensors and cfg.json"
WEIGHTS, CONFIG = "sae_weights.safetensors", "cfg.json"
VERSION = "6.54.12"
"""Of SAELens, whose cfg.json `write` writes."""

_RULES: dict[str, type[Selection]] = {
    "standard": ReLU,
    "transcoder": ReLU,
    "skip_transcoder": ReLU,
    "jumprelu": JumpReLU,
    "jumprelu_transcoder": JumpReLU,
    "jumprelu_skip_transcoder": JumpReLU,
    "gated": Gated,
    "topk": TopK,
    "abstopk": AbsTopK,
    "batchtopk": BatchTopK,
    "matryoshka_batchtopk": Matryoshka,
}


def matches(path: Path) -> bool:
    return has(path, WEIGHTS, CONFIG)


# ---- read ----


def read(path: Path, normalized: bool) -> SAE:
    """The SAE of a folder. `normalized`: see `fastsae.formats.read`."""
    folder = folder_of(path)
    cfg = read_json(need(folder, CONFIG))
    weights = read_tensors(need(folder, WEIGHTS))
    if _is_older(cfg):
        cfg = _renamed(cfg)
    architecture = field(cfg, "architecture", str)
    if architecture not in _RULES:
        raise ValueError(f"architecture: expected one of {', '.join(_RULES)}, got {architecture!r}")
    _check_finetuning(weights)
    selection, state = _rule(architecture, cfg, weights)
    transcoder = "transcoder" in architecture
    weighted = field(cfg, "rescale_acts_by_decoder_norm", bool, False)
    sae = build(
        selection,
        need_matrix(weights, "W_enc").T,
        need_matrix(weights, "W_dec"),
        b_enc=need_tensor(weights, "b_gate" if architecture == "gated" else "b_enc"),
        b_dec=need_tensor(weights, "b_dec"),
        W_skip=need_matrix(weights, "W_skip") if "skip" in architecture else None,
        transcoder=transcoder,
        centred=not transcoder and field(cfg, "apply_b_dec_to_input", bool, True),
        input_scale=_input_scale(cfg, folder, transcoder, normalized),
        state=state,
    )
    check_sizes(cfg, sae, d_in="d_in", d_sae="d_sae", d_out="d_out")
    if architecture == "abstopk" and weighted:
        _fold_norms_(sae)
    return sae


def _rule(
    architecture: str, cfg: dict[str, Any], weights: dict[str, Tensor]
) -> tuple[Selection, dict[str, Tensor]]:
    score = score_of(field(cfg, "rescale_acts_by_decoder_norm", bool, False))
    rule = _RULES[architecture]
    if rule is TopK:
        return TopK(field(cfg, "k", int), score=score), {}
    if rule is AbsTopK:
        return AbsTopK(field(cfg, "k", int)), {}
    if rule is JumpReLU:
        if "log_threshold" in weights:
            return JumpReLU(), {"log_threshold": weights["log_threshold"]}
        return JumpReLU(), {"threshold": need_tensor(weights, "threshold")}
    if rule is Gated:
        return Gated(), {name: need_tensor(weights, name) for name in ("r_mag", "b_mag")}
    if rule is ReLU:
        return ReLU(), {}
    k = float(field(cfg, "k", float))
    theta = float(scalar(need_tensor(weights, "topk_threshold"), "topk_threshold"))
    state = {"threshold_total": torch.tensor(max(theta, 0.0)), "threshold_weight": torch.ones(())}
    if rule is Matryoshka:
        if not k.is_integer():
            raise ValueError(f"k: expected an integer with {architecture}, got {k}")
        return Matryoshka(int(k), _groups(cfg), bias_term=False, score=score), state
    if k.is_integer():
        return BatchTopK(int(k), score=score), state
    return MutualChoice(k, score=score), state


def _groups(cfg: dict[str, Any]) -> tuple[float, ...]:
    d_sae = field(cfg, "d_sae", int)
    ends = field(cfg, "matryoshka_widths", list)
    if not all(type(end) is int for end in ends):
        raise ValueError(f"matryoshka_widths: expected integers, got {str(ends)[:60]}")
    ends = [0, *ends] if ends and ends[-1] == d_sae else [0, *ends, d_sae]
    if any(a >= b for a, b in pairwise(ends)):
        raise ValueError(f"matryoshka_widths: expected ascending widths, got {str(ends[1:])[:60]}")
    return tuple((b - a) / d_sae for a, b in pairwise(ends))


def _input_scale(cfg: dict[str, Any], folder: Path, transcoder: bool, normalized: bool) -> float:
    how = field(cfg, "normalize_activations", str, "none")
    if how == "none":
        return 1.0
    scaler = folder / "activation_scaler.json"
    if how == "expected_average_only_in" and not transcoder and scaler.is_file():
        return positive(read_json(scaler), "scaling_factor")
    refuse_normalization(f"normalize_activations: {how}", normalized)
    return 1.0


def _fold_norms_(sae: SAE) -> None:
    """For h·‖W_dec[i]‖ as the score of AbsTopK, which has no such option here."""
    with torch.no_grad():
        norms = decoder_norms(sae.W_dec).clamp(min=1e-8)
        sae.W_dec.div_(norms[:, None])
        sae.W_enc.mul_(norms[:, None])
        if sae.b_enc is not None:
            sae.b_enc.mul_(norms)


def _check_finetuning(weights: dict[str, Tensor]) -> None:
    factor = weights.get("scaling_factor")
    if factor is not None and not bool(((factor - 1).abs() < 1e-5).all()):
        raise ValueError("scaling_factor: expected ones (no finetuned scale), got other numbers")


def _is_older(cfg: dict[str, Any]) -> bool:
    """Whether cfg.json is of a version before 6."""
    metadata = field(cfg, "metadata", dict, {})
    version = metadata.get("sae_lens_version") or cfg.get("sae_lens_version") or "0"
    major = str(version).partition(".")[0]
    return not major.isdigit() or int(major[:9]) < 6


def _renamed(cfg: dict[str, Any]) -> dict[str, Any]:
    """A cfg.json of a version before 6 in the words of 6."""
    cfg = {"architecture": "standard", **cfg}
    activation = cfg.get("activation_fn", cfg.get("activation_fn_str", "relu"))
    if activation == "topk":
        kwargs = field(cfg, "activation_fn_kwargs", dict)
        cfg |= {"architecture": "topk", "k": field(kwargs, "k", int)}
    elif activation != "relu":
        raise ValueError(f"activation_fn: expected relu or topk, got {str(activation)[:60]!r}")
    if isinstance(cfg.get("normalize_activations"), bool):
        scaled = cfg["normalize_activations"]
        cfg["normalize_activations"] = "expected_average_only_in" if scaled else "none"
    return cfg


# ---- write ----


def write(sae: SAE, folder: Path) -> None:
    """The inference model that `SAE.load_from_disk` reads; scales are folded into the weights.

    Rules that track thresholds become jumprelu. 16-bit weights keep their dtype, but cfg.json asks
    for float32, in which we compute.
    """
    cfg, tensors = inference_model(sae)
    write_tensors(folder / WEIGHTS, tensors)
    write_json(folder / CONFIG, cfg)


def inference_model(sae: SAE) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """cfg.json and the state dict, W_enc a transposed view. ValueError: there is none for sae."""
    sae = unscaled(sae)
    rule, thresholds = form_of_inference(sae)
    c = sae.config
    own: dict[str, Any] = {}
    tensors = {"W_enc": sae.W_enc.T, "W_dec": sae.W_dec, "b_dec": sae.b_dec, "b_enc": bias_of(sae)}
    if thresholds is not None:
        architecture = "jumprelu"
        tensors["threshold"] = thresholds
    elif isinstance(rule, ReLU):
        architecture = "standard"
    elif isinstance(rule, TopK):
        architecture = "topk"
        own = {"k": rule.k, "rescale_acts_by_decoder_norm": rule.score != "activation"}
    elif isinstance(rule, AbsTopK):
        architecture = "abstopk"
        own = {"k": rule.k, "rescale_acts_by_decoder_norm": False}
    elif isinstance(rule, Gated):
        architecture = "gated"
        tensors["b_gate"] = tensors.pop("b_enc")
        tensors |= dict(sae.selection_state.named_parameters())
    else:
        raise cannot("SAELens", sae, "topk, abstopk, gated, relu, or thresholds")
    if c.is_transcoder:
        if architecture not in ("standard", "jumprelu"):
            raise cannot("SAELens", sae, "transcoders with relu or thresholds")
        kind = "skip_transcoder" if c.skip else "transcoder"
        architecture = kind if architecture == "standard" else f"jumprelu_{kind}"
        own["d_out"] = c.d_out
        if sae.W_skip is not None:
            tensors["W_skip"] = sae.W_skip
    dtype = torch.promote_types(sae.W_enc.dtype, torch.float32)
    cfg = {
        "architecture": architecture,
        "d_in": c.d_in,
        "d_sae": c.d_sae,
        "dtype": name_of(dtype),
        "device": "cpu",
        "apply_b_dec_to_input": c.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "none",
        **own,
        "metadata": {"sae_lens_version": VERSION, "training_architecture": c.selection.name},
    }
    return cfg, {name: t.detach() for name, t in tensors.items()}


# ---- SAELens's own loader ----


def from_disk(
    path: str | Path, device: str = "cpu", cfg_overrides: dict[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A `converter=` for SAELens's `SAE.load_from_disk` that reads our folders."""
    cfg, tensors = inference_model(SAE.load(path))
    cfg |= {"device": device, **(cfg_overrides or {})}
    dtype = DTYPES[str(cfg["dtype"]).removeprefix("torch.")]
    return cfg, {name: t.to(cfg["device"], dtype).contiguous() for name, t in tensors.items()}


def from_hub(
    repo_id: str,
    folder_name: str,
    device: str = "cpu",
    force_download: bool = False,
    cfg_overrides: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor], None]:
    """A `converter=` for SAELens's `SAE.from_pretrained` that reads our folders on the hub."""
    from huggingface_hub import hf_hub_download  # SAELens brings it

    prefix = "" if folder_name in ("", ".") else f"{folder_name}/"
    files = [
        Path(hf_hub_download(repo_id, f"{prefix}{name}", force_download=force_download))
        for name in ("config.json", "sae.safetensors")
    ]
    return (*from_disk(files[0].parent, device, cfg_overrides), None)
