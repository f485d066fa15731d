"""The trainer: its steps against steps written out in float64, its bits, its logs and its files."""

import copy
import json
import math
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_sae import (
    AUXK,
    MULTI,
    assert_same_gradients,
    dense,
    grad_of,
    parameters,
    randn,
    relative_error,
)
from torch import Tensor

from fastsae import SAE, SAEConfig, TopK, cpu, metrics, ops
from fastsae.batches import Batches
from fastsae.data import Source, in_order, load_sample, open_source, split
from fastsae.sae import SAEOutput
from fastsae.timing import product_seconds
from fastsae.train import TrainConfig, Trainer, evaluate

BACKENDS = pytest.mark.parametrize("backend", ["reference", "cpu"])
EXACT = ("adam", "torch-adam")
EXACT_OPTIMIZERS = pytest.mark.parametrize("optimizer", EXACT)


@pytest.fixture(autouse=True)
def set_threads() -> Iterator[Callable[[int], None]]:
    """One thread for these small problems, which waiting for a second one would only slow down."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


def rows(n: int, d: int, seed: int = 0) -> Tensor:
    """Sparse combinations of more directions than there are coordinates, and a centre."""
    directions = torch.nn.functional.normalize(randn(4 * d, d, seed=99), dim=1)
    weights = randn(n, 4 * d, seed=seed).relu()
    weights *= torch.rand(n, 4 * d, generator=torch.Generator().manual_seed(seed)) < 0.05
    return weights @ directions + 0.5


def source(n: int = 400, d: int = 16, d_out: int | None = None) -> Source:
    x = rows(n, d)
    return open_source(x, None if d_out is None else x @ randn(d, d_out, seed=5) / 4 + 1)


def make(backend: str | None = None, seed: int = 0, d: int = 16, **config: Any) -> SAE:
    config = {"d_in": d, "d_sae": 64, "selection": TopK(4), **config}
    return SAE(SAEConfig(**config), seed=seed, backend=backend)


def train(sae: SAE, data: Source, *, out: Path | None = None, **config: Any) -> list[SAEOutput]:
    """Runs a Trainer; returns what the SAE made of each batch."""
    config = {"steps": 30, "batch_size": 32, "lr": 3e-3, **config}
    outputs: list[SAEOutput] = []
    trainer = Trainer(sae.eval(), data, TrainConfig(**config), out=out)  # it sets the mode itself
    trainer.run(progress=False, on_step=lambda _, output: outputs.append(output))
    return outputs


def losses(outputs: list[SAEOutput]) -> list[float]:
    return [float(output.loss.detach()) for output in outputs]


# ---- a step, written out ----


def steps_by_hand(sae: SAE, batches: Batches, c: TrainConfig, lr: float) -> dict[str, Tensor]:
    """c.steps steps of Adam (Kingma & Ba 2015, algorithm 1) on the dense losses, in float64."""
    p = parameters(sae)
    m, v = ({name: torch.zeros_like(t) for name, t in p.items()} for _ in range(2))
    unit = sae.config.decoder_norm == "unit"
    for t in range(1, c.steps + 1):
        x, target, _ = next(batches)
        out = dense(sae, p, x.double(), None if target is None else target.double())
        sae.tokens_since_fired.copy_(out["since"])
        g = dict(zip(p, torch.autograd.grad(out["loss"], list(p.values())), strict=True))
        with torch.no_grad():
            if unit:
                d = p["W_dec"] / p["W_dec"].norm(dim=1, keepdim=True)
                g["W_dec"] -= (g["W_dec"] * d).sum(1, keepdim=True) * d
            norm = math.sqrt(sum(float(q.square().sum()) for q in g.values()))
            clip = 1 if c.clip is None else min(1, c.clip / (norm + 1e-6))
            for name, q in p.items():
                grad = g[name] * clip
                m[name] = c.beta1 * m[name] + (1 - c.beta1) * grad
                v[name] = c.beta2 * v[name] + (1 - c.beta2) * grad.square()
                m_hat, v_hat = m[name] / (1 - c.beta1**t), v[name] / (1 - c.beta2**t)
                q -= lr * c.lr_factor(t - 1) * m_hat / (v_hat.sqrt() + c.eps)
            if unit:
                p["W_dec"] /= p["W_dec"].norm(dim=1, keepdim=True)
    return p


def assert_same_moves(
    sae: SAE, start: dict[str, Tensor], expected: dict[str, Tensor], rtol: float
) -> None:
    """From `start`, the parameters moved to what is expected; rtol is of the way they went."""
    errors = {
        name: relative_error(p.detach() - start[name], expected[name] - start[name])
        for name, p in sae.named_parameters()
    }
    assert max(errors.values()) <= rtol, errors


BY_HAND: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({"auxk_coef": 0.0}, {}),
    "auxk-multi": ({**AUXK, **MULTI, "dead_after": 70}, {}),
    "free": ({**AUXK, "dead_after": 70, "decoder_norm": "free"}, {}),
    "clip": ({**AUXK, "dead_after": 70}, {"clip": 0.02}),
    "transcoder": ({**AUXK, **MULTI, "dead_after": 70, "d_out": 10, "skip": True}, {}),
    "betas": ({**AUXK, "dead_after": 70}, {"beta1": 0.5, "beta2": 0.9, "clip": 0.02}),
    "beta1-zero": ({**AUXK, "dead_after": 70}, {"beta1": 0.0}),
    "unscaled": ({"apply_b_dec_to_input": False}, {"scale": False, "b_dec": "zero"}),
}


def run_by_hand(
    sae: SAE, data: Source, settings: TrainConfig
) -> tuple[list[SAEOutput], dict[str, Tensor]]:
    """The same training by the Trainer, on `sae`, and by hand, from the state it starts from."""
    trainer = Trainer(sae, data, settings)
    trainer.initialize()
    twin = copy.deepcopy(sae).train()
    batches = Batches(data, settings.batch_size, settings.seed)
    assert settings.lr is not None
    expected = steps_by_hand(twin, batches, settings, settings.lr)
    outputs: list[SAEOutput] = []
    trainer.run(progress=False, on_step=lambda _, output: outputs.append(output))
    return outputs, expected


@EXACT_OPTIMIZERS
@pytest.mark.parametrize(("config", "settings"), BY_HAND.values(), ids=BY_HAND)
def test_steps_are_those_written_out(
    optimizer: str, config: dict[str, Any], settings: dict[str, Any]
) -> None:
    # In float64, where 12 steps leave only rounding between the two.
    c = TrainConfig(
        steps=12, batch_size=30, lr=2e-2, warmup_steps=3, optimizer=optimizer, seed=3, **settings
    )
    sae = make(**config, dtype="float64")
    start = parameters(sae)
    outputs, expected = run_by_hand(sae, source(d_out=config.get("d_out")), c)
    active = ["auxk" in output.losses for output in outputs]
    assert any(active) == ("dead_after" in config) and not all(active)
    assert_same_moves(sae, start, expected, 1e-8)


@BACKENDS
@EXACT_OPTIMIZERS
@pytest.mark.parametrize("setting", ["auxk-multi", "clip", "transcoder"])
def test_steps_in_float32_are_those_written_out(backend: str, optimizer: str, setting: str) -> None:
    # A larger eps: Adam divides a gradient by its own size, rounding errors of tiny ones included.
    config, settings = BY_HAND[setting]
    c = TrainConfig(steps=12, batch_size=30, lr=2e-2, eps=1e-3, optimizer=optimizer, **settings)
    sae = make(backend, **config)
    start = parameters(sae)
    _, expected = run_by_hand(sae, source(d_out=config.get("d_out")), c)
    assert_same_moves(sae, start, expected, 1e-5)


@pytest.mark.parametrize("optimizer", [*EXACT, "adam-lazy"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_stay_at_norm_one(optimizer: str, dtype: str) -> None:
    sae = make(dtype=dtype, dead_after=100)
    for output in train(sae, source(), optimizer=optimizer, lr=1e-2):
        assert bool(output.loss.isfinite())
    norms = sae.W_dec.detach().double().norm(dim=1)
    assert float((norms - 1).abs().max()) <= (1e-6 if dtype == "float32" else 2**-8)
    assert not torch.equal(sae.W_dec, make(dtype=dtype).W_dec)


@pytest.mark.parametrize("optimizer", ["adam-lazy", "adam"])
def test_only_lazy_adam_leaves_latents_alone_that_fired_before(optimizer: str) -> None:
    sae = make(auxk_coef=0.0)
    settings = TrainConfig(steps=4, batch_size=4, lr=1e-2, optimizer=optimizer)
    trainer = Trainer(sae, source(), settings)
    trainer.initialize()
    before = {name: sae.get_parameter(name).detach().clone() for name in ("W_enc", "W_dec")}
    fired_before = torch.zeros(64, dtype=torch.bool)
    batches = Batches(source(), 4)
    for step in range(4):
        fired = trainer.step(next(batches)).codes.firing_counts() > 0
        silent = fired_before & ~fired
        assert silent.any() == (step > 0)
        for name, start in before.items():
            p = sae.get_parameter(name).detach()
            moved = (p != start).any(1)
            assert bool(moved[fired].all())
            assert bool(moved[silent].any()) == (optimizer == "adam" and step > 0)
            assert not moved[~fired & ~fired_before].any()
            start.copy_(p)
        fired_before |= fired


# ---- the learning rate ----

SCHEDULES: dict[str, tuple[dict[str, Any], list[float]]] = {
    "up-and-down": (
        {"steps": 10, "warmup_steps": 4, "decay_fraction": 0.3},
        [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 2 / 3, 1 / 3],
    ),
    "one-step": ({"steps": 1}, [1]),
    "one-step-down": ({"steps": 1, "decay_fraction": 1.0}, [1]),
    "no-warmup": ({"steps": 4, "warmup_steps": 0, "decay_fraction": 0.5}, [1, 1, 1, 0.5]),
    "only-down": ({"steps": 4, "warmup_steps": 0, "decay_fraction": 1.0}, [1, 0.75, 0.5, 0.25]),
    "constant": ({"steps": 3, "warmup_steps": 0, "decay_fraction": 0.0}, [1, 1, 1]),
    "too-short": ({"steps": 3, "warmup_steps": 6, "decay_fraction": 0.0}, [1 / 6, 2 / 6, 3 / 6]),
    "overlap": ({"steps": 4, "warmup_steps": 4, "decay_fraction": 1.0}, [0.25, 0.5, 0.5, 0.25]),
    "cosine": (
        {"steps": 4, "warmup_steps": 0, "decay_fraction": 1.0, "decay": "cosine"},
        [1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2],
    ),
    "default": ({"steps": 20}, [0.5, *[1] * 16, 0.75, 0.5, 0.25]),
}


@pytest.mark.parametrize(("settings", "factors"), SCHEDULES.values(), ids=SCHEDULES)
def test_lr_factor(settings: dict[str, Any], factors: list[float]) -> None:
    config = TrainConfig(**settings)
    assert [config.lr_factor(step) for step in range(config.steps)] == pytest.approx(factors)


def test_default_warmup_is_a_tenth_of_the_steps_and_at_most_1000() -> None:
    config = TrainConfig(steps=5000)
    assert config.lr_factor(498) < 1 == config.lr_factor(499)
    config = TrainConfig(steps=100_000)
    assert config.lr_factor(0) == 1 / 1000
    assert config.lr_factor(998) < 1 == config.lr_factor(999)
    # And it falls over the last fifth, to a last step that is not 0.
    assert config.lr_factor(80_000) == 1 > config.lr_factor(80_001)
    assert config.lr_factor(99_999) == 1 / 20_000


@pytest.mark.parametrize(("d_sae", "lr"), [(2**14, 2e-4), (2**12, 4e-4), (2**16, 1e-4)])
def test_default_lr_falls_with_the_root_of_the_width(d_sae: int, lr: float) -> None:
    sae = make(d=2, d_sae=d_sae)
    assert Trainer(sae, source(d=2), TrainConfig()).lr == pytest.approx(lr)
    assert Trainer(sae, source(d=2), TrainConfig(lr=0.5)).lr == 0.5


# ---- bits ----


def bits(state: dict[str, Tensor]) -> dict[str, bytes]:
    return {name: t.detach().contiguous().numpy().tobytes() for name, t in state.items()}


@cache
def minilm(d: int = 384) -> Source:
    return open_source(load_sample("minilm_l3").x[:, :d])


@pytest.mark.parametrize(
    ("optimizer", "clip"),
    [("adam", None), ("adam", 0.1), ("adam-lazy", None), ("torch-adam", None)],
    ids=["adam", "adam-clip", "adam-lazy", "torch-adam"],
)
def test_a_seed_decides_every_bit(
    optimizer: str,
    clip: float | None,
    set_threads: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Sizes that no block, vector or thread divides evenly; AuxK sets in on the way.
    data = minilm(383)
    encode = cpu.encode
    runs = []
    for threads, forced in (
        (1, {}),
        (2, {}),
        (2, {"block_tokens": 7, "screen": "fp32"}),
        (1, {"block_tokens": 64, "screen": "bf16", "isa": cpu.isas()[-1]}),
    ):
        set_threads(threads)
        monkeypatch.setattr(cpu, "encode", partial(encode, forced=forced))
        sae = make("cpu", d=383, d_sae=389, selection=TopK(7), dead_after=450, k_aux=5)
        outputs = train(
            sae, data, optimizer=optimizer, clip=clip, steps=32, batch_size=121, init_rows=1000
        )
        terms = [{n: float(t.detach()).hex() for n, t in o.losses.items()} for o in outputs]
        runs.append((terms, [t.hex() for t in losses(outputs)], bits(sae.state_dict())))
    assert 5 < sum("auxk" in step for step in runs[0][0]) < 30
    for run in runs[1:]:
        assert run == runs[0]


def test_another_seed_gives_other_bits() -> None:
    first, again, data, order = (
        train(make(seed=seed), source(), seed=order_seed)
        for seed, order_seed in ((0, 0), (0, 0), (1, 0), (0, 1))
    )
    assert losses(first) == losses(again)
    assert losses(first) != losses(data)
    assert losses(first)[0] != losses(order)[0]


def test_training_leaves_random_states_alone() -> None:
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()  # type: ignore[index]
    train(make(dead_after=64), source(), steps=5)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tobytes() == states[2]  # type: ignore[index]


# ---- the C++ backend beside the reference ----


def chosen(vals: Tensor, idx: Tensor, n_latents: int) -> Tensor:
    mask = torch.zeros(len(idx), n_latents + 1, dtype=torch.bool)
    mask.scatter_(1, idx.long() % (n_latents + 1), True)
    assert torch.equal(vals > 0, idx >= 0)
    return mask[:, :n_latents]


def assert_top(mask: Tensor, h: Tensor, k: int, tie: Tensor) -> int:
    """mask holds the k largest positive entries of h, but for entries within `tie` of the k-th.

    Returns how many entries are so near that rounding may decide either way.
    """
    k = min(k, h.shape[1])
    kth = h.topk(k, dim=1).values[:, -1:].clamp(min=0)
    assert bool((h[mask] >= (kth - tie).expand_as(h)[mask]).all())
    assert bool((h[~mask] <= (kth + tie).expand_as(h)[~mask]).all())
    clear = (h > kth + tie).sum(1)
    assert bool((mask.sum(1) <= k).all()) and bool((mask.sum(1) >= clear).all())
    return int(((h - kth).abs() <= tie).sum())


def test_one_step_is_that_of_the_reference_at_twenty_points_of_a_run() -> None:
    """From equal states: selections, loss and gradients; each within the error of eager float32.

    Both backends and eager torch are measured against float64 with the backend's own selections,
    because a choice between two latents within rounding of each other is nobody's error.
    """
    n, f, k, k_aux = 192, 768, 16, 3
    data = minilm()
    config: dict[str, Any] = {"d_sae": f, "selection": TopK(k), "k_aux": k_aux}
    sae = make("cpu", d=384, **config, dead_after=500, auxk_coef=0.25)
    trainer = Trainer(sae, data, TrainConfig(steps=200, batch_size=n, lr=3e-3))
    trainer.initialize()
    batches = Batches(data, n)
    points, active, different = 0, 0, 0
    while trainer.step_count < 200:
        x = next(batches)
        if trainer.step_count % 10 == 9:
            points += 1
            masks = []
            for backend in ("cpu", "reference"):
                twin = copy.deepcopy(sae).train()
                twin.backend = backend
                masks.append(check_a_step(twin, x.x, k, k_aux))
            active += masks[0][1] is not None
            different += int((masks[0][0] != masks[1][0]).sum())
        trainer.step(x)
    assert points == 20 and active >= 15
    assert different <= 4  # of 20 · 192 · 16 selected pairs; each one a tie, as checked


def check_a_step(sae: SAE, x: Tensor, k: int, k_aux: int) -> tuple[Tensor, Tensor | None]:
    f = sae.config.d_sae
    p, eager = parameters(sae), parameters(sae, torch.float32)
    codes = sae.encode(x)
    mask = chosen(codes.vals, codes.idx, f)
    exact = dense(sae, p, x.double(), chosen=mask)
    # The rounding of a dot product of width D is at most some √D units in the last place.
    xs = x * sae.input_scale - sae.b_dec.detach()
    size = xs.double().norm(dim=1, keepdim=True) * float(sae.W_enc.detach().norm(dim=1).max())
    tie = 8 * torch.finfo(torch.float32).eps * size
    h = exact["h"].detach()
    assert_top(mask, h, k, tie)
    mask_aux = None
    if "auxk" in exact:
        dead = exact["dead"].nonzero()[:, 0].to(torch.int32)
        with torch.no_grad():
            vals, idx = ops.encode(
                x * sae.input_scale,
                sae.W_enc,
                sae.b_enc,
                sae.b_dec,
                k=min(k_aux, len(dead)),
                latents=dead,
                backend=sae.backend,
            )
        mask_aux = chosen(vals, idx, f)
        assert_top(mask_aux[:, dead.long()], h[:, dead.long()], k_aux, tie)
        exact = dense(sae, p, x.double(), chosen=mask, chosen_aux=mask_aux)
    plain = dense(sae, eager, x, chosen=mask, chosen_aux=mask_aux)
    out = sae.losses(x)
    for loss in (exact["loss"], plain["loss"], out.loss):
        loss.backward()
    assert torch.equal(chosen(out.codes.vals, out.codes.idx, f), mask)
    assert set(out.losses) == {"mse", "auxk"} & set(exact)
    for name in (*out.losses, "loss"):
        got = out.loss if name == "loss" else out.losses[name]
        assert_no_worse(got, plain[name], exact[name], name, LUCK)
    for name, q in sae.named_parameters():
        # Eager b_dec is a column sum and little else; over the rows of a matrix no luck lasts.
        luck = LUCK if name == "b_dec" or sae.backend == "reference" else 0.0
        assert_no_worse(grad_of(q), grad_of(eager[name]), grad_of(p[name]), name, luck)
    return mask, mask_aux


LUCK = 2 * torch.finfo(torch.float32).eps


def assert_no_worse(got: Tensor, eager: Tensor, exact: Tensor, name: str, luck: float) -> None:
    """The relative error against float64 is at most eager's, and what eager is lucky by."""
    error, allowed = relative_error(got, exact), relative_error(eager, exact)
    assert error <= allowed + luck, name


