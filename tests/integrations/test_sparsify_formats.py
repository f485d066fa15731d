"""Our files in sparsify, and its files here: the same reconstruction."""

import os
from pathlib import Path

import pytest
import torch

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its kernels need a GPU

from formats_cases import RULES, D, F, K, assert_same, example, reconstruction, tokens
from sparsify import SparseCoder, SparseCoderConfig

import fastsae
from fastsae import formats

WRITTEN = {name for name in RULES if "topk" in name or name == "temporal-mask"}
WRITTEN -= {"batchtopk", "batchtopk-weighted", "abs-topk"}


@pytest.mark.parametrize("name", sorted(WRITTEN))
def test_ours_in_theirs(name: str, tmp_path: Path) -> None:
    sae, x = example(name), tokens()
    formats.write(sae, tmp_path / "out", "sparsify")
    theirs = SparseCoder.load_from_disk(tmp_path / "out")
    assert_same(theirs(x).sae_out, reconstruction(sae, x))
    assert_same(reconstruction(fastsae.load(tmp_path / "out"), x), reconstruction(sae, x))


@pytest.mark.parametrize("name", sorted(set(RULES) - WRITTEN))
def test_what_they_cannot_express(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sparsify"):
        formats.write(example(name), tmp_path / "out", "sparsify")
    assert not (tmp_path / "out").exists()


def test_half_precision_keeps_the_function(tmp_path: Path) -> None:
    sae, x = example("topk", "bfloat16"), tokens()
    formats.write(sae, tmp_path / "out", "sparsify")
    theirs = SparseCoder.load_from_disk(tmp_path / "out")
    assert theirs.dtype == torch.float32  # as the folded scale made the biases
    expected = reconstruction(sae, x)  # rounded to bfloat16
    error = (theirs(x).sae_out - expected).abs()
    assert bool((error <= 2**-8 * expected.abs() + 1e-6).all())


def test_half_precision_without_a_scale_stays_half(tmp_path: Path) -> None:
    sae = example("topk", "bfloat16")
    sae.input_scale.fill_(1)
    formats.write(sae, tmp_path / "out", "sparsify")
    theirs = SparseCoder.load_from_disk(tmp_path / "out")
    assert torch.equal(theirs.encoder.weight, sae.W_enc) and torch.equal(theirs.b_dec, sae.b_dec)


SETTINGS = {
    "topk": {},
    "topk-free": {"normalize_decoder": False},
    "groupmax": {"activation": "groupmax"},
    "multi-topk": {"multi_topk": True},
    "expansion": {"num_latents": 0, "expansion_factor": 4},
    "transcode": {"transcode": True},
    "transcode-skip": {"transcode": True, "skip_connection": True},
    "skip": {"skip_connection": True},
}


@torch.no_grad()
@pytest.mark.parametrize("name", SETTINGS)
def test_theirs_here(name: str, tmp_path: Path) -> None:
    config = SparseCoderConfig(**{"k": K, "num_latents": F, **SETTINGS[name]})
    theirs, generator = SparseCoder(D, config), torch.Generator().manual_seed(3)
    for p in theirs.parameters():
        p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    theirs.save_to_disk(tmp_path / "layers.3")
    ours, x = fastsae.load(tmp_path / "layers.3"), tokens()
    expected = theirs.decode(*theirs.encode(x)[:2])  # its forward returns 4k of Multi-TopK
    if theirs.W_skip is not None:
        expected = expected + x @ theirs.W_skip.T
    assert_same(reconstruction(ours, x), expected)
    formats.write(ours, tmp_path / "again", "sparsify")
    again = SparseCoder.load_from_disk(tmp_path / "again")
    again.cfg.multi_topk = False
    assert_same(again(x).sae_out, expected)
