"""Every selection rule, on every backend, in a whole SAE: one suite against the float64 reference.

Rules and their conformance tests: the numbers in names are those of the list in docs/selection.md.
"""

import functools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from aot import interpreted
from torch import Tensor

from fastsae import SAE, Codes, SAEConfig, Selection, TopK
from fastsae.data import open_source
from fastsae.selection import (
    AbsTopK,
    BatchTopK,
    Call,
    FeatureChoice,
    Gated,
    GradientTopK,
    GroupTopK,
    JumpReLU,
    Matryoshka,
    MutualChoice,
    ReLU,
    Selected,
    State,
    TemporalMask,
    zipf_budgets,
)
from fastsae.train import TrainConfig, Trainer, evaluate

N, D, F, K = 23, 12, 48, 4

RULES: dict[str, Selection] = {
    "topk": TopK(K),
    "topk-weighted": TopK(K, score="activation·decoder_norm"),
    "topk-annealed": TopK(K, anneal=0.9),
    "topk-nested": TopK(K, nested=(1, 2)),
    "abs-topk": AbsTopK(K),
    "group-topk": GroupTopK(K),
    "gradient-topk": GradientTopK(K),
    "batchtopk": BatchTopK(K),
    "batchtopk-weighted": BatchTopK(K, score="activation·decoder_norm"),
    "mutual-choice": MutualChoice(K + 0.5),
    "matryoshka": Matryoshka(K, groups=(0.25, 0.25, 0.5)),
    "matryoshka-no-bias": Matryoshka(K, groups=(0.25, 0.75), bias_term=False),
    "feature-choice": FeatureChoice(K, warmup=0.0),
    "temporal-mask": TemporalMask(K, warmup=0.0, rate=1.0),
    "temporal-mask-batch": TemporalMask(K, base="batchtopk", warmup=0.0, rate=1.0),
    "jumprelu": JumpReLU(0.01, threshold=0.7, bandwidth=0.5),
    "jumprelu-target": JumpReLU(0.01, l0_target=3.0, threshold=0.7, bandwidth=0.5),
    "jumprelu-tanh": JumpReLU(0.01, loss="tanh", threshold=0.7, bandwidth=0.5),
    "jumprelu-pre-act": JumpReLU(0.01, threshold=0.7, bandwidth=0.5, pre_act_coef=0.3),
    "gated": Gated(0.01, l0=4.0),
    "relu": ReLU(0.01, l0=4.0, decoder_norm_weighted=True),
    "relu-annealed": ReLU(0.01, p_end=0.2, anneal_start=0.1, warmup=0.5),
}
# With few pairs that matter they are stored; with many the latents are taken in blocks.
PER_PAIR = [name for name, rule in RULES.items() if rule.k_name == "l0"]
RULES |= {f"{name}-sparse": replace(RULES[name], warmup=0.35) for name in PER_PAIR}  # type: ignore[type-var]
SPARSE_BIAS = -2.6
ALL = pytest.mark.parametrize("name", RULES)
BACKENDS = pytest.mark.parametrize("backend", ["cpu", "triton"])


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(rule: Selection, backend: str, dtype: str = "float32", **config: object) -> SAE:
    """An SAE with biases, decoder rows of many norms and a state that earlier steps left."""
    sae = SAE(
        SAEConfig(D, F, rule, decoder_norm="free", dtype=dtype, **config),  # type: ignore[arg-type]
        backend=backend,
    )
    with torch.no_grad():
        sae.b_enc.copy_(randn(F, seed=1) * 0.2)  # type: ignore[union-attr]
        sae.b_dec.copy_(randn(D, seed=2) * 0.2)
        sae.W_dec.mul_(0.5 + torch.rand(F, 1, generator=torch.Generator().manual_seed(3)))
        sae.W_enc.add_(randn(F, D, seed=4) * 0.1)
        if getattr(rule, "warmup", None) == 0.35:
            sae.b_enc.add_(SPARSE_BIAS)  # type: ignore[union-attr]
    if getattr(rule, "pre_act_coef", 0):
        sae.tokens_since_fired += sae.config.dead_after
    sae.progress = 0.4
    return sae.train()


