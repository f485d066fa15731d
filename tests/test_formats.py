"""SAEs of every format against what their libraries compute; what is written, read back."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from common import randn, refusals
from format_files import (
    B_DEC,
    CASES,
    DIRECT,
    LINEAR,
    THETA,
    W_DEC,
    D,
    F,
    Forward,
    K,
    openai,
    pickled,
    pre,
    topk,
)
from safetensors.torch import load_file, save_file
from test_convert import make as trained

import fastsae
from fastsae import SAE, SAEConfig, TopK, formats
from fastsae.cli import main
from fastsae.formats import WRITABLE
from fastsae.formats.writing import unscaled
from fastsae.selection import (
    AbsTopK,
    BatchTopK,
    FeatureChoice,
    Gated,
    GradientTopK,
    GroupTopK,
    JumpReLU,
    Matryoshka,
    MutualChoice,
    ReLU,
    TemporalMask,
)

N = 200
EVERY = [pytest.param(name, make, id=make.__name__) for name in CASES for make in CASES[name]]
makers = pytest.mark.parametrize(("name", "make"), EVERY)


def source(folder: Path, name: str) -> Path:
    """What a user names: the folder, or the file where a format has but one."""
    return next(folder.glob("*.pt")) if name == "openai" else folder


@makers
def test_a_file_means_what_its_library_computes(
    name: str, make: Callable[[Path], Forward], tmp_path: Path
) -> None:
    forward, x = make(tmp_path), randn(N, D, seed=20).double()
    path = source(tmp_path, name)
    assert formats.guess(path) == name
    sae = fastsae.load(path)
    assert not sae.training and sae.config.dtype == "float64"
    got = sae(x).reconstruction
    expected = forward(x)
    assert expected.std() > 0.05
    atol = 2e-6 if "gated" in make.__name__ else 1e-9  # r_mag and b_mag are float32
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)
    torch.testing.assert_close(sae.decode(sae.encode(x), x), expected, rtol=0, atol=atol)


@makers
def test_it_can_be_trained_on_and_saved(
    name: str, make: Callable[[Path], Forward], tmp_path: Path
) -> None:
    """No tensor is left on the meta device or in the file, and each is as SAE makes it."""
    make(tmp_path)
    sae = fastsae.load(source(tmp_path, name))
    fresh = SAE(sae.config)
    for (key, t), (_, other) in zip(
        [*sae.named_parameters(), *sae.named_buffers()],
        [*fresh.named_parameters(), *fresh.named_buffers()],
        strict=True,
    ):
        assert t.shape == other.shape and t.dtype == other.dtype, key
        assert t.device.type == "cpu" and t.is_contiguous(), key
        assert t.requires_grad == other.requires_grad, key
    for file in [f for f in tmp_path.rglob("*") if f.is_file()]:
        file.write_bytes(b"\0" * file.stat().st_size)  # in place: nothing may be mapped from it
    assert all(bool(p.any()) for p in (sae.W_enc, sae.W_dec))
    sae.train()
    target = None if not sae.config.is_transcoder else randn(N, sae.b_dec.numel()).double()
    sae.losses(randn(N, D).double(), target).loss.backward()
    assert bool(sae.W_enc.grad.any()) and bool(sae.W_dec.grad.isfinite().all())
    sae.save(tmp_path / "ours")
    assert SAE.load(tmp_path / "ours").config == sae.config


def test_rules_that_files_name(tmp_path: Path) -> None:
    found = {}
    for name in ("sae_lens", "dictionary_learning"):
        for make in CASES[name]:
            folder = tmp_path / make.__name__
            folder.mkdir()
            make(folder)
            found[make.__name__] = fastsae.load(folder).config.selection
    assert found["sae_lens_batchtopk"] == BatchTopK(K, score="activation·decoder_norm")
    assert found["sae_lens_scaled"] == MutualChoice(2.5)
    shares = (0.25, 0.25, 0.5)
    assert found["sae_lens_matryoshka"] == Matryoshka(K, groups=shares, bias_term=False)
    assert found["dl_matryoshka"] == Matryoshka(K, groups=(0.2, 0.3, 0.5), bias_term=False)
    assert found["dl_batchtopk"] == BatchTopK(K)


def test_keys_that_two_classes_share(tmp_path: Path) -> None:
    pickled(tmp_path, None, **LINEAR, b_dec=B_DEC, k=torch.tensor(K), threshold=torch.tensor(0.1))
    with pytest.raises(ValueError, match=r"ae\.pt|config.json: expected one beside the weights"):
        fastsae.load(tmp_path)


def test_a_checkpoint_uses_the_configuration_above(tmp_path: Path) -> None:
    pickled(tmp_path, "BatchTopKSAE", **LINEAR, b_dec=B_DEC, threshold=torch.tensor(0.2))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "ae.pt").rename(tmp_path / "checkpoints" / "ae_100.pt")
    sae = fastsae.load(tmp_path / "checkpoints" / "ae_100.pt")
    assert sae.config.selection == BatchTopK(K)


def test_normalised_tokens_are_asked_for(tmp_path: Path) -> None:
    openai(tmp_path)
    state = torch.load(tmp_path / "7.pt")
    state |= {"activation": "TopK", "activation_state_dict": {"k": K, "postact_fn": "ReLU"}}
    torch.save(state, tmp_path / "7.pt")
    with pytest.raises(ValueError, match=r"7\.pt: TopK: normalisation of each token: .*--norm"):
        fastsae.load(tmp_path / "7.pt")
    sae = formats.read(tmp_path / "7.pt", normalized=True)
    assert sae.config.selection == TopK(K)
    x = randn(N, D).double()
    expected = topk(pre(x)) @ W_DEC + B_DEC
    torch.testing.assert_close(sae(x).reconstruction, expected, rtol=0, atol=1e-9)


def test_mixed_dtypes_become_the_widest(tmp_path: Path) -> None:
    own = {name: t.float() for name, t in (DIRECT | {"threshold": THETA}).items()}
    own |= {"W_enc": own["W_enc"].bfloat16(), "W_dec": own["W_dec"].bfloat16()}
    low = {name.lower(): t.contiguous() for name, t in own.items()}
    save_file(low, tmp_path / "params.safetensors")
    sae = fastsae.load(tmp_path)
    assert sae.config.dtype == "float32" and sae.W_enc.dtype == torch.float32
    low |= {name: t.bfloat16() for name, t in low.items() if name.startswith("b_")}
    save_file(low, tmp_path / "params.safetensors")
    sae = fastsae.load(tmp_path)
    assert sae.config.dtype == "bfloat16" and torch.equal(sae.W_dec, own["W_dec"])
    assert sae.selection_state.log_threshold.dtype == torch.float32


# ---- writing ----

WEIGHTED = "activation·decoder_norm"
RULES = [
    (TopK(4), "unit", {}, {"sae_lens", "dictionary_learning", "sparsify"}),
    (TopK(4, score=WEIGHTED), "free", {}, {"sae_lens", "dictionary_learning", "sparsify"}),
    (
        TopK(4),
        "free",
        {"apply_b_dec_to_input": False},
        {"sae_lens", "dictionary_learning", "sparsify"},
    ),
    (TemporalMask(4), "unit", {}, {"sae_lens", "dictionary_learning", "sparsify"}),
    (AbsTopK(4), "unit", {}, {"sae_lens"}),
    (GroupTopK(4), "unit", {}, {"sparsify"}),
    (BatchTopK(4), "unit", {}, {"sae_lens", "dictionary_learning"}),
    (BatchTopK(4, score=WEIGHTED), "free", {}, {"sae_lens", "dictionary_learning"}),
    (MutualChoice(2.5), "unit", {}, {"sae_lens", "dictionary_learning"}),
    (Matryoshka(4), "unit", {}, {"sae_lens", "dictionary_learning"}),
    (FeatureChoice(4, warmup=0.0), "unit", {}, {"sae_lens", "dictionary_learning"}),
    (JumpReLU(threshold=0.5), "free", {}, {"sae_lens", "dictionary_learning"}),
    (Gated(), "unit", {"apply_b_dec_to_input": False}, {"sae_lens", "dictionary_learning"}),
    (ReLU(), "unit", {}, {"sae_lens", "dictionary_learning"}),
]


def name_of_part(value: object) -> str:
    """Sets have no order that two processes share, and these must collect the same names."""
    return ", ".join(sorted(value)) if isinstance(value, set) else str(value)[:60]


@pytest.mark.parametrize("target", WRITABLE)
@pytest.mark.parametrize(("rule", "norm", "config", "known"), RULES, ids=name_of_part)
def test_what_is_written_is_the_same_function(
    rule, norm, config, known: set[str], target: str, tmp_path: Path
) -> None:
    sae = trained(rule, norm, dtype="float64", backend="reference", **config)
    before = {name: t.clone() for name, t in sae.state_dict().items()}
    folder = tmp_path / "not" / "there"
    if target in known | {"fastsae"}:
        formats.write(sae, folder, target)
        assert formats.guess(folder) == target
        x = randn(N, 10, seed=9).double()
        again = fastsae.load(folder)
        torch.testing.assert_close(
            again(x).reconstruction, sae(x).reconstruction, rtol=0, atol=1e-6
        )
        assert [path.name for path in folder.parent.iterdir()] == ["there"]
    else:
        with pytest.raises(ValueError, match=r"selection: expected what .* can express"):
            formats.write(sae, folder, target)
        assert not list(tmp_path.rglob("there*"))
    assert all(torch.equal(t, before[name]) for name, t in sae.state_dict().items())


REFUSED = [
    (lambda: SAE(SAEConfig(D, F, BatchTopK(K))), "sae_lens", "expected trained thresholds, got a"),
    (lambda: SAE(SAEConfig(D, F, TopK(K), d_out=5)), "sparsify", "d_out: expected d_in = 4 for"),
    (lambda: SAE(SAEConfig(D, F, TopK(K), d_out=D)), "sae_lens", "got a transcoder with topk"),
    (
        lambda: SAE(SAEConfig(D, F, ReLU(), d_out=D)),
        "dictionary_learning",
        "a transcoder with relu",
    ),
    (
        lambda: SAE(SAEConfig(D, F, TopK(K))),
        "gemma_scope",
        "expected one of fastsae, sae_lens, dict",
    ),
    (
        lambda: SAE(SAEConfig(D, F, TopK(K))),
        "onnx",
        "format: expected one of fastsae, .*, got 'onnx'",
    ),
]


@refusals(("make", "target", "message"), REFUSED)
def test_refusals(make: Callable[[], SAE], target: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        formats.write(make(), tmp_path / "out", target)
    assert not list(tmp_path.iterdir())


def test_gradient_topk_is_topk_at_inference(tmp_path: Path) -> None:
    formats.write(SAE(SAEConfig(D, F, GradientTopK(K))), tmp_path / "out", "sparsify")
    assert fastsae.load(tmp_path / "out").config.selection == TopK(K)


def test_big_matrices_are_shared_and_the_scale_is_exact() -> None:
    sae = trained(TopK(4), "unit", dtype="bfloat16")
    new = unscaled(sae)
    assert new.W_enc.data_ptr() == sae.W_enc.data_ptr() != 0
    assert new.W_dec.data_ptr() == sae.W_dec.data_ptr()
    assert new.b_dec.dtype == torch.float32  # a folded scale is not rounded to bfloat16
    torch.testing.assert_close(new.b_dec, sae.b_dec.float() / sae.input_scale)
    assert unscaled(new).b_dec.data_ptr() == new.b_dec.data_ptr()


@pytest.mark.parametrize("there", ["file", "folder", "link"])
def test_nothing_is_overwritten(there: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if there == "file":
        out.write_text("precious")
    elif there == "folder":
        out.mkdir()
        (out / "precious").write_text("precious")
    else:
        out.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="out: expected a new"):
        formats.write(SAE(SAEConfig(D, F, TopK(K))), out, "sae_lens")
    assert there == "link" or "precious" in [
        f.read_text() for f in [out, *out.glob("*")] if f.is_file()
    ]
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("target", WRITABLE)
def test_a_failed_write_leaves_nothing(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        formats.write(SAE(SAEConfig(D, F, TopK(K))), out, target)
    assert os.listdir(tmp_path) == ["out"] and not os.listdir(out)
    monkeypatch.undo()
    formats.write(SAE(SAEConfig(D, F, TopK(K))), out, target)  # an empty folder is no obstacle
    assert fastsae.load(out).config.d_sae == F


# ---- guessing, loading, the command ----


def test_guess_refuses_none_and_several(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"expected the files of a format .*params\.npz.*, got none"
    ):
        formats.guess(tmp_path)
    with pytest.raises(ValueError, match="nowhere: no such file or folder"):
        fastsae.load(tmp_path / "nowhere")
    for target in ("fastsae", "sparsify"):
        formats.write(SAE(SAEConfig(D, F, TopK(K))), tmp_path / target, target)
    shutil.copytree(tmp_path / "fastsae", tmp_path / "sparsify", dirs_exist_ok=True)
    with pytest.raises(ValueError, match="expected one format, got the files of fastsae, sparsify"):
        fastsae.load(tmp_path / "sparsify")
    assert formats.read(tmp_path / "sparsify", "fastsae").config.selection == TopK(K)


def test_convert_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sae = SAE(SAEConfig(D, F, TopK(K)), seed=3)
    sae.save(tmp_path / "ours")
    monkeypatch.chdir(tmp_path)
    main(["convert", "ours", "out", "--to", "sae_lens"])
    assert "ours (fastsae) → out (sae_lens)" in capsys.readouterr().out
    tensors = load_file(tmp_path / "out" / "sae_weights.safetensors")
    assert torch.equal(tensors["W_enc"], sae.W_enc.T) and torch.equal(tensors["W_dec"], sae.W_dec)
    cfg = json.loads((tmp_path / "out" / "cfg.json").read_text())
    assert cfg["architecture"] == "topk" and cfg["k"] == K
    for arguments, message in [
        (("ours", "out", "--to", "sae_lens"), "out: expected a new or empty folder"),
        (("out", "b", "--from", "sparsify"), "out: expected a file sae.safetensors, got none"),
        (("out", "b", "--from", "tar"), "format: expected one of fastsae"),
        (("nowhere", "b"), "nowhere: no such file or folder"),
    ]:
        with pytest.raises(SystemExit) as stop:
            main(["convert", *arguments])
        assert message in str(stop.value.code) and len(str(stop.value.code).splitlines()) == 1
        assert not (tmp_path / "b").exists()
