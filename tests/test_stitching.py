"""Stitched SAEs against dense arithmetic, and meta-SAEs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from common import randn
from torch import Tensor

from fastsae import SAE, SAEConfig, Selection, TopK, metrics
from fastsae.data import open_source
from fastsae.meta import made_of
from fastsae.stitching import added_error, relate, stitch, stitching_figures
from fastsae.sums import unit_rows
from fastsae.train import TrainConfig, Trainer


def sae_of(f: int, seed: int, rule: str = "topk", scale: float = 1.0) -> SAE:
    parameters = {"k": 3} if rule == "topk" else {}
    sae = SAE(SAEConfig(8, f, Selection.from_dict({"name": rule, **parameters})), seed=seed)
    with torch.no_grad():
        sae.b_dec.copy_(0.1 * randn(8, seed=seed + 7))
        sae.input_scale.fill_(scale)
    sae(randn(64, 8, seed=1))
    return sae


def dense(sae: SAE, x: Tensor) -> Tensor:
    return sae.encode(x, training=False).to_dense().detach()


@pytest.mark.parametrize("rule", ["topk", "jumprelu"])
def test_stitched_reconstructions(rule: str) -> None:
    small, large = sae_of(12, 0, rule, 0.5), sae_of(40, 1, scale=2.0)
    x = randn(50, 8, seed=3)
    everything, nothing = torch.ones(12, dtype=torch.bool), torch.zeros(40, dtype=torch.bool)
    small.eval(), large.eval()
    torch.testing.assert_close(
        stitch(small, large, x, everything, nothing), small(x).reconstruction
    )
    torch.testing.assert_close(
        stitch(small, large, x, ~everything, ~nothing), large(x).reconstruction
    )
    of_small, of_large = torch.arange(12) % 3 > 0, torch.arange(40) % 4 > 0
    expected = (dense(small, x) * of_small @ small.W_dec + 0.25 * small.b_dec) / 0.5
    expected = expected + (dense(large, x) * of_large @ large.W_dec + 0.75 * large.b_dec) / 2
    torch.testing.assert_close(stitch(small, large, x, of_small, of_large), expected.detach())


def test_relation_of_latents() -> None:
    small, large = sae_of(12, 0), sae_of(40, 1)
    with torch.no_grad():
        large.W_dec[5] = 3 * small.W_dec[2]
        large.W_dec[9] = -small.W_dec[4]
    found = relate(small, large, 0.6)
    cosines = unit_rows(large.W_dec) @ unit_rows(small.W_dec).T
    torch.testing.assert_close(found.cosines, cosines.max(1).values.clamp(min=0))
    there = found.cosines > 0
    assert torch.equal(found.nearest[there].long(), cosines.argmax(1)[there])
    assert torch.equal(found.novel, cosines.max(1).values <= 0.6)
    assert torch.equal(found.replaced, cosines.max(0).values > 0.6)
    assert not found.novel[5] and found.nearest[5] == 2 and found.replaced[2]


@pytest.mark.parametrize("rule", ["topk", "jumprelu"])
def test_what_one_latent_adds(rule: str) -> None:
    small, large = sae_of(12, 0, "topk", 0.5), sae_of(20, 1, rule, 2.0)
    x = randn(60, 8, seed=3)
    got = added_error(small, large, open_source(x), batch_size=25)
    codes, rest = dense(large, x), x - small.eval()(x).reconstruction
    for latent in range(20):
        added = codes[:, latent : latent + 1] * large.W_dec[latent] / 2
        change = ((rest - added).square().sum() - rest.square().sum()).item()
        assert float(got[latent]) == pytest.approx(
            change / float((x - x.mean(0)).square().sum()), abs=1e-6
        )


def test_figures_of_an_sae_that_has_the_small_one_and_more() -> None:
    """Data of 12 directions; the small SAE knows 8 of them, the large one all."""
    directions = torch.linalg.qr(randn(16, 16))[0][:12]
    generator = torch.Generator().manual_seed(5)
    on = torch.rand(400, 12, generator=generator) < 0.25
    x = (on * (1 + torch.rand(400, 12, generator=generator))) @ directions
    saes = []
    for f in (8, 12):
        sae = SAE(SAEConfig(16, f, TopK(f)))
        with torch.no_grad():
            sae.W_dec.copy_(directions[:f])
            sae.W_enc.copy_(directions[:f])
        saes.append(sae.eval())
    found = stitching_figures(*saes, open_source(x), batch_size=64)
    assert found.novel == 4 and found.replaced == 8
    assert found.novel_helping == 1 and found.reconstruction_helping == 0
    assert found.fvu_small == pytest.approx(metrics.fvu(x, saes[0](x).reconstruction), abs=1e-5)
    assert found.fvu_small > 0.2 and found.fvu_large < 1e-5
    assert found.fvu_novel_added < 1e-5
    assert found.fvu_reconstruction_added > found.fvu_small + 0.2  # said twice
    assert found.fvu_reconstruction_swapped == pytest.approx(found.fvu_small, abs=1e-5)
    same = stitching_figures(saes[0], saes[0], open_source(x))
    assert same.novel == 0 and same.novel_helping is None


def test_refused() -> None:
    small, other = sae_of(12, 0), SAE(SAEConfig(9, 12, TopK(3)))
    transcoder = SAE(SAEConfig(8, 12, TopK(3), d_out=5))
    for arguments, message in (
        ((small, other), "large: expected width 8, got 9"),
        ((transcoder, small), "small: expected an autoencoder, got a transcoder"),
        ((small, small, 1.0), r"threshold: expected a number in \(0, 1\), got 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            relate(*arguments)


# ---- meta-SAEs ----


def test_a_meta_sae_finds_what_rows_are_made_of(tmp_path: Path) -> None:
    parts = torch.linalg.qr(randn(24, 24))[0][:6]
    pairs = [(i, j) for i in range(6) for j in range(6) if i < j]
    sae = SAE(SAEConfig(24, 120, TopK(3)))
    with torch.no_grad():
        for row in range(120):
            i, j = pairs[row % len(pairs)]
            sae.W_dec[row] = (2 + row) * (parts[i] + parts[j])
    sae.save(tmp_path)
    source = open_source(f"decoder:{tmp_path}")
    assert source.n_rows == 120 and source.d_in == 24
    torch.testing.assert_close(source.rows(np.arange(120)), unit_rows(sae.W_dec))
    meta = SAE(SAEConfig(24, 6, TopK(2)), seed=2)
    settings = TrainConfig(steps=400, batch_size=60, lr=1e-2, b_dec="zero")
    Trainer(meta, source, settings).run(progress=False)
    places = (unit_rows(meta.W_dec) @ parts.T).argmax(1)
    found = made_of(meta, sae, 17)
    assert {int(places[i]) for i, _ in found} == set(pairs[17 % 15])
    weights = [weight for _, weight in found]
    assert weights == sorted(weights, reverse=True)
    assert weights == pytest.approx([0.5**0.5] * 2, abs=0.1)
    with pytest.raises(ValueError, match="latent: expected 0 to 119, got 120"):
        made_of(meta, sae, 120)


def test_decoder_rows_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sae.safetensors: no such file"):
        open_source(f"decoder:{tmp_path}")
