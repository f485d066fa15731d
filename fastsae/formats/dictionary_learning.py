"""dictionary_learning: ae.pt, a pickled state dict, and config.json {"trainer", "buffer"}.

config.json names the class; without it the keys do, except that AutoEncoderTopK and BatchTopKSAE
have the same. Checkpoints (`checkpoints/ae_{step}.pt`) use the config.json of the folder above.

    AutoEncoderTopK, BatchTopKSAE   encoder.weight [F,D], decoder.weight [D,F]: TopK, BatchTopK
    MatryoshkaBatchTopKSAE          W_enc [D,F], W_dec [F,D], group_sizes: Matryoshka
    JumpReluAutoEncoder             W_enc, W_dec, threshold [F]; b_dec is not subtracted: JumpReLU
    GatedAutoEncoder                encoder.weight, decoder_bias, gate_bias, mag_bias, r_mag: Gated
    AutoEncoder                     encoder.weight, decoder.weight, bias: ReLU
    AutoEncoderNew                  decoder.bias, which is not subtracted: ReLU

The library applies the threshold of BatchTopK at inference also before it has one (-1, which keeps
every positive latent); so does the SAE that `read` returns.
"""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae.files import read_json, write_json
from fastsae.formats.files import field, find, need, need_matrix, need_tensor, read_pickled, scalar
from fastsae.formats.reading import build, check_sizes
from fastsae.formats.writing import bias_of, cannot, form_of_inference, unscaled, with_unit_rows
from fastsae.sae import SAE
from fastsae.selection import BatchTopK, Gated, JumpReLU, Matryoshka, ReLU, TopK

FILES = "ae.pt and config.json"
WEIGHTS, CONFIG = "ae.pt", "config.json"

_KEYS = (  # of each class, one that none before it has
    ("group_sizes", "MatryoshkaBatchTopKSAE"),
    ("W_enc", "JumpReluAutoEncoder"),
    ("gate_bias", "GatedAutoEncoder"),
    ("bias", "AutoEncoder"),
    ("decoder.bias", "AutoEncoderNew"),
)
_LINEAR = {"encoder.weight", "decoder.weight"}


def matches(path: Path) -> bool:
    if path.is_dir():
        return find(path, WEIGHTS) is not None
    if path.suffix != ".pt":
        return False
    keys = set(read_pickled(path))
    return (keys >= _LINEAR or keys >= {"W_enc", "W_dec"}) and "pre_bias" not in keys


def read(path: Path, normalized: bool) -> SAE:
    """The SAE of a folder or of a .pt file."""
    file = path if path.is_file() else need(path, WEIGHTS)
    state = read_pickled(file)
    trainer = _trainer(file.parent)
    name = _class_name(trainer, state)
    if "W_enc" in state:
        W_enc, W_dec = need_matrix(state, "W_enc").T, need_matrix(state, "W_dec")
    else:
        W_enc, W_dec = need_matrix(state, "encoder.weight"), need_matrix(state, "decoder.weight").T
    sae = _READERS[name](state, trainer, W_enc, W_dec)
    check_sizes(trainer, sae, d_in="activation_dim", d_sae="dict_size")
    return sae


def _trainer(folder: Path) -> dict[str, Any]:
    folders = (folder, folder.parent) if folder.name == "checkpoints" else (folder,)
    config = next((f / CONFIG for f in folders if (f / CONFIG).is_file()), None)
    return {} if config is None else field(read_json(config), "trainer", dict, {})


def _class_name(trainer: dict[str, Any], state: dict[str, Any]) -> str:
    name = field(trainer, "dict_class", str, "")
    if not name:
        name = next((known for key, known in _KEYS if key in state), "")
        if not name:
            raise ValueError(
                f"{CONFIG}: expected one beside the weights, as AutoEncoderTopK and BatchTopKSAE "
                "have the same keys, got none"
            )
    if name not in _READERS:
        raise ValueError(f"dict_class: expected one of {', '.join(_READERS)}, got {name[:60]!r}")
    return name


def _k(state: dict[str, Any], trainer: dict[str, Any]) -> int:
    if "k" not in state:
        return field(trainer, "k", int)
    k = state["k"]
    return field({"k": scalar(k, "k") if isinstance(k, Tensor) else k}, "k", int)


def _threshold(state: dict[str, Any]) -> dict[str, Tensor]:
    theta = float(scalar(need_tensor(state, "threshold"), "threshold"))
    return {"threshold_total": torch.tensor(max(theta, 0.0)), "threshold_weight": torch.ones(())}


def _read_topk(state: dict[str, Any], trainer: dict[str, Any], *W: Tensor) -> SAE:
    b_enc, b_dec = need_tensor(state, "encoder.bias"), need_tensor(state, "b_dec")
    return build(TopK(_k(state, trainer)), *W, b_enc=b_enc, b_dec=b_dec)


def _read_batchtopk(state: dict[str, Any], trainer: dict[str, Any], *W: Tensor) -> SAE:
    b_enc, b_dec = need_tensor(state, "encoder.bias"), need_tensor(state, "b_dec")
    rule = BatchTopK(_k(state, trainer))
    return build(rule, *W, b_enc=b_enc, b_dec=b_dec, state=_threshold(state))


def _read_matryoshka(state: dict[str, Any], trainer: dict[str, Any], *W: Tensor) -> SAE:
    sizes = need_tensor(state, "group_sizes")
    if sizes.ndim != 1 or sizes.is_floating_point() or int(sizes.sum()) != W[0].shape[0]:
        raise ValueError(f"group_sizes: expected integers that add up to {W[0].shape[0]}")
    shares = tuple(size / W[0].shape[0] for size in sizes.tolist())
    rule = Matryoshka(_k(state, trainer), shares, bias_term=False)
    b_enc, b_dec = need_tensor(state, "b_enc"), need_tensor(state, "b_dec")
    return build(rule, *W, b_enc=b_enc, b_dec=b_dec, state=_threshold(state))


