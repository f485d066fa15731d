"""Conversion to JumpReLU, and folded norms: the same function."""

import pytest
import torch
from common import backends, randn

from fastsae import SAE, SAEConfig, Selection, TopK
from fastsae.convert import to_jumprelu
from fastsae.selection import (
    AbsTopK,
    BatchTopK,
    FeatureChoice,
    Gated,
    JumpReLU,
    Matryoshka,
    ReLU,
)

N, D, F, K = 64, 10, 40, 4
WEIGHTED = "activation·decoder_norm"


def make(rule: Selection, norm: str = "free", backend: str | None = None, **config) -> SAE:
    sae = SAE(SAEConfig(D, F, rule, decoder_norm=norm, **config), backend=backend).train()
    with torch.no_grad():
        sae.b_enc.copy_(randn(F, seed=1) * 0.2)
        sae.b_dec.copy_(randn(D, seed=2) * 0.3)
        if norm == "free":
            sae.W_dec.mul_(torch.linspace(0.3, 2, F)[:, None])
    sae.input_scale.fill_(0.6)
    for seed in range(4):
        sae.losses(randn(N, D, seed=seed))
    return sae.eval()


RULES = [
    (BatchTopK(K, score=WEIGHTED), "free"),
    (BatchTopK(K), "unit"),
    (Matryoshka(K), "unit"),
    (FeatureChoice(K, warmup=0.0), "unit"),
]


@backends
@pytest.mark.parametrize(("rule", "norm"), RULES, ids=repr)
def test_tracked_thresholds_are_kept(rule: Selection, norm: str, backend: str) -> None:
    sae, x = make(rule, norm, backend), randn(500, D, seed=9)
    new = to_jumprelu(sae, x)
    assert isinstance(new.config.selection, JumpReLU) and new.input_scale == 1
    torch.testing.assert_close(new.W_dec.norm(dim=1), torch.ones(F))
    before, after = sae.encode(x), new.encode(x)
    different = (before.to_dense() > 0) != (after.to_dense() > 0)
    assert different.sum() <= 1  # at the threshold, up to rounding
    kept = ~different.any(1)
    torch.testing.assert_close(
        sae(x).reconstruction[kept], new(x).reconstruction[kept], rtol=0, atol=2e-5
    )


@backends
@pytest.mark.parametrize(("score", "norm"), [(WEIGHTED, "free"), ("activation", "unit")])
def test_topk_gets_the_threshold_of_a_sample(score: str, norm: str, backend: str) -> None:
    sae = make(TopK(K, score=score), norm, backend)
    x = randn(2000, D, seed=9)
    new = to_jumprelu(sae, x)
    active = new.encode(x).vals
    assert abs(len(active) - K * len(x)) <= 2 and (active > 0).all()
    held_out = new.encode(randn(2000, D, seed=10))
    assert abs(held_out.vals.numel() / 2000 - K) <= 0.05 * K
    theta = new.selection_state.log_threshold.exp()
    torch.testing.assert_close(theta, theta[:1].expand(F))  # one for all
    h = (x - new.b_dec) @ new.W_enc.T + new.b_enc
    assert int((h > theta).sum()) == pytest.approx(K * len(x), abs=2)


def test_a_converted_sae_is_saved(tmp_path) -> None:
    new = to_jumprelu(make(BatchTopK(K), "unit"))
    new.save(tmp_path)
    again, x = SAE.load(tmp_path), randn(300, D, seed=9)
    one, other = new.encode(x), again.encode(x)
    assert torch.equal(one.idx, other.idx) and torch.equal(one.vals, other.vals)


HOMOGENEOUS = [
    TopK(K, score=WEIGHTED),
    BatchTopK(K, score=WEIGHTED),
    JumpReLU(0.01, threshold=0.5),
    Gated(0.01),
    ReLU(0.01),
]


@backends
@pytest.mark.parametrize("rule", HOMOGENEOUS, ids=repr)
def test_folded_norms_keep_the_function(rule: Selection, backend: str) -> None:
    sae, x = make(rule, backend=backend), randn(200, D, seed=9)
    state = dict(sae.selection_state.named_parameters())
    with torch.no_grad():
        for name, p in state.items():
            p.add_(randn(F, seed=len(name)) * 0.1)
    codes, reconstruction = sae.encode(x), sae(x).reconstruction
    assert sae.fold_decoder_norm_() is sae
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(F))
    torch.testing.assert_close(sae(x).reconstruction, reconstruction, rtol=0, atol=2e-5)
    assert torch.equal(sae.encode(x).to_dense() > 0, codes.to_dense() > 0)


REFUSED = [
    (lambda: make(TopK(K)).fold_decoder_norm_(), "topk: expected score activation·decoder_norm"),
    (lambda: make(AbsTopK(K)).fold_decoder_norm_(), "abs-topk: folding the decoder's norms"),
    (lambda: to_jumprelu(make(TopK(K), "unit")), "x: expected tokens to choose the threshold on"),
    (lambda: to_jumprelu(make(AbsTopK(K), "unit")), "selection: expected TopK or a rule with"),
    (lambda: to_jumprelu(SAE(SAEConfig(D, F, BatchTopK(K)))), "selection: expected TopK or a rule"),
]


@pytest.mark.parametrize(("make_it", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_refusals(make_it, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_it()