def inputs(seed: int = 5) -> tuple[Tensor, Tensor]:
    """Tokens of many norms, so that a batch's budget is spent unevenly, and gradients."""
    return randn(N, D, seed=seed) * torch.linspace(0.3, 2, N)[:, None], randn(N, D, seed=seed + 50)


def two_steps(name: str, backend: str, dtype: str) -> dict[str, Tensor]:
    """What a second training step returns and leaves behind, and the codes of inference."""
    return run_two_steps(make(RULES[name], backend, dtype))


def run_two_steps(sae: SAE) -> dict[str, Tensor]:
    for seed in (5, 6):
        sae.zero_grad()
        x, g = inputs(seed)
        x.requires_grad_()
        out = sae.losses(x, None, g, reconstruct=True)
        out.loss.backward()
    found = {f"loss {name}": value.detach() for name, value in out.losses.items()}
    found |= {"loss": out.loss.detach(), "reconstruction": out.reconstruction.detach()}
    found |= {"l0": out.metrics["l0"], "n_dead": out.metrics["n_dead"], "dx": x.grad}
    found |= {f"d{n}": p.grad for n, p in sae.named_parameters()}
    found |= {f"state {n}": t.detach().clone() for n, t in sae.selection_state.named_buffers()}
    codes = sae.eval().encode(inputs(7)[0])
    return found | {"inference": codes.to_dense().detach()}


@functools.cache
def expected(name: str, dtype: str) -> dict[str, Tensor]:
    sae = make(RULES[name], "reference", dtype)
    wide = make(RULES[name], "reference", "float64")
    wide.load_state_dict(sae.state_dict())
    return run_two_steps(wide)


@ALL
@BACKENDS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_is_the_references(name: str, backend: str, dtype: str) -> None:
    run = interpreted if backend == "triton" else (lambda function, *args: function(*args))
    found, wanted = run(two_steps, name, backend, dtype), expected(name, dtype)
    assert found.keys() == wanted.keys()
    for key, value in found.items():
        # A gradient of bfloat16 weights is rounded to bfloat16; sums are in float32.
        rounded = dtype == "bfloat16" and key.startswith("d") and key != "dx"
        tolerance = 2**-6 if rounded else 2e-5
        error = (value.double() - wanted[key].double()).abs().max()
        assert error <= tolerance * max(1e-2, float(wanted[key].abs().max())), key


@ALL
def test_bits_of_cpu_codes_are_those_of_a_permuted_batch(name: str) -> None:
    order = torch.randperm(N, generator=torch.Generator().manual_seed(3))
    sae = make(RULES[name], "cpu")
    x, g = inputs()
    codes = sae.encode(x, g).to_dense()
    assert torch.equal(sae.encode(x[order], g[order]).to_dense(), codes[order])


@ALL
def test_codes_are_valid_and_only_training_moves_the_state(name: str) -> None:
    sae = make(RULES[name], "cpu")
    x, g = inputs()
    before = {n: t.clone() for n, t in sae.selection_state.named_buffers()}
    sae.encode(x, g).validate()
    sae.eval()
    sae.encode(x).validate()
    sae(x, None, g)
    for key, value in sae.selection_state.named_buffers():
        assert torch.equal(value, before[key]), key
    sae.train()
    sae(x, None, g)
    after = dict(sae.selection_state.named_buffers())
    assert not before or any(not torch.equal(after[key], before[key]) for key in before)


@ALL
def test_a_fitted_encoder_scales_codes_to_the_best_reconstruction(name: str) -> None:
    x = inputs()[0]
    plain, fitted = make(RULES[name], "cpu"), make(RULES[name], "cpu")
    plain.initialize_from_(x)
    fitted.initialize_from_(x, fit_encoder=True)
    before, after = (sae.encode(x, training=False).to_dense() for sae in (plain, fitted))
    factor = float((after * before).sum() / before.square().sum())
    assert factor > 0 and abs(factor - 1) > 0.05
    torch.testing.assert_close(after, factor * before, rtol=1e-4, atol=1e-5)
    decoded = after @ fitted.W_dec
    rest = x * fitted.input_scale - fitted.b_dec - decoded
    assert abs(float((decoded * rest).sum())) < 1e-4 * float(decoded.square().sum())


