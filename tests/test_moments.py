"""Moments in bfloat16 and int8, and bfloat16 parameters: bits, means, bounds, hostile values."""

import itertools
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from common import ISAS, NAN, instruction_set, randn, threads
from torch import Tensor

from fastsae import SAE, SAEConfig, TopK, cpu, moments, reference
from fastsae.data import open_source
from fastsae.moments import BLOCK, STATES
from fastsae.optim import Adam
from fastsae.selection import BatchTopK, ReLU
from fastsae.tensors import read_tensors
from fastsae.train import TrainConfig, Trainer

NARROW = ("bfloat16", "int8")
HYPER = (1e-2, 0.9, 0.99, 1e-8, 0.0, 1.0)  # lr, betas, eps, weight_decay, scale


class Row:
    """A parameter of some rows with stored moments; `step` gives it a dense gradient."""

    def __init__(self, f: int, d: int, state: str, *, m: bool = True, dtype=torch.float32) -> None:
        generator = torch.Generator().manual_seed(d)
        self.p = torch.randn(f, d, generator=generator).to(dtype)
        kinds = {
            "float32": (torch.float32, torch.float32),
            "bfloat16": (torch.bfloat16, torch.bfloat16),
            "int8": (torch.int8, torch.uint8),
        }
        self.m, self.v = (torch.zeros(f, d, dtype=kind) for kind in kinds[state])
        coded = state == "int8"
        self.scales = tuple(
            torch.zeros(f, moments.n_blocks(d)) if coded else None for _ in range(2)
        )
        if not m:
            self.m, self.scales = None, (None, self.scales[1])
        self.last = torch.zeros(f, dtype=torch.int32)

    @property
    def tensors(self) -> list[Tensor]:
        found = [self.p, self.m, self.v, *self.scales, self.last]
        return [t for t in found if t is not None]

    def step(self, dense: Tensor, step: int, run=cpu.adam_, hyper=HYPER, **options: Any) -> None:
        hyper = (hyper[0], hyper[1] if self.m is not None else 0.0, *hyper[2:])
        options = {"scales": self.scales, "stochastic_rounding": True, **options}
        run(self.p, dense, [], False, self.m, self.v, self.last, *hyper, step, False, **options)

    def read(self) -> list[Tensor]:
        stored = zip((self.m, self.v), self.scales, strict=True)
        return [moments.read(t, scale) for t, scale in stored if t is not None]


