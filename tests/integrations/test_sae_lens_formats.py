"""Our files in SAELens, and SAELens's files here: the same reconstruction."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from formats_cases import RULES, D, F, K, assert_same, example, reconstruction, tokens
from sae_lens import SAE as TheirSAE
from sae_lens import registry
from sae_lens.loading import pretrained_sae_loaders as loaders
from sae_lens.saes.sae import TrainingSAE, TrainStepInput
from safetensors.torch import load_file, save_file

import fastsae
from fastsae import formats
from fastsae.formats import sae_lens as sae_lens_format
from fastsae.selection import BatchTopK, Matryoshka, MutualChoice

REFUSED = {"group-topk", "transcoder-topk", "transcoder-topk-skip"}


@pytest.mark.parametrize("name", [name for name in RULES if name not in REFUSED])
def test_ours_in_theirs(name: str, tmp_path: Path) -> None:
    sae, x = example(name), tokens()
    formats.write(sae, tmp_path / "out", "sae_lens")
    theirs = TheirSAE.load_from_disk(tmp_path / "out")
    assert_same(theirs(x), reconstruction(sae, x))
    assert_same(reconstruction(fastsae.load(tmp_path / "out"), x), reconstruction(sae, x))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_ours_of_another_dtype(dtype: str, tmp_path: Path) -> None:
    sae, x = example("jumprelu", dtype), tokens()
    formats.write(sae, tmp_path / "out", "sae_lens")
    theirs = TheirSAE.load_from_disk(tmp_path / "out")
    assert theirs.W_enc.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    there = theirs(x.to(theirs.W_enc.dtype)).to(sae.W_dec.dtype)  # ours rounds its output
    assert (
        float((there - reconstruction(sae, x)).abs().max())
        <= 2 * float(there.abs().max()) * torch.finfo(there.dtype).eps + 1e-6
    )


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_they_cannot_express(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected what SAELens can express"):
        formats.write(example(name), tmp_path / "out", "sae_lens")
    assert not (tmp_path / "out").exists()


# ---- their inference models ----

INFERENCE = {
    "standard": {},
    "standard-raw": {"apply_b_dec_to_input": False},
    "gated": {},
    "gated-raw": {"apply_b_dec_to_input": False},
    "jumprelu": {},
    "topk": {"k": K},
    "topk-rescaled": {"k": K, "rescale_acts_by_decoder_norm": True},
    "abstopk": {"k": K},
    "abstopk-rescaled": {"k": K, "rescale_acts_by_decoder_norm": True},
    "transcoder": {"d_out": 7, "apply_b_dec_to_input": False},
    "skip_transcoder": {"d_out": 7, "apply_b_dec_to_input": False},
    "jumprelu_transcoder": {"d_out": 7, "apply_b_dec_to_input": False},
    "jumprelu_skip_transcoder": {"d_out": 7, "apply_b_dec_to_input": False},
}


@torch.no_grad()
def randomize(sae: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    for name, p in sae.named_parameters():
        p.copy_(0.3 * torch.randn(p.shape, generator=generator))
        if name == "threshold":
            p.abs_()


@pytest.mark.parametrize("name", INFERENCE)
def test_their_inference_model_here(name: str, tmp_path: Path) -> None:
    make, config = registry.get_sae_class(name.partition("-")[0])
    theirs = make(config(d_in=D, d_sae=F, **INFERENCE[name]))
    randomize(theirs)
    theirs.save_model(tmp_path)
    x = tokens()
    ours = fastsae.load(tmp_path)
    assert_same(reconstruction(ours, x), theirs(x))
    formats.write(ours, tmp_path / "again", "sae_lens")
    assert_same(TheirSAE.load_from_disk(tmp_path / "again")(x), theirs(x))


# ---- their training checkpoints ----

TRAINING = {
    "standard": {},
    "gated": {},
    "jumprelu": {"jumprelu_init_threshold": 0.3},
    "topk": {"k": K},
    "topk-plain": {"k": K, "rescale_acts_by_decoder_norm": False},
    "abstopk": {"k": K},
    "batchtopk": {"k": K},
    "batchtopk-plain": {"k": K, "rescale_acts_by_decoder_norm": False},
    "batchtopk-fraction": {"k": 3.5},
    "matryoshka_batchtopk": {"k": K, "matryoshka_widths": [12, 24]},
}
RULE_OF = {
    "batchtopk": BatchTopK,
    "batchtopk-plain": BatchTopK,
    "batchtopk-fraction": MutualChoice,
    "matryoshka_batchtopk": Matryoshka,
}


def trained(name: str, **extra: object) -> TrainingSAE:
    make, config = registry.get_sae_training_class(name.partition("-")[0])
    theirs = make(config(d_in=D, d_sae=F, **TRAINING[name], **extra))
    optimizer = torch.optim.Adam(theirs.parameters(), lr=1e-2)
    coefficients = {key: 1e-3 for key in theirs.get_coefficients()}
    for seed in range(20):
        step = TrainStepInput(tokens(seed), coefficients, None, seed, False)
        optimizer.zero_grad()
        theirs.training_forward_pass(step).loss.backward()
        optimizer.step()
    return theirs


@pytest.mark.parametrize("name", TRAINING)
def test_their_training_checkpoint_here(name: str, tmp_path: Path) -> None:
    """Against what they save for inference, which has their conversion to JumpReLU."""
    theirs, x = trained(name), tokens()
    theirs.save_model(tmp_path / "training")
    theirs.save_inference_model(tmp_path / "inference")
    expected = TheirSAE.load_from_disk(tmp_path / "inference")(x)
    assert_same(reconstruction(fastsae.load(tmp_path / "inference"), x), expected)
    ours = fastsae.load(tmp_path / "training")
    assert_same(reconstruction(ours, x), expected)
    if name in RULE_OF:
        assert type(ours.config.selection) is RULE_OF[name]
        assert float(theirs.topk_threshold) > 0
    else:
        assert_same(reconstruction(ours, x), theirs(x))


@pytest.mark.parametrize("name", ["topk", "batchtopk", "jumprelu"])
def test_their_scaled_checkpoint_here(name: str, tmp_path: Path) -> None:
    """Their trainer scales activations outside of the SAE, and folds the scale in at the end."""
    theirs, x = trained(name, normalize_activations="expected_average_only_in"), tokens()
    theirs.save_model(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match="expected_average_only_in: no SAE here does that"):
        fastsae.load(tmp_path / "checkpoint")
    scaler = {"scaling_factor": 1.7, "has_whitening": False}
    (tmp_path / "checkpoint" / "activation_scaler.json").write_text(json.dumps(scaler))
    ours = fastsae.load(tmp_path / "checkpoint")
    if name != "batchtopk":  # whose training model takes the whole batch
        assert_same(reconstruction(ours, x), theirs(1.7 * x) / 1.7)
    theirs.fold_activation_norm_scaling_factor(1.7)
    theirs.save_inference_model(tmp_path / "inference")
    assert_same(reconstruction(ours, x), TheirSAE.load_from_disk(tmp_path / "inference")(x))


def test_their_normalised_model_here(tmp_path: Path) -> None:
    make, config = registry.get_sae_class("jumprelu")
    theirs = make(config(d_in=D, d_sae=F, normalize_activations="layer_norm"))
    randomize(theirs)
    theirs.save_model(tmp_path)
    with pytest.raises(ValueError, match=r"layer_norm: .*--normalized"):
        fastsae.load(tmp_path)
    inner, x = formats.read(tmp_path, normalized=True), tokens()
    mean = x.mean(1, keepdim=True)
    deviation = (x - mean).std(1, keepdim=True)
    normal = (x - mean) / (deviation + 1e-5)
    assert_same(reconstruction(inner, normal) * deviation + mean, theirs(x))


# ---- our folders through their loaders ----


def test_their_disk_loader_reads_ours(tmp_path: Path) -> None:
    sae, x = example("batchtopk"), tokens()
    sae.save(tmp_path)
    theirs = TheirSAE.load_from_disk(tmp_path, converter=sae_lens_format.from_disk)
    assert_same(theirs(x), reconstruction(sae, x))
    theirs.save_model(tmp_path / "saved")


def test_their_hub_loader_reads_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sae, x = example("topk"), tokens()
    sae.save(tmp_path / "hub" / "layer_3")

    def download(repo_id: str, filename: str, **_: object) -> str:
        assert repo_id == "someone/saes"
        (tmp_path / "cache" / "layer_3").mkdir(parents=True, exist_ok=True)
        return str(shutil.copy(tmp_path / "hub" / filename, tmp_path / "cache" / filename))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    load = sae_lens_format.from_hub
    theirs = TheirSAE.from_pretrained("someone/saes", "layer_3", converter=load)
    assert_same(theirs(x), reconstruction(sae, x))
    low = TheirSAE.from_pretrained("someone/saes", "layer_3", converter=load, dtype="bfloat16")
    assert low.W_enc.dtype == torch.bfloat16


# ---- files of others that they read too ----


@torch.no_grad()
def through(loader: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **repo: str) -> TheirSAE:
    """What their loader makes of a folder, as if it came from the hub."""

    def download(repo_id: str, filename: str, subfolder: str = "", **_: object) -> str:
        return str(folder / Path(subfolder, filename).relative_to(repo["folder_name"]))

    def shapes(repo_id: str, filename: str) -> dict[str, list[int]]:
        tensors = load_file(download(repo_id, filename))
        return {name: list(t.shape) for name, t in tensors.items()}

    monkeypatch.setattr(loaders, "hf_hub_download", download)
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", shapes)
    load = loaders.NAMED_PRETRAINED_SAE_LOADERS[loader]
    cfg, state, _ = load(**repo, device="cpu", cfg_overrides={"dtype": "float32"})
    cfg |= {"d_in": state["W_enc"].shape[0], "d_sae": state["W_enc"].shape[1]}
    make, config = registry.get_sae_class(cfg["architecture"])
    theirs = make(config.from_dict(loaders.handle_config_defaulting(cfg)))
    theirs.load_state_dict(state)
    return theirs


def gemma_weights(d_out: int = D) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = {"w_enc": (D, F), "w_dec": (F, d_out), "b_enc": (F,), "b_dec": (d_out,)}
    found = {name: 0.3 * torch.randn(s, generator=generator) for name, s in shapes.items()}
    return {**found, "threshold": 0.3 * torch.rand(F, generator=generator)}


def test_gemma_scope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = {name.replace("w_", "W_"): t.numpy() for name, t in gemma_weights().items()}
    np.savez(tmp_path / "params.npz", **arrays)
    where = {"repo_id": "google/gemma-scope-2b-pt-res", "folder_name": "layer_3/width_16k/l0_9"}
    theirs, x = through("gemma_2", tmp_path, monkeypatch, **where), tokens()
    assert_same(reconstruction(fastsae.load(tmp_path), x), theirs(x))


@pytest.mark.parametrize("kind", ["resid_post", "transcoder_affine"])
def test_gemma_scope_2(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"architecture": "jump_relu", "model_name": "gemma-3-1b-pt"}
    config |= {"hf_hook_point_in": "model.layers.3.output"}
    tensors = gemma_weights()
    if kind == "transcoder_affine":
        config |= {"hf_hook_point_out": "model.layers.3.mlp.output", "affine_connection": True}
        tensors = {**gemma_weights(7), "affine_skip_connection": 0.3 * torch.ones(D, 7).cumsum(1)}
    save_file(tensors, tmp_path / "params.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    where = {"repo_id": "google/gemma-scope-2-1b-pt", "folder_name": f"{kind}/layer_3_width_16k"}
    theirs, x = through("gemma_3", tmp_path, monkeypatch, **where), tokens()
    assert_same(reconstruction(fastsae.load(tmp_path), x), theirs(x))


def test_llama_scope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With decoder rows of norm 1, which their loader takes for granted."""
    w = gemma_weights()
    rows = w["w_dec"] / w["w_dec"].norm(dim=1, keepdim=True)
    tensors = {"encoder.weight": w["w_enc"].T, "decoder.weight": rows.T}
    tensors |= {"encoder.bias": w["b_enc"], "decoder.bias": w["b_dec"]}
    (tmp_path / "checkpoints").mkdir()
    contiguous = {name: t.contiguous() for name, t in tensors.items()}
    save_file(contiguous, tmp_path / "checkpoints" / "final.safetensors")
    config = {"d_model": D, "d_sae": F, "act_fn": "jumprelu", "jump_relu_threshold": 0.2}
    config |= {"hook_point_in": "blocks.0.hook_resid_post", "norm_activation": "dataset-wise"}
    config |= {"dataset_average_activation_norm": {"in": 2.5, "out": 2.5}}
    (tmp_path / "hyperparams.json").write_text(json.dumps(config))
    theirs = through("llama_scope", tmp_path, monkeypatch, repo_id="fnlp/x", folder_name="L0R")
    theirs.fold_activation_norm_scaling_factor(D**0.5 / 2.5)  # as their from_pretrained does
    x = tokens()
    assert_same(reconstruction(fastsae.load(tmp_path), x), theirs(x))