@ALL
def test_rules_are_plain_data_and_their_state_is_saved(name: str, tmp_path) -> None:
    rule = RULES[name]
    assert Selection.from_dict(rule.to_dict()) == rule
    sae = make(rule, "cpu")
    for seed in (5, 6, 7):
        x, g = inputs(seed)
        sae.losses(x, None, g)
    sae.eval().save(tmp_path)
    again = SAE.load(tmp_path)
    one, other = sae.encode(x), again.encode(x)
    assert torch.equal(one.vals, other.vals) and torch.equal(one.idx, other.idx)


@ALL
@pytest.mark.parametrize("n", [0, 1])
def test_a_batch_of_no_or_one_token(name: str, n: int) -> None:
    sae = make(RULES[name], "cpu")
    x, g = (t[:n] for t in inputs())
    out = sae(x, None, g)
    out.loss.backward()
    assert (out.codes is None or out.codes.n_tokens == n) and out.reconstruction.shape == (n, D)
    assert all(torch.isfinite(p.grad).all() for p in sae.parameters() if p.grad is not None)
    sae.eval()
    assert sae.encode(x).n_tokens == n


@ALL
def test_nothing_positive_selects_nothing(name: str) -> None:
    if name == "abs-topk":  # keeps negative values
        return
    sae = make(RULES[name], "cpu")
    with torch.no_grad():
        sae.b_enc.fill_(-1e4)  # type: ignore[union-attr]
    x, g = inputs()
    out = sae(x, None, g)
    assert (out.codes.idx < 0).all() and out.metrics["l0"] == 0
    out.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in sae.parameters() if p.grad is not None)
    sae.eval()
    assert (sae.encode(x).idx < 0).all()


@pytest.mark.parametrize("name", PER_PAIR)
def test_both_forms_of_a_per_pair_rule_are_reached(name: str) -> None:
    x, g = inputs()
    assert make(RULES[name], "cpu").losses(x, None, g).codes is None
    out = make(RULES[f"{name}-sparse"], "cpu").losses(x, None, g)
    assert out.codes is not None and out.metrics["l0"] > 0


@pytest.mark.parametrize("name", ["topk", "batchtopk", "matryoshka", "feature-choice"])
def test_folded_scales_keep_the_function(name: str) -> None:
    """10: the scale of the data folds into weights and state."""
    sae = make(RULES[name], "cpu")
    sae.input_scale.fill_(0.37)
    for seed in (5, 6, 7):
        x, g = inputs(seed)
        sae.losses(x, None, g)
    sae.eval()
    x = inputs(8)[0]
    before, codes = sae(x).reconstruction, sae.encode(x)
    sae.fold_scale_()
    torch.testing.assert_close(sae(x).reconstruction, before, rtol=0, atol=2e-5)
    assert torch.equal(sae.encode(x).idx, codes.idx)


# ---- rules that contain each other ----


def codes_of(rule: Selection, backend: str = "cpu", **config: object) -> Codes:
    x, g = inputs()
    return make(rule, backend, **config).encode(x, g)


def losses_of(rule: Selection) -> tuple[Tensor, dict[str, Tensor]]:
    x, g = inputs()
    sae = make(rule, "cpu")
    out = sae.losses(x, None, g)
    out.loss.backward()
    return out.loss, {n: p.grad for n, p in sae.named_parameters()}