def gradients(n: int, f: int, d: int) -> list[Tensor]:
    """Columns differ by a factor of 10⁴; some entries, and a row, are 0."""
    generator = torch.Generator().manual_seed(n * f * d)
    sizes = torch.logspace(-4, 0, d)[torch.randperm(d, generator=generator)]
    found = [torch.randn(f, d, generator=generator) * sizes for _ in range(n)]
    for g in found:
        g[:, ::7] = 0
        g[-1] = 0
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("m", [True, False], ids=["m", "no-m"])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("d", [1, 15, 300, 513])
def test_bits_are_the_references(state: str, d: int, m: bool, dtype: torch.dtype) -> None:
    ours, theirs = Row(5, d, state, m=m, dtype=dtype), Row(5, d, state, m=m, dtype=dtype)
    for step, g in enumerate(gradients(6, 5, d), 1):
        ours.step(g, step, first_row=3)
        theirs.step(g, step, reference.adam_, first_row=3)
        for a, b in zip(ours.tensors, theirs.tensors, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("state", NARROW)
def test_bits_do_not_depend_on_instruction_sets(state: str, isa: str) -> None:
    found = []
    for forced, count in ((isa, 1), (ISAS[-1], 5)):
        row = Row(70, 301, state, dtype=torch.bfloat16)
        with instruction_set(forced, count):
            for step, g in enumerate(gradients(4, 70, 301), 1):
                row.step(g, step)
        found.append(row.tensors)
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_random_numbers_are_philox() -> None:
    """Philox4x32 with 7 rounds: of counter and key 0 the words that its authors' tests list."""
    of_moments, of_parameter = moments.random_words(0, torch.tensor([0]), 2)
    words = [*of_moments[0].tolist(), *of_parameter[0].tolist()]
    assert words == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    parts = moments.random_words(2**31 - 1, torch.tensor([5, 2**31 - 1]), 5)
    wide = moments.random_words(2**31 - 1, torch.tensor([2**31 - 1]), 8)
    for some, all_ in zip(parts, wide, strict=True):
        assert torch.equal(some[1:], all_[:, :5])


@pytest.mark.parametrize("kind", ["bfloat16", "m", "v"])
def test_means_are_right(kind: str) -> None:
    """Of 4000 draws of two neighbours each, within 5 deviations of a mean of so many."""
    x = torch.cat([torch.tensor([1.0]), torch.logspace(-3.5, -0.01, 200)])
    if kind == "m":
        x[1::2] *= -1
    rows = x.repeat(4000, 1)
    words, _ = moments.random_words(3, torch.arange(4000), len(x))
    like = {"bfloat16": torch.bfloat16, "m": torch.int8, "v": torch.uint8}[kind]
    codes, scale = moments.write(rows, torch.empty(0, dtype=like), words)
    found = moments.read(codes, scale).double()
    near = [found.amin(0), found.amax(0)]
    assert all(((found == near[0]) | (found == near[1])).all(0))
    assert (near[0] <= x).all() and (near[1] >= x).all() and (near[0] < near[1])[1:].any()
    spread = (near[1] - near[0]).clamp(min=1e-12)
    error = (found.mean(0) - x).abs() * math.sqrt(4000) / (0.5 * spread)
    assert error[near[1] > near[0]].max() < 5
    if kind != "bfloat16":  # what the docstring says of spacings
        t = (x.abs() if kind == "m" else x.sqrt()).double()
        lower, upper = (n.abs() if kind == "m" else n.sqrt() for n in near)
        assert (
            (upper - lower).abs() <= (2 * t.sqrt() + 0.01) / (127 if kind == "m" else 255)
        ).all()


@pytest.mark.parametrize("run", [cpu.adam_, reference.adam_], ids=["cpu", "reference"])
def test_v_never_becomes_nothing(run) -> None:
    """However far below the largest of its block, and where its square underflows."""
    for largest in (1e30, 1.0, 1e-15, 1e-20, 1e-22):
        row = Row(1, 256, "int8")
        g = torch.full((1, 256), largest * 1e-12).clamp(min=4e-22)
        g[0, 3], g[0, 4] = largest, 0
        g[0, 5] = -g[0, 6]
        start = row.p.clone()
        for step in range(1, 40):
            row.step(g, step, run, hyper=(1e-2, 0.9, 0.99, 0.0, 0.0, 1.0))
            m, v = row.read()
            changed = g.square() * (1 - 0.99) > 0
            assert (v[changed] >= 2.0**-126).all()
            assert (v[g == 0] == 0).all() and v.isfinite().all() and m.isfinite().all()
        moved = (row.p - start).abs()[changed]
        assert moved.isfinite().all() and moved.max() < 39 * 0.01 * 8


@pytest.mark.parametrize("state", NARROW)
@pytest.mark.parametrize("run", [cpu.adam_, reference.adam_], ids=["cpu", "reference"])
def test_hostile_gradients(run, state: str) -> None:
    row = Row(4, 300, state)
    g = torch.ones(4, 300)
    g[0] = 0
    g[1, :3] = torch.tensor([1e30, -1e30, 1e-40])
    g[2, 1] = NAN
    for step in (1, 2, 3):
        row.step(g, step, run)
    m, v = row.read()
    assert (m[0] == 0).all() and (v[0] == 0).all()
    assert m[[0, 1, 3]].isfinite().all() and row.p[[0, 1, 3]].isfinite().all()
    assert m[2, 1].isnan() and v[2, 1].isnan() and row.p[2, 1].isnan()
    assert m[2, BLOCK:].isfinite().all() and row.p[2, BLOCK:].isfinite().all()
    assert (m[3] > 0.2).all() and (m[3] < 0.34).all()


@pytest.mark.parametrize("state", NARROW)
def test_a_moment_follows_its_mean(state: str) -> None:
    """500 steps: the second moment of noise is right within percents, where nearest would stick."""
    row, wide = Row(4, 256, state), Row(4, 256, "float32")
    generator = torch.Generator().manual_seed(1)
    hyper = (1e-3, 0.9, 0.999, 1e-8, 0.0, 1.0)
    for step in range(1, 501):
        g = torch.randn(4, 256, generator=generator)
        row.step(g, step, hyper=hyper)
        wide.step(g, step, hyper=hyper)
    v, exact = row.read()[1], wide.v
    assert float((v / exact).mean()) == pytest.approx(1, abs=0.01)
    assert float((v / exact).std()) < 0.2
    for step in range(501, 1001):  # and is forgotten
        row.step(torch.zeros(4, 256), step, hyper=hyper)
    decay = 0.999**500
    assert float((row.read()[1] / v).mean()) == pytest.approx(decay, rel=0.02)


def test_small_steps_of_bf16_parameters_add_up() -> None:
    """400 steps of 1/2000 of a weight each: to nearest, none would be taken."""
    moved = {}
    for at_random in (False, True):
        row = Row(8, 300, "float32", dtype=torch.bfloat16)
        row.p.fill_(1.0)
        for step in range(1, 401):
            row.step(
                torch.ones(8, 300),
                step,
                hyper=(5e-4, 0.9, 0.99, 0.0, 0.0, 1.0),
                stochastic_rounding=at_random,
            )
        moved[at_random] = float(1 - row.p.float().mean())
    assert moved[False] == 0
    assert moved[True] == pytest.approx(0.2, rel=0.02)


# ---- the optimiser ----


def trained(state: str, backend: str | None = None, *, restart=True, dtype="float32", **options):
    """An SAE after 16 steps, and its optimiser; with restart a new one took over half-way."""
    config = SAEConfig(21, 300, TopK(4), dead_after=150, dtype=dtype)
    sae = SAE(config, backend=backend)
    options = {"lr": 2e-3, "unit_rows": [sae.W_dec], "state": state, "backend": backend, **options}
    optimizer = Adam(sae.parameters(), **options)
    generator = torch.Generator().manual_seed(7)
    for step in range(16):
        optimizer.zero_grad()
        sae.losses(torch.randn(48, 21, generator=generator)).loss.backward()
        optimizer.step()
        if restart and step == 8:
            kept = optimizer.state_dict()
            optimizer = Adam(sae.parameters(), **options)
            optimizer.load_state_dict(kept)
    return sae, optimizer


FORMS = {
    "adam": {},
    "lazy": {"lazy": True},
    "beta1=0": {"betas": (0.0, 0.99)},
    "decay": {"weight_decay": 0.1},
    "clip": {"clip": 0.01},
}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("state", NARROW)
def test_every_form_is_near_float32(state: str, options: dict, backend: str) -> None:
    (sae, optimizer), (wide, _) = (trained(s, backend, **options) for s in (state, "float32"))
    fresh = SAE(sae.config)
    for name in ("W_enc", "W_dec"):
        p, q, start = (getattr(s, name).detach() for s in (sae, wide, fresh))
        moved, apart = (q - start).norm(), (p - q).norm()
        assert 0 < apart < 0.25 * moved, (name, float(apart / moved))
        kept = optimizer.state[getattr(sae, name)]
        assert kept["exp_avg_sq"].dtype == (torch.uint8 if state == "int8" else torch.bfloat16)
        assert ("exp_avg" in kept) == (options.get("betas") is None)
    norms = sae.W_dec.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))
    assert sae.b_enc is not None
    for vector in (sae.b_enc, sae.b_dec):
        assert optimizer.state[vector]["exp_avg_sq"].dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("state", STATES)