def test_the_backends_part_slowly() -> None:
    # Free-running: what differs is the order of sums, and training amplifies it.
    data = minilm()
    train_rows, held_out = split(data, 2048)
    runs = []
    for backend in ("cpu", "reference"):
        sae = make(backend, d=384, d_sae=768, selection=TopK(16), dead_after=20_000)
        outputs = train(sae, train_rows, steps=150, batch_size=256, lr=5e-3)
        runs.append((losses(outputs), evaluate(sae, held_out)["fvu"]))
    (ours, fvu), (theirs, fvu_reference) = runs
    assert ours[:10] == pytest.approx(theirs[:10], rel=1e-5)
    assert fvu == pytest.approx(fvu_reference, rel=1e-3)
    assert fvu < 0.45 and ours[-1] < 0.5 * ours[0]  # and both have learnt something


# ---- parts of a batch, averages ----


@pytest.mark.parametrize("optimizer", [*EXACT, "adam-lazy"])
@pytest.mark.parametrize("parts", [2, 5])
def test_a_batch_in_parts_gives_the_same_step(optimizer: str, parts: int) -> None:
    config = {"decoder_norm": "free", "auxk_coef": 0.0}
    whole, cut = make(**config), make(**config)
    settings = TrainConfig(steps=1, batch_size=32, lr=1e-2, optimizer=optimizer, clip=0.01)
    Trainer(whole, source(), settings).run(progress=False)
    Trainer(cut, source(), replace(settings, accumulate=parts)).run(progress=False)
    for name, p in whole.named_parameters():
        # Adam's first step has the size of the learning rate whatever the gradient's.
        assert relative_error(cut.get_parameter(name), p.double()) < 1e-4, name
    assert bool((cut.tokens_since_fired == whole.tokens_since_fired).all()) is False
    assert torch.equal(cut.tokens_since_fired == 32, whole.tokens_since_fired == 32)