def test_1_topk_of_all_latents_is_relu() -> None:
    sae = make(TopK(F), "cpu")
    x = inputs()[0]
    h = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    torch.testing.assert_close(sae.encode(x).to_dense(), h.relu(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("k", [1, 4, 30, F])
def test_2_batchtopk_spends_its_budget_on_the_largest(k: int) -> None:
    sae = make(BatchTopK(k), "cpu")
    x = inputs()[0]
    h = sae.encode(x).to_dense()
    exact = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).detach().relu()
    kept = min(k * N, int((exact > 0).sum()))
    assert (h > 0).sum() == kept
    assert h[h > 0].min() >= exact[h == 0].max() - 1e-5
    assert (h > 0).sum(1).unique().numel() > 1 or k == F  # not a budget a token


def test_3_a_weighted_score_does_not_see_how_a_latents_norm_is_split() -> None:
    factors = torch.linspace(0.2, 5, F)[:, None]
    for rule in (TopK(K, score="activation·decoder_norm"), TopK(K)):
        sae, x = make(rule, "cpu"), inputs()[0]
        before, reconstruction = sae.encode(x), sae(x).reconstruction
        with torch.no_grad():
            sae.W_enc.mul_(factors)
            sae.b_enc.mul_(factors[:, 0])  # type: ignore[union-attr]
            sae.W_dec.div_(factors)
        same = torch.equal(sae.encode(x).idx, before.idx)
        assert same == (rule.score != "activation")
        if same:
            torch.testing.assert_close(sae(x).reconstruction, reconstruction, rtol=0, atol=1e-5)


def test_7_matryoshka_of_one_group_without_the_bias_term_is_batchtopk() -> None:
    loss, gradients = losses_of(Matryoshka(K, groups=(1.0,), bias_term=False))
    other, others = losses_of(BatchTopK(K))
    assert torch.equal(loss, other)
    assert all(torch.equal(g, others[n]) for n, g in gradients.items())


def test_8_rules_that_are_others_at_their_limits() -> None:
    plain = codes_of(TopK(K))
    guided = codes_of(GradientTopK(K, beta=0.0))
    assert torch.equal(plain.idx, guided.idx) and torch.equal(plain.vals, guided.vals)
    batch, mutual = codes_of(BatchTopK(K)), codes_of(MutualChoice(float(K)))
    assert torch.equal(batch.idx, mutual.idx) and torch.equal(batch.vals, mutual.vals)
    every = codes_of(FeatureChoice(F, warmup=0.0))  # k = F grants every latent every token
    assert torch.equal(every.to_dense(), codes_of(TopK(F)).to_dense())
    late = codes_of(TemporalMask(K, warmup=1.0))
    assert torch.equal(plain.idx, late.idx) and torch.equal(plain.vals, late.vals)


def test_12_masks_are_a_pure_function_of_seed_and_step() -> None:
    rule = TemporalMask(K, warmup=0.0, rate=5.0, seed=7)
    sae, (x, _) = make(rule, "cpu"), inputs()
    masks = []
    for _ in range(8):
        call = Call(x, sae.W_enc, sae.b_enc, sae.b_dec, sae.W_dec, sae.selection_state)
        call.training, call.progress = True, 0.5
        masks.append(rule.unmasked(call))
        codes = sae.encode(x)
        assert (masks[-1][codes.idx[codes.idx >= 0].long()] == 1).all()
        sae.losses(x)
    assert masks[0].all()  # no averages yet
    assert not masks[-1].all() and not torch.equal(masks[-1], masks[-2])
    again = make(rule, "reference")
    for _ in range(7):
        again.losses(x)
    call = Call(x, again.W_enc, None, None, again.W_dec, again.selection_state)
    call.training, call.progress = True, 0.5
    assert torch.equal(rule.unmasked(call), masks[-1])


# ---- schedules, budgets and estimators ----


def test_k_falls_linearly() -> None:
    rule, state = TopK(10, anneal=0.5, k_start=30), State({})
    W, x = torch.zeros(64, 40), torch.zeros(1, 40)

    def k(progress: float, training: bool = True, rule: TopK = rule) -> int:
        return rule.k_at(Call(x, W, None, None, W, state, training=training, progress=progress))

    assert [k(p) for p in (0.0, 0.125, 0.25, 0.375, 0.49, 0.5, 1.0)] == [30, 25, 20, 15, 11, 10, 10]
    assert k(0.0, training=False) == 10
    assert k(0.0, rule=TopK(10, anneal=0.5)) == 40


# F, k, N, exponent, offset: the top budgets, and how many latents are granted one token.
ZIPF = [
    (24576, 32, 4096, 1.0, 0.0, [4096, 4096, 4096, 3262], 15651),
    (24576, 32, 4096, 1.0, 10.0, [1519, 1393], 13155),
    (131072, 64, 8192, 1.0, 20.0, [2703, 2580], 92254),
]


@pytest.mark.parametrize(("f", "k", "n", "exponent", "offset", "top", "ones"), ZIPF)
def test_zipf_budgets_known(f, k, n, exponent, offset, top, ones) -> None:
    budgets = zipf_budgets(f, k * n, n, exponent=exponent, offset=offset)
    assert budgets.dtype == torch.int32 and int(budgets.sum()) == k * n
    assert budgets[: len(top)].tolist() == top
    assert abs(int((budgets == 1).sum()) - ones) <= 1
    assert (budgets.diff() <= 0).all() and budgets.min() == 1 and budgets.max() <= n


@pytest.mark.parametrize("f", [1, 7, 100])
@pytest.mark.parametrize("total", [0, 1, 50, 99, 100, 5000])
@pytest.mark.parametrize("cap", [0.25, 1.0])
def test_zipf_budgets_add_up(f: int, total: int, cap: float) -> None:
    n = 40
    budgets = zipf_budgets(f, total, n, cap=cap)
    assert int(budgets.sum()) == min(total, f * int(cap * n))
    assert budgets.min() >= min(1, total // f) and budgets.max() <= int(cap * n)
    assert (budgets.diff() <= 0).all()


@pytest.mark.parametrize("name", ["topk-annealed", "relu-annealed", "feature-choice"])
def test_schedules_move_under_torch_compile(name: str) -> None:
    """An annealed k is a constant of each graph: one that moved as a symbol was an error."""
    found, expected = make(RULES[name], "cpu"), make(RULES[name], "cpu")
    torch.compiler.reset()
    compiled = torch.compile(found.losses, backend="aot_eager")
    for step, progress in enumerate((0.0, 0.1, 0.35, 0.95)):
        x, _ = inputs(step)
        losses = []
        for sae, step_of in ((found, compiled), (expected, expected.losses)):
            sae.progress = progress
            sae.zero_grad()
            out = step_of(x)
            out.loss.backward()
            losses.append(out.loss.detach())
        torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
        torch.testing.assert_close(found.W_enc.grad, expected.W_enc.grad, rtol=1e-5, atol=1e-7)


def test_feature_choice_spends_every_latents_budget() -> None:
    rule = FeatureChoice(K, warmup=0.0)
    sae, (x, _) = make(rule, "cpu"), inputs()
    with torch.no_grad():
        sae.b_enc.fill_(50)  # type: ignore[union-attr]  # every value is positive
    sae.selection_state.rate.copy_(torch.linspace(0, 1, F))
    counts = sae.encode(x).firing_counts()
    assert torch.equal(counts.flip(0).int(), zipf_budgets(F, K * N, N))


def test_feature_choice_revives_what_fires_too_seldom() -> None:
    rule, n = FeatureChoice(K, warmup=0.0, aux_zipf=0.5), 1000
    state = State(rule.state(D, F))
    W, none = torch.zeros(F, D), torch.zeros(F, dtype=torch.bool)
    call = Call(torch.zeros(n, D), W, None, None, W, state, training=True)

    def revived() -> Tensor:
        return rule.revivable(call, Selected(None), none)

    assert not revived().any()  # nothing is known of any
    granted = zipf_budgets(F, K * n, n) / n
    state.rate.copy_(granted * 0.3)
    state.rate_weight.fill_(0.3)
    assert not revived().any()
    state.rate[-1] *= 0.4
    assert revived().nonzero().flatten().tolist() == [F - 1]


@pytest.mark.parametrize(
    ("rule", "work"),
    [(FeatureChoice(K, warmup=0.0), "_granted"), (TemporalMask(K, warmup=0.0), "unmasked")],
    ids=["feature-choice", "temporal-mask"],
)
def test_a_step_does_a_rules_work_once(rule: Selection, work: str, monkeypatch) -> None:
    made, function = [], getattr(type(rule), work)
    monkeypatch.setattr(type(rule), work, lambda *args: made.append(1) or function(*args))
    sae = make(rule, "cpu")
    for step in range(1, 4):
        sae.losses(inputs(step)[0])
        assert len(made) == step


def test_the_threshold_is_the_average_of_the_smallest_selected() -> None:
    rule = BatchTopK(K, decay=0.75)
    sae, smallest = make(rule, "cpu"), []
    for seed in (1, 2, 3):
        out = sae.losses(inputs(seed)[0])
        smallest.append(float(out.codes.vals[out.codes.idx >= 0].detach().min()))
    weights = [0.25 * 0.75**i for i in (2, 1, 0)]
    theta = sum(w * s for w, s in zip(weights, smallest, strict=True)) / sum(weights)
    sae.eval()
    x = inputs(9)[0]
    h = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).detach()
    assert torch.equal(sae.encode(x).to_dense() > 0, h > theta)


@pytest.mark.parametrize(
    "rule", [BatchTopK(8), MutualChoice(8.0), Matryoshka(8), FeatureChoice(8, warmup=0.0)], ids=repr
)
def test_inference_keeps_the_l0_of_training(rule: Selection) -> None:
    """On rows that training did not see, within 5 %."""
    sae = SAE(SAEConfig(32, 256, rule, auxk_coef=0.0)).train()
    for step in range(60):
        trained = sae.losses(randn(512, 32, seed=step)).metrics["l0"]
    sae.eval()
    held_out = sae.encode(randn(4096, 32, seed=1000))
    assert abs(float((held_out.vals != 0).sum()) / 4096 - trained) <= 0.05 * trained


def test_gradients_steer_the_selection() -> None:
    """Latents whose direction matters to the loss are preferred, once the effect has a scale."""
    rule = GradientTopK(1, beta=1000.0)
    sae, (x, _) = make(rule, "cpu"), inputs()
    with torch.no_grad():
        sae.b_enc.fill_(20.0)  # type: ignore[union-attr]
    wanted = 17
    with torch.no_grad():
        sae.W_dec.copy_(torch.nn.functional.normalize(sae.W_dec, dim=1))
    g = sae.W_dec[wanted].detach().expand(N, -1)
    assert (sae.encode(x, g).idx == wanted).float().mean() < 0.5  # the first step is TopK
    sae.losses(x, None, g)
    assert (sae.encode(x, g).idx == wanted).float().mean() > 0.5
    assert (sae.encode(x, g, training=False).idx == wanted).float().mean() > 0.5
    assert torch.equal(sae.encode(x, training=False).idx, codes_of_same(sae, TopK(1), x).idx)


def codes_of_same(sae: SAE, rule: Selection, x: Tensor) -> Codes:
    call = Call(x, sae.W_enc, sae.b_enc, sae.b_dec, sae.W_dec, State({}), backend="cpu")
    codes = rule.select(call).codes
    assert codes is not None
    return codes


def test_the_documented_rule_of_ones_own_trains_and_is_saved(tmp_path) -> None:
    text = Path(__file__).parents[1].joinpath("docs", "selection.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    namespace: dict[str, Any] = {"__name__": "documented"}
    exec(compile(code, "docs/selection.md", "exec"), namespace)
    rule = namespace["ClearTopK"](6, share=0.5)
    source = open_source(randn(600, D, seed=1))
    sae = SAE(SAEConfig(D, F, rule))
    trainer = Trainer(sae, source, TrainConfig(steps=60, batch_size=64, lr=1e-2), out=tmp_path)
    before = evaluate(sae, source)["fvu"]
    trainer.run(progress=False)
    assert evaluate(sae, source)["fvu"] < 0.8 * before
    codes = SAE.load(tmp_path).encode(source.rows(np.arange(600)))
    assert (
        codes.vals[codes.idx >= 0] >= 0.5 * codes.vals[:, :1].expand_as(codes.vals)[codes.idx >= 0]
    ).all()
    assert 1 < float((codes.vals > 0).sum()) / 600 < 6


def test_every_rule_is_documented() -> None:
    text = Path(__file__).parents[1].joinpath("docs", "selection.md").read_text()
    ours = {n for n, rule in Selection.rules.items() if rule.__module__.startswith("fastsae.")}
    assert ours == {
        line.split("`")[1]
        for line in text.splitlines()
        if line.startswith("| `")
        if "--" not in line
    }


@ALL
def test_a_bad_step_leaves_no_trace_in_the_rule(name: str) -> None:
    sae = make(RULES[name], "cpu")
    x, g = inputs()
    sae.losses(x, None, g)
    before = {n: t.detach().clone() for n, t in sae.selection_state.state_dict().items()}
    since = sae.tokens_since_fired.clone()
    with torch.no_grad():
        sae.b_dec.fill_(3e38)  # x̂ overflows
        sae.config.__dict__["apply_b_dec_to_input"] = False
    assert not sae.losses(x, None, g).loss.isfinite()
    for key, value in sae.selection_state.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert torch.equal(sae.tokens_since_fired, since)


@ALL
def test_the_state_is_never_narrowed(name: str) -> None:
    sae = make(RULES[name], "cpu").bfloat16()
    assert sae.W_enc.dtype == torch.bfloat16
    assert all(t.dtype != torch.bfloat16 for t in sae.selection_state.state_dict().values())
    x, g = inputs()
    sae.losses(x, None, g).loss.backward()


def test_thresholds_of_feature_choice_are_not_negative() -> None:
    """Whatever the spread of the smallest values."""
    rule = FeatureChoice(2, warmup=0.0)
    sae = make(rule, "cpu")
    for step in range(30):
        sae.losses(inputs(step)[0] * (10 if step % 2 else 0.1))
    theta = rule.inference_thresholds(sae.selection_state, sae.W_dec)
    assert theta is not None and (theta >= 0).all()


def test_annealing_holds_with_multi_topk() -> None:
    sae = make(TopK(2, anneal=0.8, k_start=20), "cpu", multi_topk_coef=0.125)
    assert sae.losses(inputs()[0]).codes.idx.shape == (N, 11)


# ---- what is refused ----

REFUSED = [
    (lambda: TopK(4, score="norm"), "score: expected activation or activation·decoder_norm"),
    (lambda: TopK(4, anneal=1.5), r"anneal: expected a number in \[0, 1\], got 1.5"),
    (lambda: TopK(4, k_start=3), "k_start: expected at least k = 4, got 3"),
    (lambda: TopK(4, nested=(2, 2)), r"nested: expected ascending budgets in \[1, 4\)"),
    (lambda: TopK(4, nested=(4,)), r"nested: expected ascending budgets in \[1, 4\)"),
    (lambda: TopK(4, nested=(1.5, 2)), "nested: expected ascending budgets"),
    (lambda: BatchTopK(4, decay=1.0), "decay: expected a number below 1, got 1"),
    (lambda: Matryoshka(4, bias_term="False"), "bias_term: expected True or False, got 'False'"),
    (lambda: FeatureChoice(4, floor=1.5), "floor: expected an integer, got 1.5"),
    (lambda: TemporalMask(4, seed=0.5), "seed: expected an integer, got 0.5"),
    (lambda: SAEConfig(D, F, GradientTopK(4), d_out=D), "expected a rule without gradients with"),
    (lambda: SAEConfig.from_dict({"selection": "topk"}), "selection: expected a name and par"),
    (lambda: GroupTopK(5).check(F), "k: expected a divisor of d_sae = 48, got 5"),
    (lambda: MutualChoice(-1.0), "budget: expected a number of at least 0, got -1.0"),
    (lambda: MutualChoice(math.inf), "budget: expected a number of at least 0, got inf"),
    (lambda: BatchTopK(49).check(F), "expected at most d_sae = 48, got 49"),
    (lambda: Matryoshka(4, groups=(0.5, 0.4)), "groups: expected shares above 0 that add up to 1"),
    (lambda: Matryoshka(4).check(8), "groups: expected a latent in each"),
    (lambda: FeatureChoice(4, cap=2.0), r"cap: expected a number in \[0, 1\], got 2.0"),
    (lambda: TemporalMask(4, base="relu"), "base: expected topk or batchtopk, got 'relu'"),
    (lambda: make(GradientTopK(4), "cpu").losses(inputs()[0]), "gradient: expected one"),
    (lambda: make(TopK(4), "cpu").losses(*inputs()[:1], None, inputs()[1][1:]), "expected 23 tok"),
]


@pytest.mark.parametrize(("make_it", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_refusals(make_it, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_it()