def test_bits_do_not_depend_on_threads_or_a_restart(state: str, dtype: str) -> None:
    results = []
    for count in (1, 2, 5):
        with threads(count):
            sae, optimizer = trained(state, dtype=dtype, clip=0.02, restart=count > 1)
        kept = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
        results.append([*(p.detach() for p in sae.parameters()), *kept])
    for found in results[1:]:
        for a, b in zip(found, results[0], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("state", NARROW)
def test_blocks_of_rows_draw_as_the_whole_does(state: str) -> None:
    """A dense gradient, given whole, and in blocks of rows with the pieces of all state."""
    whole, parts = Row(11, 300, state), Row(11, 300, state)
    for step, g in enumerate(gradients(3, 11, 300), 1):
        whole.step(g, step)
        for start in (0, 4, 8):
            piece = Row(0, 300, state)
            piece.p, piece.m, piece.v, piece.last = (
                t[start : start + 4] for t in (parts.p, parts.m, parts.v, parts.last)
            )
            piece.scales = tuple(None if s is None else s[start : start + 4] for s in parts.scales)
            piece.step(g[start : start + 4], step, first_row=start)
    for a, b in zip(whole.tensors, parts.tensors, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("state", NARROW)
def test_blocks_of_a_step(state: str, monkeypatch) -> None:
    """A step that makes gradients block by block, of whatever size, gives the same bits."""
    found = []
    for block in (70, 300):
        monkeypatch.setattr("fastsae.blocked.BLOCK", block * 48)
        monkeypatch.setattr("fastsae.selection.per_pair.pair_limit", lambda n, f: -1)
        torch.manual_seed(0)
        sae = SAE(SAEConfig(21, 300, ReLU(l1_coef=1e-3), auxk_coef=0.0))
        optimizer = Adam(sae.parameters(), unit_rows=[sae.W_dec], state=state)
        for seed in range(3):
            optimizer.zero_grad()
            sae.losses(randn(48, 21, seed=seed)).loss.backward()
            assert optimizer.block_gradients
            optimizer.step()
        found.append([p.detach().clone() for p in sae.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-4)


@pytest.mark.parametrize("state", NARROW)
def test_a_step_that_is_not_valid_writes_nothing(state: str) -> None:
    sae, optimizer = trained(state)
    kept = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
    kept += [p.detach() for p in sae.parameters()]
    before = [t.clone() for t in kept]
    optimizer.zero_grad()
    sae.losses(randn(48, 21)).loss.backward()
    optimizer.step(valid=torch.tensor(False))
    for a, b in zip(kept, before, strict=True):
        assert torch.equal(a, b)


def test_codes_and_numbers_are_not_exchanged() -> None:
    for one, other in itertools.permutations(STATES, 2):
        sae, optimizer = trained(one)
        fresh = Adam(sae.parameters(), state=other)
        if "int8" in (one, other):
            with pytest.raises(ValueError, match=r"exp_avg_sq: expected (int8 codes|none with)"):
                fresh.load_state_dict(optimizer.state_dict())
            continue
        fresh.load_state_dict(optimizer.state_dict())
        found, given = (o.state[sae.W_dec]["exp_avg_sq"] for o in (fresh, optimizer))
        assert found.dtype == getattr(torch, other)
        torch.testing.assert_close(found.float(), given.float(), rtol=2**-8, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": (None, None)}, "v_scale: expected a torch.Tensor"),
        ({"scales": (torch.zeros(2, 1), torch.zeros(2, 1))}, r"v_scale: expected shape \(2, 2\)"),
        ({"m": torch.zeros(2, 300)}, "m: expected dtype int8, got float32"),
        ({"v": torch.zeros(2, 300)}, "m: expected dtype float32, got int8"),
        ({"m": None, "v": torch.zeros(2, 300)}, "m_scale, v_scale: expected None with moments of"),
    ],
)
def test_says_what_is_wrong(change: dict[str, Any], message: str) -> None:
    row = Row(2, 300, "int8")
    for name, value in change.items():
        setattr(row, name, value)
    with pytest.raises((TypeError, ValueError), match=message):
        row.step(torch.ones(2, 300), 1)


# ---- in a training ----


@pytest.mark.parametrize("state", STATES)
def test_a_training_goes_on_with_the_same_bits(state: str, tmp_path: Path) -> None:
    def trainer() -> Trainer:
        torch.manual_seed(0)
        sae = SAE(SAEConfig(40, 600, BatchTopK(4), dead_after=300, skip=True, d_out=40))
        config = TrainConfig(steps=12, batch_size=64, state=state, checkpoint_every=6)
        x = randn(512, 40)
        return Trainer(sae, open_source(x, x), config, out=tmp_path)

    through = trainer()
    through.run(progress=False)
    tensors = read_tensors(tmp_path / "step-6" / "training.safetensors")
    shutil.rmtree(tmp_path / "step-12")
    (tmp_path / "latest").unlink()
    again = trainer()
    assert again.resume() and again.step_count == 6
    again.run(progress=False)
    for (name, p), q in zip(through.sae.named_parameters(), again.sae.parameters(), strict=True):
        assert torch.equal(p, q), name
    kinds = {"int8": (torch.int8, torch.uint8), "bfloat16": (torch.bfloat16,) * 2}
    wanted = kinds.get(state, (torch.float32,) * 2)
    for name in ("W_enc", "W_skip"):
        assert (tensors[f"{name}/exp_avg"].dtype, tensors[f"{name}/exp_avg_sq"].dtype) == wanted
    assert (tensors.get("W_enc/exp_avg_scale") is not None) == (state == "int8")
