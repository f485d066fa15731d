"""AuxK in its published variants, and losses on nested prefixes, against direct float64 sums."""

import pytest
import torch
from common import backends, randn
from torch import Tensor

from fastsae import SAE, SAEConfig, TopK
from fastsae.losses import AUXK
from fastsae.selection import Matryoshka, Selection

N, D, F, K = 31, 10, 40, 3


def make(backend: str, rule: Selection | None = None, **config) -> SAE:
    sae = SAE(
        SAEConfig(D, F, rule or TopK(K), decoder_norm="free", dead_after=100, **config),
        backend=backend,
    ).train()
    with torch.no_grad():
        sae.b_enc.copy_(randn(F, seed=1) * 0.3)
        sae.b_dec.copy_(randn(D, seed=2) * 0.3)
    sae.tokens_since_fired[::3] = 10_000
    return sae


def dead_and_leaves(sae: SAE, x: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
    """Which latents are dead in this step, float64 copies of the weights, z and h."""
    leaves = {n: p.detach().double().requires_grad_() for n, p in sae.named_parameters()}
    h = (x.double() - leaves["b_dec"]) @ leaves["W_enc"].T + leaves["b_enc"]
    kept = torch.zeros_like(h).scatter(1, h.topk(K).indices, 1.0)
    z = h.relu() * kept
    fired = (z > 0).any(0)
    dead = (sae.tokens_since_fired + N >= 100) & ~fired
    return dead, leaves, z, h


@backends
@pytest.mark.parametrize("variant", AUXK)
@pytest.mark.parametrize("k_aux", [4, 1000])
def test_auxk_is_the_variants_sum(variant: str, k_aux: int, backend: str) -> None:
    sae, x = make(backend, auxk=variant, auxk_coef=0.5, k_aux=k_aux), randn(N, D, seed=3)
    dead, p, z, h = dead_and_leaves(sae, x)
    out = sae.losses(x)
    out.loss.backward()

    x_hat = z @ p["W_dec"] + p["b_dec"]
    e = x.double() - x_hat
    best = h.where(dead, -torch.inf).topk(min(k_aux, int(dead.sum())))
    z_aux = torch.zeros_like(h).scatter(1, best.indices, best.values.relu())
    e_hat = z_aux @ p["W_dec"]
    raw = torch.zeros_like(h).scatter(1, best.indices, best.values) @ p["W_dec"]
    held = e.detach()
    variance = (held - held.mean(0)).square().sum()
    total = (x.double() - x.double().mean(0)).square().sum()
    share = min(int(dead.sum()) / k_aux, 1)
    with_bias = (e_hat + p["b_dec"] - held).square()
    expected = {
        "dictionary_learning": (e_hat - held).square().sum() / variance,
        "openai": (e_hat + p["b_dec"] - held - p["b_dec"].detach()).square().sum() / variance,
        "bussmann": (e_hat - e).square().mean(),
        "sparsify": share * with_bias.sum() / total,
        "saelens": share * (raw + p["b_dec"] - held).square().mean(),
    }[variant]
    torch.testing.assert_close(out.losses["auxk"].double(), expected, rtol=2e-5, atol=0)
    (e.square().mean() + 0.5 * expected).backward()
    for name, q in sae.named_parameters():
        error = (q.grad.double() - p[name].grad).abs().max()
        assert error <= 2e-5 * p[name].grad.abs().max(), name
    assert p["W_enc"].grad[dead].abs().sum() > 0  # 6: it reaches the dead latents' rows


@backends
@pytest.mark.parametrize("variant", AUXK)
def test_no_dead_latent_no_auxk(variant: str, backend: str) -> None:
    """6: the same loss and gradients as without it."""
    results = []
    for coefficient in (0.5, 0.0):
        sae = make(backend, auxk=variant, auxk_coef=coefficient)
        sae.tokens_since_fired.zero_()
        sae.config.__dict__["dead_after"] = 10**9
        out = sae.losses(randn(N, D, seed=3))
        out.loss.backward()
        results.append([out.loss, *(p.grad for p in sae.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_saelens_auxk_keeps_negative_values_of_bfloat16_weights_too(bias: bool) -> None:
    config = {"auxk": "saelens", "k_aux": D, "dtype": "bfloat16", "encoder_bias": bias}
    sae = SAE(SAEConfig(D, F, TopK(K), dead_after=100, auxk_coef=1.0, **config)).train()  # type: ignore[arg-type]
    dead, tokens = torch.arange(0, F, 3, dtype=torch.int32), randn(N, D, seed=3)
    found = []
    sae._error = lambda codes, *rest: found.append(codes) or (torch.zeros(()),)  # type: ignore
    sae._auxk(tokens, tokens, torch.zeros(()), tokens, dead, len(dead))
    h = tokens.double() @ sae.W_enc.double().T
    best = h[:, dead.long()].topk(D).values
    assert best.min() < -0.1
    torch.testing.assert_close(found[0].vals.double(), best, rtol=0, atol=2e-6)


RULES = [
    TopK(6, nested=(1, 2, 4)),
    Matryoshka(4, groups=(0.25, 0.25, 0.5)),
    Matryoshka(4, groups=(0.1, 0.9), bias_term=False),
]


@backends
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_nested_losses_are_means_over_prefixes(rule: Selection, backend: str) -> None:
    sae, x = make(backend, rule, auxk_coef=0.0), randn(N, D, seed=3)
    codes = sae.encode(x)
    p = {n: t.detach().double().requires_grad_() for n, t in sae.named_parameters()}
    h = (x.double() - p["b_dec"]) @ p["W_enc"].T + p["b_enc"]
    prefixes: list[Tensor] = []
    if isinstance(rule, Matryoshka):
        mask = codes.to_dense() > 0
        prefixes = [mask & (torch.arange(F) < end) for end in rule.ends(F)]
        if rule.bias_term:
            prefixes = [torch.zeros_like(mask), *prefixes]
    else:
        for k in (*rule.nested, rule.k):  # type: ignore[attr-defined]
            kept = torch.zeros(N, F, dtype=torch.bool)
            first = codes.idx[:, :k]
            kept.scatter_(1, first.clamp(min=0).long(), first >= 0)
            prefixes.append(kept)
    errors = [(h * m) @ p["W_dec"] + p["b_dec"] - x.double() for m in prefixes]
    expected = sum(e.square().mean() for e in errors) / len(errors)
    out = sae.losses(x, reconstruct=True)
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        out.losses["mse"].double(), errors[-1].square().mean(), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(
        out.reconstruction.double(), errors[-1] + x.double(), rtol=1e-5, atol=1e-5
    )
    out.loss.backward()
    expected.backward()
    for name, q in sae.named_parameters():
        error = (q.grad.double() - p[name].grad).abs().max()
        assert error <= 1e-5 * p[name].grad.abs().max(), name
    sae.eval()
    assert "nested" not in sae.losses(x).losses


def test_unknown_variant() -> None:
    with pytest.raises(
        ValueError, match=r"auxk: expected one of dictionary_learning, .*got 'ghost'"
    ):
        SAEConfig(D, F, TopK(K), auxk="ghost")
