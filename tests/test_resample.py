"""New starts of dead latents: which, where, and what the optimiser forgets."""

import pytest
import torch
from common import randn

from fastsae import SAE, SAEConfig, Selection, TopK
from fastsae.data import open_source
from fastsae.optim import Adam
from fastsae.resample import resample_dead_
from fastsae.selection import FeatureChoice, Gated, TemporalMask
from fastsae.train import TrainConfig, Trainer

N, D, F, K = 64, 12, 48, 4
DEAD = [3, 10, 47]


def trained(**config) -> tuple[SAE, Adam, torch.Tensor]:
    sae = SAE(SAEConfig(D, F, TopK(K), dead_after=1000, **config))
    adam = Adam(sae.parameters(), unit_rows=[sae.W_dec])
    x = randn(N, D, seed=1) + 2
    adam.zero_grad()
    target = randn(N, config["d_out"], seed=2) if "d_out" in config else None
    sae.train().losses(x, target).loss.backward()
    adam.step()
    sae.tokens_since_fired[DEAD] = 1000
    return sae, adam, x


@pytest.mark.parametrize("config", [{}, {"d_out": 7}], ids=["autoencoder", "transcoder"])
def test_dead_latents_point_at_tokens_and_the_rest_stays(config: dict) -> None:
    sae, adam, x = trained(**config)
    sae.input_scale.fill_(0.5)
    target = randn(N, 7, seed=2) if config else None
    before = {n: p.detach().clone() for n, p in sae.named_parameters()}
    assert resample_dead_(sae, adam, x, target, seed=5) == len(DEAD)
    live = torch.ones(F, dtype=torch.bool)
    live[DEAD] = False
    centre = 0 if config else sae.b_dec.detach()
    directions = torch.nn.functional.normalize(x * 0.5 - centre, dim=1)
    rows = sae.W_enc.detach()[DEAD]
    norm = 0.2 * before["W_enc"][live].norm(dim=1).mean()
    torch.testing.assert_close(rows.norm(dim=1), norm.expand(len(DEAD)))
    cosine = torch.nn.functional.normalize(rows, dim=1) @ directions.T
    token = cosine.argmax(1)
    torch.testing.assert_close(cosine.max(1).values, torch.ones(len(DEAD)))
    assert token.unique().numel() == len(DEAD)
    outputs = x * 0.5 if target is None else target * sae.output_scale
    wanted = torch.nn.functional.normalize((outputs - sae.b_dec).detach(), dim=1)[token]
    torch.testing.assert_close(sae.W_dec.detach()[DEAD], wanted)
    assert (sae.b_enc[DEAD] == 0).all()
    for name in ("W_enc", "W_dec", "b_enc"):
        p = getattr(sae, name)
        assert torch.equal(p.detach()[live], before[name][live])
        for moment in ("exp_avg", "exp_avg_sq"):
            assert (adam.state[p][moment][DEAD] == 0).all()
            assert adam.state[p][moment][live].abs().sum() > 0
    assert torch.equal(sae.b_dec, before["b_dec"])
    assert (sae.tokens_since_fired[DEAD] == 0).all()


def test_badly_reconstructed_tokens_are_preferred() -> None:
    sae, adam, x = trained()
    x[5:] = sae.b_dec.detach()  # reconstructed exactly, or nearly
    drawn = set()
    for seed in range(8):
        sae.tokens_since_fired[DEAD] = 1000
        resample_dead_(sae, adam, x, seed=seed)
        rows = torch.nn.functional.normalize(sae.W_enc.detach()[DEAD], dim=1)
        directions = torch.nn.functional.normalize(x - sae.b_dec.detach(), dim=1)
        drawn |= set((rows @ directions.T).argmax(1).tolist())
    assert drawn <= set(range(5)) and len(drawn) > 2


def test_tokens_in_parts_give_the_same_errors() -> None:
    found = []
    for parts in (1, 3, N):
        sae, adam, x = trained(d_out=7)
        seen: list[int] = []
        losses = sae.losses
        sae.losses = lambda x, *a, seen=seen, losses=losses, **k: (  # type: ignore[method-assign]
            seen.append(len(x)) or losses(x, *a, **k)
        )
        assert resample_dead_(sae, adam, x, randn(N, 7, seed=2), seed=5, parts=parts) == len(DEAD)
        assert sum(seen) == N and max(seen) == -(-N // parts)
        found.append([p.detach().clone() for p in sae.parameters()])
    for other in found[1:]:
        assert all(torch.equal(p, q) for p, q in zip(found[0], other, strict=True))


def test_nothing_dead_nothing_changes() -> None:
    sae, adam, x = trained()
    sae.tokens_since_fired.zero_()
    before = [p.detach().clone() for p in sae.parameters()]
    assert resample_dead_(sae, adam, x) == 0
    assert resample_dead_(sae, adam, x[:0]) == 0
    assert all(torch.equal(p, b) for p, b in zip(sae.parameters(), before, strict=True))


def test_the_trainer_resamples_on_schedule() -> None:
    def dead_after(every: int | None) -> float:
        sae = SAE(SAEConfig(D, F, TopK(2), dead_after=128, auxk_coef=0.0))
        with torch.no_grad():
            sae.b_enc[:20] = -100
        config = TrainConfig(steps=40, batch_size=64, lr=1e-3, resample_every=every)
        Trainer(sae, open_source(randn(500, D, seed=1)), config).run(progress=False)
        return float((sae.b_enc < -50).sum())

    assert dead_after(None) == 20
    assert dead_after(10) == 0
    with pytest.raises(ValueError, match="resample_every: expected at least 1, got 0"):
        TrainConfig(resample_every=0)


@pytest.mark.parametrize("rule", [Gated(), FeatureChoice(K), TemporalMask(K)], ids=repr)
def test_what_the_rule_holds_of_a_dead_latent_starts_anew(rule: Selection) -> None:
    sae = SAE(SAEConfig(D, F, rule, dead_after=1000)).train()
    adam = Adam(sae.parameters(), unit_rows=[sae.W_dec])
    fresh = {n: t.clone() for n, t in sae.selection_state.state_dict().items()}
    adam.zero_grad()
    sae.losses(randn(N, D, seed=1)).loss.backward()
    adam.step()
    with torch.no_grad():
        for t in sae.selection_state.state_dict().values():
            t += 1
    sae.tokens_since_fired[DEAD] = 1000
    resample_dead_(sae, adam, randn(N, D, seed=2))
    live = torch.ones(F, dtype=torch.bool)
    live[DEAD] = False
    started_anew = 0
    for name, t in sae.selection_state.state_dict().items():
        if t.ndim and name != "rate":
            assert torch.equal(t[DEAD], fresh[name][DEAD]), name
            assert not torch.equal(t[live], fresh[name][live]), name
            started_anew += 1
    assert started_anew
    for p in sae.selection_state.parameters():
        assert (adam.state[p]["exp_avg"][DEAD] == 0).all() and p.ndim == 1
