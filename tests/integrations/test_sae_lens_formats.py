"""Our files in SAELens, and SAELens's files here: the same reconstruction."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from formats_cases import RULES, D, F, K, assert_same, example, reconstruction, tokens
from sae_lens import SAE as TheirSAE
from sae_lens import registry
from sae_lens.saes.sae import TrainingSAE, TrainStepInput

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
    with pytest.raises(ValueError, match="expected_average_only_in of each token"):
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
    with pytest.raises(ValueError, match=r"layer_norm of each token: .*--normalized"):
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