@pytest.mark.parametrize("norm", ["unit", "free"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ema_is_the_average_of_all_steps(tmp_path: Path, norm: str, dtype: str) -> None:
    sae = make(decoder_norm=norm, dtype=dtype)
    data = source()
    settings = TrainConfig(steps=12, batch_size=32, lr=1e-2, ema=0.6)
    trainer = Trainer(sae, data, settings, out=tmp_path, holdout=data)
    expected: dict[str, Tensor] = {}

    def average(step: int, _: SAEOutput) -> None:
        decay = min(0.6, (1 + step) / (10 + step))
        for name, p in sae.named_parameters():
            new = p.detach().double()
            expected[name] = decay * expected.get(name, started[name]) + (1 - decay) * new
        if norm == "unit":
            expected["W_dec"] = torch.nn.functional.normalize(expected["W_dec"], dim=1)

    trainer.initialize()
    started = {name: p.detach().double() for name, p in sae.named_parameters()}
    trainer.run(progress=False, on_step=average)
    saved = SAE.load(tmp_path)
    for name, p in saved.named_parameters():
        low = dtype == "bfloat16"
        assert relative_error(p, expected[name]) < (2**-8 if low else 1e-6), name
    assert not torch.equal(saved.W_dec, sae.W_dec)  # the SAE goes on with its own weights
    last = log_lines(tmp_path)[-1]
    assert last["step"] == 12
    assert last["eval"]["fvu"] == pytest.approx(evaluate(saved, data)["fvu"], rel=1e-6)


# ---- what a run leaves behind ----


def log_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_run_directory(tmp_path: Path) -> None:
    out = tmp_path / "some" / "run"
    sae = make(dead_after=100, **MULTI)
    settings = {"steps": 25, "batch_size": 32, "lr": 3e-3, "log_every": 10, "warmup_steps": 5}
    outputs = train(sae, source(), out=out, **settings)
    files = ["config.json", "latest", "log.jsonl", "sae.safetensors", "step-25"]
    assert sorted(os.listdir(out)) == files
    first, *lines = log_lines(out)
    assert SAEConfig.from_dict(first["config"]["sae"]) == sae.config
    assert TrainConfig(**first["config"]["train"]) == TrainConfig(**settings)
    assert first["engine"] == {"backend": "cpu", "gradients": "rows, summed in the update"}
    assert [line["step"] for line in lines] == [10, 20, 25]
    factors = TrainConfig(**settings)
    for line in lines:
        output = outputs[line["step"] - 1]
        assert line["tokens"] == 32 * line["step"]
        assert line["loss"] == float(output.loss.detach())
        assert {n: line[n] for n in output.losses} == {
            n: float(t.detach()) for n, t in output.losses.items()
        }
        assert line["lr"] == pytest.approx(3e-3 * factors.lr_factor(line["step"] - 1))
        assert line["l0"] == 4 == float(output.codes.l0().double().mean())
        x = next(Batches(source(), 32, start=32 * (line["step"] - 1))).x.double()
        x *= float(sae.input_scale)
        fvu = float(output.losses["mse"].detach()) / float((x - x.mean(0)).square().mean())
        assert line["fvu"] == pytest.approx(fvu, rel=1e-5)
        assert line["explained_variance"] == 1 - line["fvu"]
        assert line["n_dead"] == int(output.metrics["n_dead"])
        assert line["seconds"] >= 0 and line["tokens_per_s"] > 0
    assert lines[-1]["n_dead"] > 0 and {"mse", "auxk", "multi_topk"} <= set(lines[-1])
    assert lines[0]["seconds"] <= lines[1]["seconds"] <= lines[2]["seconds"]
    again = SAE.load(out)
    assert not sae.training and not again.training
    assert bits(again.state_dict()) == bits(sae.state_dict())
    assert float(again.input_scale) != 1


def test_the_last_step_is_logged_once(tmp_path: Path) -> None:
    for steps, log_every, logged in ((4, 2, [2, 4]), (3, 5, [3]), (3, 1, [1, 2, 3])):
        out = tmp_path / f"{steps}-{log_every}"
        train(make(), source(), out=out, steps=steps, log_every=log_every)
        assert [line["step"] for line in log_lines(out)[1:]] == logged


def test_run_reports_what_it_took(capsys: pytest.CaptureFixture[str]) -> None:
    steps: list[int] = []
    trainer = Trainer(make(), source(), TrainConfig(steps=6, batch_size=50))
    result = trainer.run(progress=False, on_step=lambda step, _: steps.append(step))
    assert steps == [1, 2, 3, 4, 5, 6] and trainer.step_count == 6
    assert set(result) == {"train_seconds", "tokens_per_s", "interrupted"}
    assert result["interrupted"] is False
    assert result["train_seconds"] > 0
    assert result["tokens_per_s"] == pytest.approx(300 / result["train_seconds"])
    assert capsys.readouterr() == ("", "")


def test_a_finished_run_is_finished(tmp_path: Path) -> None:
    # A second run() must not measure b_dec again and overwrite what was trained.
    sae = make()
    trainer = Trainer(sae, source(), TrainConfig(steps=10, lr=1e-2), out=tmp_path)
    trainer.run(progress=False)
    trained = bits(sae.state_dict())
    trainer.run(progress=False)
    assert bits(sae.state_dict()) == trained == bits(SAE.load(tmp_path).state_dict())


def test_a_run_goes_on_where_single_steps_ended() -> None:
    settings = TrainConfig(steps=8, batch_size=32, lr=1e-2)
    whole, parts = make(), make()
    Trainer(whole, source(), settings).run(progress=False)
    trainer = Trainer(parts, source(), settings)
    trainer.initialize()
    batches = Batches(source(), 32)
    for _ in range(3):
        trainer.step(next(batches))
    trainer.run(progress=False)
    assert bits(parts.state_dict()) == bits(whole.state_dict())


@pytest.mark.parametrize("start", ["geometric_median", "mean", "zero"])
@pytest.mark.parametrize("scale", [True, False], ids=["scaled", "unscaled"])
def test_initialize_measures_the_first_shuffled_rows(start: Any, scale: bool) -> None:
    data = source(400, d_out=10)
    for init_rows, n in ((100, 100), (10_000, 400)):
        sae, expected = make(d_out=10), make(d_out=10)
        settings = TrainConfig(seed=5, init_rows=init_rows, scale=scale, b_dec=start)
        Trainer(sae, data, settings).initialize()
        expected.initialize_from_(*next(Batches(data, n, 5))[:2], scale=scale, b_dec=start)
        assert bits(sae.state_dict()) == bits(expected.state_dict())
        assert (float(sae.input_scale) != 1) == (float(sae.output_scale) != 1) == scale
        assert bool(sae.b_dec.any()) == (start != "zero")


@pytest.mark.parametrize("optimizer", [*EXACT, "adam-lazy"])
def test_gradients_of_ones_own_between_steps(optimizer: str) -> None:
    # In a step the optimiser may take the gradients of W_enc and W_dec for itself; only there.
    data = source()
    settings = TrainConfig(steps=6, batch_size=32, lr=1e-2, optimizer=optimizer)
    sae, undisturbed = make(auxk_coef=0.0), make(auxk_coef=0.0)
    Trainer(undisturbed, data, settings).run(progress=False)
    trainer = Trainer(sae, data, settings)
    trainer.initialize()
    batches = Batches(data, 32)
    for _ in range(6):
        sae.zero_grad()
        p = parameters(sae)
        dense(sae, p, rows(20, 16, seed=8).double())["loss"].backward()
        sae.eval()(rows(20, 16, seed=8)).loss.backward()
        assert_same_gradients(sae, p, 2e-6)
        trainer.step(next(batches))
    assert bits(sae.state_dict()) == bits(undisturbed.state_dict())


# ---- divergence ----


@EXACT_OPTIMIZERS
@pytest.mark.parametrize("norm", ["unit", "free"])
@pytest.mark.parametrize(("lr", "steps"), [(1e10, 60), (1e30, 60), (1e38, 60), (1e38, 1)])
@BACKENDS
def test_divergence_raises_and_leaves_no_weights(
    tmp_path: Path, optimizer: str, norm: str, lr: float, steps: int, backend: str
) -> None:
    # After a single step it is the weights alone that show it: the loss is that before the step.
    sae = make(backend, decoder_norm=norm, auxk_coef=0.0)
    settings = {"steps": steps, "lr": lr, "optimizer": optimizer, "warmup_steps": 0}
    with pytest.raises(FloatingPointError, match=r"step .*a lower learning rate usually helps"):
        train(sae, source(), out=tmp_path, **settings)
    assert os.listdir(tmp_path) == ["log.jsonl"]
    assert log_lines(tmp_path)[0]["config"]["train"]["lr"] == lr


@EXACT_OPTIMIZERS
def test_a_step_without_a_finite_loss_writes_nothing(
    tmp_path: Path, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae = make()
    settings = TrainConfig(steps=20, log_every=3, optimizer=optimizer)
    trainer = Trainer(sae, source(), settings, out=tmp_path)
    state: list[dict[str, bytes]] = []
    own = sae.losses

    def poisoned(
        x: Tensor, target: Tensor | None = None, gradient: Tensor | None = None
    ) -> SAEOutput:
        output = own(x, target)
        if trainer.step_count == 7:
            state.append(bits(sae.state_dict()))
            return replace(output, loss=output.loss * math.nan)
        return output

    monkeypatch.setattr(sae, "losses", poisoned)
    with pytest.raises(
        FloatingPointError, match="step 7: expected a finite loss, got nan; a lower"
    ):
        trainer.run(progress=False)
    assert [bits(sae.state_dict())] == state
    assert [line["step"] for line in log_lines(tmp_path)[1:]] == [3, 6]
    assert os.listdir(tmp_path) == ["log.jsonl"]


def test_other_errors_of_a_step_are_not_divergence(monkeypatch: pytest.MonkeyPatch) -> None:
    data = open_source(torch.full((64, 16), torch.nan))
    with pytest.raises(ValueError, match="tensor: row 0 holds a NaN"):
        train(make(), data)
    trainer = Trainer(make(), source(), TrainConfig())
    batch = next(Batches(source(d=5), 32))
    with pytest.raises(ValueError, match=r"x: expected shape \(…, 16\), got \(32, 5\)"):
        trainer.step(batch)

    def losses(*_: Any, **__: Any) -> SAEOutput:
        raise ValueError("a finite number, but of another kind")

    monkeypatch.setattr(trainer.sae, "losses", losses)
    with pytest.raises(ValueError, match="of another kind"):
        trainer.step(next(Batches(source(), 32)))


# ---- evaluation ----


@BACKENDS
def test_evaluate_is_a_direct_computation(backend: str) -> None:
    data = source(333)
    sae = make(backend, dead_after=64)
    train(sae, data, steps=20)
    with torch.no_grad():  # some latents that no row activates
        assert sae.b_enc is not None
        sae.b_enc[:9] = -1e3
    x = data.rows(np.arange(333)).double()
    out = dense(sae.eval(), parameters(sae), x)
    e, centred = x - out["reconstruction"], x - x.mean(0)
    got = evaluate(sae, data)
    figures = {"fvu", "explained_variance", "l0", "dead_share", "firing_frequency"}
    assert set(got) == figures
    histogram = metrics.frequency_histogram(out["mask"].sum(0), 333)
    assert got["firing_frequency"] == histogram
    expected = float(e.detach().square().sum() / centred.square().sum())
    assert got["fvu"] == pytest.approx(expected, rel=1e-5)
    assert got["explained_variance"] == 1 - got["fvu"]
    assert got["l0"] == int(out["mask"].sum()) / 333
    assert got["dead_share"] == int((out["mask"].sum(0) == 0).sum()) / 64 >= 9 / 64


@pytest.mark.parametrize("d_out", [None, 10], ids=["autoencoder", "transcoder"])
def test_evaluate_does_not_depend_on_the_batch_size(d_out: int | None) -> None:
    data = source(333, d_out=d_out)
    sae = make(d_out=d_out, skip=d_out is not None)
    train(sae, data, steps=20)
    expected = evaluate(sae, data)
    for batch_size in (1, 7, 333, 100_000):
        got = evaluate(sae, data, batch_size)
        assert got["fvu"] == pytest.approx(expected.pop("fvu", got["fvu"]), rel=1e-6)
        expected["fvu"] = got["fvu"]
        for name in ("l0", "dead_share", "firing_frequency"):
            assert got[name] == expected[name]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_evaluate_changes_nothing(training: bool) -> None:
    sae = make(dead_after=10).train(training)
    before = bits(sae.state_dict())
    sae.tokens_since_fired += 5
    evaluate(sae, source())
    assert sae.training == training
    assert bits(sae.state_dict()) == before
    assert sae.tokens_since_fired.tolist() == [5] * 64
    assert all(p.grad is None for p in sae.parameters())


def test_evaluate_of_a_transcoder_is_about_its_target() -> None:
    data = source(333, d_out=10)
    sae = make(d_out=10, skip=True)
    x, target = (t.double() for t in next(in_order(data, 333)) if t is not None)
    with torch.no_grad():  # the mean alone leaves all of the variance
        assert sae.b_enc is not None
        sae.b_enc.fill_(-1e3)
        sae.b_dec.copy_(target.mean(0))
    assert evaluate(sae, data)["fvu"] == pytest.approx(1, rel=1e-6)
    train(sae, data, steps=20)
    reconstruction = dense(sae.eval(), parameters(sae), x, target)["reconstruction"].detach()
    error = (target - reconstruction).square().sum() / (target - target.mean(0)).square().sum()
    assert evaluate(sae, data)["fvu"] == pytest.approx(float(error), rel=1e-5)


# ---- transcoders ----


def test_a_transcoder_learns_a_map() -> None:
    # A linear map: with a skip connection nearly all of it can be learnt, without less.
    data, held_out = split(source(1000, d_out=10), 200)
    fvu = {}
    for skip in (True, False):
        sae = make(d_out=10, skip=skip, dead_after=500)
        before = evaluate(sae, held_out)["fvu"]
        train(sae, data, steps=300, batch_size=64, lr=3e-2)
        fvu[skip] = evaluate(sae, held_out)["fvu"]
        assert fvu[skip] < 0.5 < before
    assert fvu[True] < 0.1 and fvu[True] < fvu[False] / 3


# ---- what does not fit ----


MISMATCHES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "width": ({}, {"d": 15}, "tensor: expected width 16, got 15"),
    "target": ({}, {"d_out": 10}, "tensor: expected targets of width None, got 10"),
    "no-target": ({"d_out": 10}, {}, "tensor: expected targets of width 10, got None"),
    "target-width": ({"d_out": 9}, {"d_out": 10}, "tensor: expected targets of width 9, got 10"),
    "same-width": ({"d_out": 16}, {}, "tensor: expected targets of width 16, got None"),
}


@pytest.mark.parametrize(("config", "data", "message"), MISMATCHES.values(), ids=MISMATCHES)
def test_the_source_must_fit_the_sae(
    config: dict[str, Any], data: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer(make(**config), source(**data), TrainConfig())
    with pytest.raises(ValueError, match=message):
        evaluate(make(**config), source(**data))


NAN, INF = math.nan, math.inf
WRONG_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "steps": ({"steps": 0}, "steps: expected at least 1, got 0"),
    "steps-float": ({"steps": 2.5}, "steps: expected an integer, got 2.5"),
    "steps-bool": ({"steps": True}, "steps: expected an integer, got True"),
    "batch_size": ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
    "init_rows": ({"init_rows": -5}, "init_rows: expected at least 1, got -5"),
    "log_every": ({"log_every": 0}, "log_every: expected at least 1, got 0"),
    "seed": ({"seed": -1}, "seed: expected at least 0, got -1"),
    "warmup_steps": ({"warmup_steps": -1}, "warmup_steps: expected at least 0, got -1"),
    "lr": ({"lr": 0.0}, "lr: expected a finite number above 0, got 0.0"),
    "lr-nan": ({"lr": NAN}, "lr: expected a finite number above 0, got nan"),
    "lr-inf": ({"lr": INF}, "lr: expected a finite number above 0, got inf"),
    "clip": ({"clip": -1.0}, "clip: expected a finite number above 0, got -1.0"),
    "eps": ({"eps": 0.0}, "eps: expected a finite number above 0, got 0.0"),
    "beta1": ({"beta1": 1.0}, r"beta1: expected a number in \[0, 1\), got 1.0"),
    "beta2": ({"beta2": -0.1}, r"beta2: expected a number in \[0, 1\), got -0.1"),
    "beta2-nan": ({"beta2": NAN}, r"beta2: expected a number in \[0, 1\), got nan"),
    "decay": ({"decay_fraction": 1.1}, r"decay_fraction: expected a number in \[0, 1\], got 1.1"),
    "decay-form": ({"decay": "steps"}, "decay: expected linear or cosine, got 'steps'"),
    "ema": ({"ema": 1.0}, r"ema: expected a number in \[0, 1\), got 1.0"),
    "accumulate": ({"accumulate": 9, "batch_size": 8}, "accumulate: expected at most batch_size 8"),
    "keep": ({"keep": 0}, "keep: expected at least 1, got 0"),
    "checkpoint_every": ({"checkpoint_every": 0}, "checkpoint_every: expected at least 1, got 0"),
    "b_dec": ({"b_dec": "median"}, "b_dec: expected one of geometric_median, mean, zero, got 'me"),
    "optimizer": ({"optimizer": "sgd"}, "optimizer: expected one of adam, .*, got 'sgd'"),
}


@pytest.mark.parametrize(("settings", "message"), WRONG_SETTINGS.values(), ids=WRONG_SETTINGS)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)


# ---- the unit of speed ----


@pytest.mark.parametrize("f", [64, 5000], ids=["whole", "blocks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_product_seconds(f: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x, W = randn(20, 16), torch.nn.Parameter(randn(f, 16, seed=1).to(dtype))
    products: list[tuple[int, int]] = []
    mm = torch.mm

    def counted(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
        assert a.dtype == b.dtype == out.dtype == torch.float32
        products.append((b.shape[1], out.shape[1]))
        return mm(a, b, out=out)

    monkeypatch.setattr(torch, "mm", counted)
    seconds = product_seconds(x, W, repeats=3)
    assert 0 < seconds < math.inf
    assert all(block == width for block, width in products)
    # Every repeat is the whole product, in one piece or in pieces.
    assert sum(block for block, _ in products) == f * 3 * (1 if f == 64 else 2)
    assert max(block for block, _ in products) == f