def _read_jumprelu(state: dict[str, Any], trainer: dict[str, Any], *W: Tensor) -> SAE:
    b_enc, b_dec = need_tensor(state, "b_enc"), need_tensor(state, "b_dec")
    thresholds = {"threshold": need_tensor(state, "threshold")}
    return build(JumpReLU(), *W, b_enc=b_enc, b_dec=b_dec, centred=False, state=thresholds)


def _read_gated(state: dict[str, Any], trainer: dict[str, Any], *W: Tensor) -> SAE:
    own = {"r_mag": need_tensor(state, "r_mag"), "b_mag": need_tensor(state, "mag_bias")}
    b_enc, b_dec = need_tensor(state, "gate_bias"), need_tensor(state, "decoder_bias")
    return build(Gated(), *W, b_enc=b_enc, b_dec=b_dec, state=own)


def _read_relu(state: dict[str, Any], trainer: dict[str, Any], *W: Tensor) -> SAE:
    b_enc, b_dec = need_tensor(state, "encoder.bias"), need_tensor(state, "bias")
    return build(ReLU(), *W, b_enc=b_enc, b_dec=b_dec)


def _read_relu_new(state: dict[str, Any], trainer: dict[str, Any], *W: Tensor) -> SAE:
    b_enc, b_dec = need_tensor(state, "encoder.bias"), need_tensor(state, "decoder.bias")
    return build(ReLU(), *W, b_enc=b_enc, b_dec=b_dec, centred=False)


_READERS = {
    "AutoEncoderTopK": _read_topk,
    "BatchTopKSAE": _read_batchtopk,
    "MatryoshkaBatchTopKSAE": _read_matryoshka,
    "JumpReluAutoEncoder": _read_jumprelu,
    "GatedAutoEncoder": _read_gated,
    "AutoEncoder": _read_relu,
    "AutoEncoderNew": _read_relu_new,
}


# ---- write ----


def write(sae: SAE, folder: Path) -> None:
    """What `load_dictionary` reads; scales are folded into the weights.

    BatchTopK and Matryoshka keep their class where the score is h; other rules that track
    thresholds become JumpReluAutoEncoder. Where a class subtracts b_dec and the SAE does not, or
    the other way round, the encoder's bias takes that in.
    """
    if sae.config.is_transcoder:
        raise cannot("dictionary_learning", sae, "autoencoders")
    sae = unscaled(sae)
    name, state = _state(sae)
    trainer = {
        "trainer_class": None,
        "dict_class": name,
        "activation_dim": sae.config.d_in,
        "dict_size": sae.config.d_sae,
        "layer": None,
        "lm_name": None,
    }
    if "k" in state:
        trainer["k"] = int(state["k"])
    with (folder / WEIGHTS).open("wb") as file:
        torch.save({key: t.detach().cpu() for key, t in state.items()}, file)
        file.flush()
        os.fsync(file.fileno())
    write_json(folder / CONFIG, {"trainer": trainer, "buffer": {}})


def _state(sae: SAE) -> tuple[str, dict[str, Tensor]]:
    """The class and its state dict; matrices are views of the SAE's."""
    own, (rule, thresholds) = sae.config.selection, form_of_inference(sae)
    if thresholds is not None:
        theta = {"threshold": thresholds}
        if isinstance(own, BatchTopK | Matryoshka) and own.score == "activation":
            theta = {"threshold": thresholds[0].clone(), "k": _int32(own.k)}
            if isinstance(own, BatchTopK):
                return "BatchTopKSAE", {**_linear(sae), **theta}
            sizes = [b - a for a, b in pairwise([0, *own.ends(sae.config.d_sae)])]
            theta["group_sizes"] = torch.tensor(sizes)
            return "MatryoshkaBatchTopKSAE", {**_direct(sae, centred=True), **theta}
        return "JumpReluAutoEncoder", {**_direct(sae, centred=False), **theta}
    if isinstance(rule, TopK):
        if rule.score != "activation":
            sae = with_unit_rows(sae)
        never = {"k": _int32(rule.k), "threshold": torch.tensor(-1.0)}
        return "AutoEncoderTopK", {**_linear(sae), **never}
    state = _linear(sae)
    if isinstance(rule, ReLU):
        state["bias"] = state.pop("b_dec")
        return "AutoEncoder", state
    if isinstance(rule, Gated):
        own_state = dict(sae.selection_state.named_parameters())
        b_gate, r_mag = state.pop("encoder.bias"), own_state["r_mag"]
        moved = b_gate - bias_of(sae)
        state |= {"decoder_bias": state.pop("b_dec"), "gate_bias": b_gate, "r_mag": r_mag}
        state["mag_bias"] = own_state["b_mag"] + r_mag.exp() * moved
        return "GatedAutoEncoder", state
    raise cannot("dictionary_learning", sae, "topk, gated, relu, or thresholds")


def _int32(k: int) -> Tensor:
    return torch.tensor(k, dtype=torch.int32)


def _linear(sae: SAE) -> dict[str, Tensor]:
    return {
        "encoder.weight": sae.W_enc,
        "encoder.bias": bias_of(sae, centred=True),
        "decoder.weight": sae.W_dec.T,
        "b_dec": sae.b_dec,
    }


def _direct(sae: SAE, centred: bool) -> dict[str, Tensor]:
    b_enc = bias_of(sae, centred)
    return {"W_enc": sae.W_enc.T, "b_enc": b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
