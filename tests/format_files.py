"""Files of every format, as their libraries write them, made from the specification in float64.

Each maker writes into a folder and returns its library's forward pass in a few lines of torch.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import randn
from safetensors.torch import save_file
from torch import Tensor

D, F, K = 4, 20, 3  # √D is exact
Forward = Callable[[Tensor], Tensor]


def random(*shape: int, seed: int = 0) -> Tensor:
    return 0.5 * randn(*shape, seed=seed).double()


W_ENC, W_DEC = random(D, F, seed=1), random(F, D, seed=2)
B_ENC, B_DEC = random(F, seed=3), random(D, seed=4)
THETA, R_MAG, B_MAG = random(F, seed=5).abs(), random(F, seed=6), random(F, seed=7)
W_OUT, B_OUT, W_SKIP = random(F, 5, seed=8), random(5, seed=9), random(5, D, seed=10)
NORM = W_DEC.norm(dim=1)
UNIT = W_DEC / NORM[:, None]


def topk(h: Tensor, k: int = K) -> Tensor:
    values, ids = h.topk(k, dim=1)
    return torch.zeros_like(h).scatter(1, ids, values.relu())


def jump(h: Tensor, theta: Tensor | float) -> Tensor:
    return h.relu() * (h > theta)


def gated(x: Tensor) -> Tensor:
    open_ = (x @ W_ENC + B_ENC > 0).double()
    return open_ * (x @ (W_ENC * R_MAG.exp()) + B_MAG).relu()


# ---- SAELens ----

BASE = {"W_enc": W_ENC, "W_dec": W_DEC, "b_enc": B_ENC, "b_dec": B_DEC}
ACROSS = {"W_enc": W_ENC, "W_dec": W_OUT, "b_enc": B_ENC, "b_dec": B_OUT}
SIX = {"d_in": D, "d_sae": F, "normalize_activations": "none", "apply_b_dec_to_input": True}
SIX |= {"metadata": {"sae_lens_version": "6.54.12"}}


def sae_lens(folder: Path, architecture: str | None, tensors: dict = BASE, **cfg: object) -> None:
    save_file(
        {name: t.contiguous() for name, t in tensors.items()}, folder / "sae_weights.safetensors"
    )
    named = {} if architecture is None else {"architecture": architecture}
    (folder / "cfg.json").write_text(json.dumps({**SIX, **named, **cfg}))


def pre(x: Tensor, shift: Tensor = B_DEC) -> Tensor:
    return (x - shift) @ W_ENC + B_ENC


def sae_lens_standard(folder: Path) -> Forward:
    sae_lens(folder, "standard")
    return lambda x: pre(x).relu() @ W_DEC + B_DEC


def sae_lens_raw(folder: Path) -> Forward:
    sae_lens(folder, "standard", apply_b_dec_to_input=False)
    return lambda x: pre(x, 0 * B_DEC).relu() @ W_DEC + B_DEC


def sae_lens_before_6(folder: Path) -> Forward:
    old = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "hook_point": "a"}
    old |= {"normalize_activations": False, "sae_lens_training_version": None, "metadata": None}
    scale = {"scaling_factor": torch.ones(F, dtype=torch.float64)}
    sae_lens(folder, None, BASE | scale, **old)
    return lambda x: topk(pre(x)) @ W_DEC + B_DEC


def sae_lens_topk(folder: Path) -> Forward:
    sae_lens(folder, "topk", k=K, rescale_acts_by_decoder_norm=True)
    return lambda x: (topk(pre(x) * NORM) / NORM) @ W_DEC + B_DEC


def sae_lens_abstopk(folder: Path) -> Forward:
    sae_lens(folder, "abstopk", k=K, rescale_acts_by_decoder_norm=True)

    def forward(x: Tensor) -> Tensor:
        h = pre(x) * NORM
        ids = h.abs().topk(K).indices
        return (torch.zeros_like(h).scatter(1, ids, h.gather(1, ids)) / NORM) @ W_DEC + B_DEC

    return forward


def sae_lens_jumprelu(folder: Path) -> Forward:
    theta = THETA - 0.2  # some are negative
    sae_lens(folder, "jumprelu", BASE | {"threshold": theta})
    return lambda x: jump(pre(x), theta) @ W_DEC + B_DEC


def sae_lens_log_threshold(folder: Path) -> Forward:
    sae_lens(folder, "jumprelu", BASE | {"log_threshold": THETA.log()})
    return lambda x: jump(pre(x), THETA) @ W_DEC + B_DEC


def sae_lens_gated(folder: Path) -> Forward:
    own = {"W_enc": W_ENC, "W_dec": W_DEC, "b_dec": B_DEC, "b_gate": B_ENC}
    sae_lens(folder, "gated", own | {"r_mag": R_MAG, "b_mag": B_MAG})
    return lambda x: gated(x - B_DEC) @ W_DEC + B_DEC


def sae_lens_batchtopk(folder: Path) -> Forward:
    theta = torch.tensor(0.4, dtype=torch.float64)
    sae_lens(
        folder,
        "batchtopk",
        BASE | {"topk_threshold": theta},
        k=K,
        rescale_acts_by_decoder_norm=True,
    )
    return lambda x: (jump(pre(x) * NORM, theta) / NORM) @ W_DEC + B_DEC


def sae_lens_scaled(folder: Path) -> Forward:
    """A checkpoint of a training whose activations its trainer multiplies by 1.7."""
    theta = torch.tensor(0.4, dtype=torch.float64)
    (folder / "activation_scaler.json").write_text(
        '{"scaling_factor": 1.75, "has_whitening": false}'
    )
    own = {"k": 2.5, "normalize_activations": "expected_average_only_in"}
    sae_lens(folder, "batchtopk", BASE | {"topk_threshold": theta}, **own)
    return lambda x: (jump(pre(1.75 * x), theta) @ W_DEC + B_DEC) / 1.75


def sae_lens_matryoshka(folder: Path) -> Forward:
    theta = torch.tensor(0.4, dtype=torch.float64)
    sae_lens(
        folder,
        "matryoshka_batchtopk",
        BASE | {"topk_threshold": theta},
        k=K,
        matryoshka_widths=[5, 10],
    )
    return lambda x: jump(pre(x), theta) @ W_DEC + B_DEC


def sae_lens_transcoder(folder: Path) -> Forward:
    sae_lens(folder, "transcoder", ACROSS, apply_b_dec_to_input=False, d_out=5)
    return lambda x: (x @ W_ENC + B_ENC).relu() @ W_OUT + B_OUT


def sae_lens_jumprelu_skip(folder: Path) -> Forward:
    own = ACROSS | {"W_skip": W_SKIP, "threshold": THETA}
    sae_lens(folder, "jumprelu_skip_transcoder", own, apply_b_dec_to_input=False, d_out=5)
    return lambda x: jump(x @ W_ENC + B_ENC, THETA) @ W_OUT + B_OUT + x @ W_SKIP.T


# ---- dictionary_learning ----

LINEAR = {"encoder.weight": W_ENC.T, "encoder.bias": B_ENC, "decoder.weight": W_DEC.T}
DIRECT = {"W_enc": W_ENC, "W_dec": W_DEC, "b_enc": B_ENC, "b_dec": B_DEC}


def pickled(folder: Path, name: str | None, **state: object) -> None:
    torch.save(state, folder / "ae.pt")
    if name is not None:
        trainer = {"dict_class": name, "activation_dim": D, "dict_size": F, "k": K}
        (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))


def dl_topk(folder: Path) -> Forward:
    k, theta = torch.tensor(K, dtype=torch.int32), torch.tensor(0.1)
    pickled(folder, "AutoEncoderTopK", **LINEAR, b_dec=B_DEC, k=k, threshold=theta)
    return lambda x: topk(pre(x).relu()) @ W_DEC + B_DEC


def dl_batchtopk(folder: Path) -> Forward:
    pickled(folder, "BatchTopKSAE", **LINEAR, b_dec=B_DEC, threshold=torch.tensor(0.4))
    return lambda x: jump(pre(x), 0.4) @ W_DEC + B_DEC


def dl_batchtopk_new(folder: Path) -> Forward:
    pickled(folder, "BatchTopKSAE", **LINEAR, b_dec=B_DEC, threshold=torch.tensor(-1.0))
    return lambda x: jump(pre(x), -1) @ W_DEC + B_DEC


def dl_matryoshka(folder: Path) -> Forward:
    own = {"group_sizes": torch.tensor([4, 6, 10]), "threshold": torch.tensor(0.4)}
    pickled(folder, None, **DIRECT, k=torch.tensor(K, dtype=torch.int32), **own)
    return lambda x: jump(pre(x), 0.4) @ W_DEC + B_DEC


def dl_jumprelu(folder: Path) -> Forward:
    pickled(folder, None, **DIRECT, threshold=THETA)
    return lambda x: jump(x @ W_ENC + B_ENC, THETA) @ W_DEC + B_DEC


def dl_gated(folder: Path) -> Forward:
    own = {"encoder.weight": W_ENC.T, "decoder.weight": W_DEC.T, "decoder_bias": B_DEC}
    pickled(folder, None, **own, gate_bias=B_ENC, mag_bias=B_MAG, r_mag=R_MAG)
    return lambda x: gated(x - B_DEC) @ W_DEC + B_DEC


def dl_autoencoder(folder: Path) -> Forward:
    pickled(folder, None, **LINEAR, bias=B_DEC)
    return lambda x: pre(x).relu() @ W_DEC + B_DEC


def dl_autoencoder_new(folder: Path) -> Forward:
    pickled(folder, None, **LINEAR, **{"decoder.bias": B_DEC})
    return lambda x: (x @ W_ENC + B_ENC).relu() @ W_DEC + B_DEC


# ---- sparsify ----


def sparsify(folder: Path, skip: bool = False, **cfg: object) -> None:
    tensors = {"encoder.weight": W_ENC.T, "encoder.bias": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC}
    if skip:
        tensors["W_skip"] = W_ENC[:, :D]
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "sae.safetensors")
    base = {"k": K, "num_latents": F, "d_in": D, "skip_connection": skip}
    (folder / "cfg.json").write_text(json.dumps({**base, **cfg}))


def sparsify_topk(folder: Path) -> Forward:
    sparsify(folder, activation="topk", normalize_decoder=True)
    return lambda x: topk(pre(x).relu()) @ W_DEC + B_DEC


def sparsify_groupmax(folder: Path) -> Forward:
    sparsify(folder, activation="groupmax", k=4)

    def forward(x: Tensor) -> Tensor:
        acts = pre(x).relu().unflatten(1, (4, -1))
        best = acts.argmax(2, keepdim=True)
        return (torch.zeros_like(acts).scatter(2, best, acts.gather(2, best))).flatten(
            1
        ) @ W_DEC + B_DEC

    return forward


def sparsify_transcode(folder: Path) -> Forward:
    sparsify(folder, skip=True, transcode=True)
    return lambda x: topk((x @ W_ENC + B_ENC).relu()) @ W_DEC + B_DEC + x @ W_ENC[:, :D].T


def sparsify_skip(folder: Path) -> Forward:
    sparsify(folder, skip=True, transcode=False, num_latents=0, expansion_factor=3)
    return lambda x: topk(pre(x).relu()) @ W_DEC + B_DEC + x @ W_ENC[:, :D].T


# ---- OpenMOSS ----


def llamascopium(
    folder: Path, act_fn: str, out: str = "a", pt: bool = False, **cfg: object
) -> None:
    tensors = {"W_E": W_ENC, "W_D": W_DEC, "b_E": B_ENC, "b_D": B_DEC}
    tensors["activation_function.log_jumprelu_threshold"] = THETA.log()
    for hook, norm in {"a": 4.0, out: 4.0 if out == "a" else 0.5}.items():
        tensors[f"dataset_average_activation_norm.{hook}"] = torch.tensor(norm)
    if pt:
        torch.save({"sae": tensors, "version": "2"}, folder / "sae_weights.pt")
    else:
        save_file(tensors, folder / "sae_weights.safetensors")
    hooks = {"hook_point_in": "a", "hook_point_out": out, "sae_type": "sae"}
    base = {"act_fn": act_fn, "d_model": D, "expansion_factor": F / D, "top_k": K}
    (folder / "config.json").write_text(json.dumps({**base, **hooks, **cfg}))


S_IN, S_OUT = math.sqrt(D) / 4, math.sqrt(D) / 0.5


def llamascopium_jumprelu(folder: Path) -> Forward:
    llamascopium(folder, "jumprelu", norm_activation="dataset-wise")

    def forward(x: Tensor) -> Tensor:
        h = (S_IN * x) @ W_ENC + B_ENC
        return (h * (h * NORM > THETA) @ W_DEC + B_DEC) / S_IN

    return forward


def llamascopium_transcoder(folder: Path) -> Forward:
    own = {"norm_activation": "dataset-wise", "sparsity_include_decoder_norm": False}
    llamascopium(folder, "topk", "b", pt=True, **own)
    return lambda x: (topk((S_IN * x) @ W_ENC + B_ENC) @ W_DEC + B_DEC) / S_OUT


def llamascopium_inference(folder: Path) -> Forward:
    llamascopium(folder, "topk", norm_activation="inference", use_decoder_bias=False)
    return lambda x: (topk((x @ W_ENC + B_ENC) * NORM) / NORM) @ W_DEC


def llama_scope(folder: Path, **cfg: object) -> None:
    (folder / "checkpoints").mkdir()
    tensors = {**LINEAR, "decoder.bias": B_DEC}
    tensors = {name: t.contiguous() for name, t in tensors.items()}
    save_file(tensors, folder / "checkpoints" / "final.safetensors")
    norms = {"dataset_average_activation_norm": {"in": 4.0, "out": 4.0}}
    base = {"act_fn": "jumprelu", "jump_relu_threshold": 0.3, "norm_activation": "dataset-wise"}
    base |= {"d_model": D, "d_sae": F, "hook_point_in": "a", "hook_point_out": "a", "top_k": K}
    (folder / "hyperparams.json").write_text(json.dumps({**base, **norms, **cfg}))


def folded_llama_scope(x: Tensor, s_in: float, s_out: float) -> Tensor:
    """The authors' loader: fold the scales, then the decoder's norms, then compare."""
    W_dec, b_enc, b_dec = W_DEC * s_in / s_out, B_ENC / s_in, B_DEC / s_out
    norm = W_dec.norm(dim=1)
    h = (x @ W_ENC + b_enc) * norm
    return h * (h > 0.3) @ (W_dec / norm[:, None]) + b_dec


def llama_scope_sae(folder: Path) -> Forward:
    llama_scope(folder)
    return lambda x: folded_llama_scope(x, S_IN, S_IN)


def llama_scope_transcoder(folder: Path) -> Forward:
    norms = {"in": 4.0, "out": 0.5}
    llama_scope(folder, hook_point_out="b", dataset_average_activation_norm=norms)
    return lambda x: folded_llama_scope(x, S_IN, S_OUT)


def llama_scope_topk(folder: Path) -> Forward:
    llama_scope(folder, act_fn="topk", jump_relu_threshold=0.0)
    return lambda x: ((topk((S_IN * x @ W_ENC + B_ENC) * NORM) / NORM) @ W_DEC + B_DEC) / S_IN


# ---- Gemma Scope, OpenAI ----


def gemma_scope(folder: Path) -> Forward:
    arrays = {name: t.numpy() for name, t in (DIRECT | {"threshold": THETA}).items()}
    np.savez(folder / "params.npz", **arrays)
    return lambda x: jump(x @ W_ENC + B_ENC, THETA) @ W_DEC + B_DEC


def gemma_scope_2(folder: Path) -> Forward:
    own = {name.lower(): t for name, t in (DIRECT | {"threshold": THETA}).items()}
    save_file(own, folder / "params.safetensors")
    (folder / "config.json").write_text('{"architecture": "jump_relu", "hf_hook_point_in": "a"}')
    return lambda x: jump(x @ W_ENC + B_ENC, THETA) @ W_DEC + B_DEC


def gemma_scope_2_transcoder(folder: Path) -> Forward:
    own = {name.lower(): t for name, t in (ACROSS | {"threshold": THETA}).items()}
    own["affine_skip_connection"] = W_SKIP.T.contiguous()
    save_file(own, folder / "params.safetensors")
    hooks = {"architecture": "jump_relu", "hf_hook_point_in": "a", "hf_hook_point_out": "b"}
    (folder / "config.json").write_text(json.dumps(hooks))
    return lambda x: jump(x @ W_ENC + B_ENC, THETA) @ W_OUT + B_OUT + x @ W_SKIP.T


def openai(folder: Path) -> Forward:
    own = {"encoder.weight": W_ENC.T, "decoder.weight": W_DEC.T, "latent_bias": B_ENC}
    buffers = {"stats_last_nonzero": torch.zeros(F, dtype=torch.int64)}
    names = {"activation": "ReLU", "activation_state_dict": {}}
    torch.save({"pre_bias": B_DEC, **own, **buffers, **names}, folder / "7.pt")
    return lambda x: pre(x).relu() @ W_DEC + B_DEC


CASES: dict[str, list[Callable[[Path], Forward]]] = {
    "sae_lens": [
        sae_lens_standard,
        sae_lens_raw,
        sae_lens_before_6,
        sae_lens_topk,
        sae_lens_abstopk,
        sae_lens_jumprelu,
        sae_lens_log_threshold,
        sae_lens_gated,
        sae_lens_batchtopk,
        sae_lens_scaled,
        sae_lens_matryoshka,
        sae_lens_transcoder,
        sae_lens_jumprelu_skip,
    ],
    "dictionary_learning": [
        dl_topk,
        dl_batchtopk,
        dl_batchtopk_new,
        dl_matryoshka,
        dl_jumprelu,
        dl_gated,
        dl_autoencoder,
        dl_autoencoder_new,
    ],
    "sparsify": [sparsify_topk, sparsify_groupmax, sparsify_transcode, sparsify_skip],
    "llamascopium": [llamascopium_jumprelu, llamascopium_transcoder, llamascopium_inference],
    "llama_scope": [llama_scope_sae, llama_scope_transcoder, llama_scope_topk],
    "gemma_scope": [gemma_scope],
    "gemma_scope_2": [gemma_scope_2, gemma_scope_2_transcoder],
    "openai": [openai],
}
