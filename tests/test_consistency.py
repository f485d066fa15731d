"""Matchings against scipy and brute force, what they certify, and the figures made of them."""

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from common import NAN, randn, refusals, run_child, threads
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fastsae import SAE, SAEConfig, TopK, cpu, matching, plan, reference
from fastsae.cli import main
from fastsae.consistency import compare, gt_mcc, pw_mcc
from fastsae.data import open_source
from fastsae.matching import match
from fastsae.organism import Organism
from fastsae.sums import unit_rows
from fastsae.train import TrainConfig, Trainer

methods = pytest.mark.parametrize("method", ["exact", "sparse"])


def related(n: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two dictionaries with clusters, noise of many sizes and rows of their own."""
    centres = randn(n // 8 + 1, d, seed=seed)
    A = centres.repeat(8, 1)[:n] + 0.6 * randn(n, d, seed=seed + 1)
    noise = 2 * torch.rand(n, 1, generator=torch.Generator().manual_seed(seed + 2))
    B = A + noise * randn(n, d, seed=seed + 3)
    B[: n // 4] = randn(n // 4, d, seed=seed + 4)
    return A, B[torch.randperm(n, generator=torch.Generator().manual_seed(seed + 5))]


@methods
def test_invariants(method: str) -> None:
    A = randn(300, 24)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    permuted = match(A, A[order], method=method)
    assert permuted.mean == pytest.approx(1, abs=1e-6)
    assert np.array_equal(order.numpy()[permuted.partners], np.arange(300))
    size = torch.rand(300, 1, generator=torch.Generator().manual_seed(2)) + 0.01
    scaled = match(A, size * A, method=method)
    assert scaled.mean == pytest.approx(1, abs=1e-6)
    assert np.array_equal(scaled.partners, np.arange(300))
    assert match(A, -A, method=method).mean < 0.7  # the nearest of others, never a row's own
    few = randn(10, 24)
    assert match(few, -few, method=method).mean < 0.5


@methods
def test_signed_and_zero_rows(method: str) -> None:
    A = torch.eye(4)[[0, 1, 2, 2]]
    A[3] = 0
    found = match(A, -A, method=method)
    assert found.mean == pytest.approx(0, abs=1e-9) and sorted(found.partners) == [0, 1, 2, 3]
    one = match(torch.tensor([[1.0, 0.0]]), torch.tensor([[-3.0, 0.0]]), method=method)
    assert one.mean == -1 and one.gap >= 0 and one.nearest[0] == 0


def test_exact_is_the_best_of_all_permutations() -> None:
    for seed in range(5):
        A, B = randn(6, 3, seed=seed), randn(6, 3, seed=seed + 50)
        cosines = unit_rows(A).double() @ unit_rows(B).double().T
        best = max(
            sum(float(cosines[i, j]) for i, j in enumerate(order)) / 6
            for order in itertools.permutations(range(6))
        )
        found = match(A, B)
        assert found.mean == pytest.approx(best, abs=1e-6) and found.gap == 0
        assert np.allclose(found.nearest, cosines.max(1).values.clip(0).numpy(), atol=1e-6)


@pytest.mark.parametrize("candidates", [1, 3, 32])
@pytest.mark.parametrize("d", [4, 48])
def test_sparse_is_within_what_it_certifies(d: int, candidates: int) -> None:
    for seed in range(3):
        A, B = related(400, d, seed)
        exact = match(A, B, method="exact")
        found = match(A, B, method="sparse", candidates=candidates)
        assert sorted(found.partners) == list(range(400))
        cosines = (unit_rows(A).double() * unit_rows(B).double()[found.partners]).sum(1)
        assert np.allclose(found.cosines, cosines.numpy(), atol=1e-6)
        assert found.mean <= exact.mean + 1e-6 and exact.mean <= found.upper + 1e-6
        assert 0 <= found.gap <= 0.01
        assert np.allclose(found.nearest, exact.nearest, atol=1e-6)


def test_a_smaller_gap_is_kept_too() -> None:
    A, B = related(300, 12)
    found, exact = match(A, B, method="sparse", gap=1e-4), match(A, B, method="exact")
    assert found.gap <= 1e-4 and exact.mean - found.mean <= 1e-4 + 1e-6


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_bound_holds_for_any_rows(data: st.DataObject) -> None:
    """Also with rows of zeros, equal rows, opposite ones, and fewer of A than of B."""
    m = data.draw(st.integers(1, 9))
    n = data.draw(st.integers(1, m))
    numbers = st.lists(st.integers(-2, 2), min_size=2, max_size=2)
    A = torch.tensor(data.draw(st.lists(numbers, min_size=n, max_size=n))).float()
    B = torch.tensor(data.draw(st.lists(numbers, min_size=m, max_size=m))).float()
    candidates = data.draw(st.integers(1, 4))
    found = match(A, B, method="sparse", candidates=candidates)
    exact = match(A, B, method="exact")
    assert len(set(found.partners.tolist())) == n and found.partners.max() < m
    assert found.mean - 1e-6 <= exact.mean <= found.upper + 1e-6
    cosines = unit_rows(A).double() @ unit_rows(B).double().T
    rows, best = linear_sum_assignment(cosines.clip(min=0).numpy(), maximize=True)
    assert found.upper <= float(cosines.clip(min=0)[rows, best].mean()) + 0.01


@pytest.mark.parametrize("auction", [reference.auction, cpu.auction], ids=["reference", "cpu"])
def test_an_auction_is_within_its_steps_of_the_best(auction: Callable) -> None:
    rng = np.random.default_rng(0)
    for step in (0.1, 1e-3):
        values, columns = rng.random((30, 5)), rng.integers(0, 30, (30, 5), np.int32)
        values[rng.random((30, 5)) < 0.2] = -np.inf
        values[3] = -np.inf
        found = auction(torch.from_numpy(values), torch.from_numpy(columns), 31, step)
        partners, prices = (t.numpy() for t in found)
        assert partners[3] == -1 and (prices >= 0).all()
        used = partners[partners >= 0]
        assert len(set(used)) == len(used) and (prices[np.setdiff1d(range(31), used)] == 0).all()
        dense = np.zeros((30, 61))  # nothing gains 0
        for i in range(30):
            for value, j in zip(values[i], columns[i], strict=True):
                dense[i, j] = max(dense[i, j], value)
        rows, best = linear_sum_assignment(dense, maximize=True)
        got = sum(dense[i, j] for i, j in enumerate(partners) if j >= 0)
        assert dense[rows, best].sum() - 30 * step <= got <= dense[rows, best].sum() + 1e-9


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_auctions_agree_to_the_bit(data: st.DataObject) -> None:
    """Also with equal values, a column twice in a row, rows of nothing, and no rows."""
    n, c, m = (data.draw(st.integers(least, 6)) for least in (0, 1, 1))
    row = st.lists(st.sampled_from([-np.inf, -1.0, 0.0, 0.3, 0.7, 1.0]), min_size=c, max_size=c)
    ids = st.lists(st.integers(0, m - 1), min_size=c, max_size=c)
    values = torch.tensor(data.draw(st.lists(row, min_size=n, max_size=n))).double().view(n, c)
    columns = torch.tensor(data.draw(st.lists(ids, min_size=n, max_size=n))).int().view(n, c)
    step = data.draw(st.sampled_from([0.01, 0.25, 1.0]))
    got, expected = (f(values, columns, m, step) for f in (cpu.auction, reference.auction))
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def test_many_equal_rows_end() -> None:
    """Their candidates are the same few, so the bound is loose, but the mean is right."""
    A, B = randn(400, 32), randn(400, 32, seed=1)
    A[:200], B[:200] = A[0], A[0]
    found, exact = match(A, B, method="sparse"), match(A, B)
    assert exact.mean - found.mean < 1e-3 and exact.mean <= found.upper + 1e-6
    assert found.gap == found.upper - found.mean < 0.2


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    A, B = related(60, 8)
    expected = match(A, B, method="sparse", backend="reference")
    monkeypatch.setattr(cpu, "available", lambda: False)
    got = match(A, B, method="sparse")
    assert np.array_equal(got.partners, expected.partners) and got.upper == expected.upper


def test_nothing_depends_on_threads_or_backend() -> None:
    A, B = related(200, 20)
    found = []
    for count, backend in ((1, "cpu"), (3, "cpu"), (1, "reference")):
        with threads(count):
            found.append(match(A, B, method="sparse", candidates=4, backend=backend))
    assert found[0].mean == found[1].mean and found[0].upper == found[1].upper
    assert np.array_equal(found[0].partners, found[1].partners)
    assert found[2].mean == pytest.approx(found[0].mean, abs=1e-3)


def test_sparse_needs_no_square_matrix() -> None:
    grown = run_child("""
        import torch
        from pathlib import Path
        from fastsae.matching import match

        def peak():
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

        torch.set_num_threads(1)
        A = torch.randn(16384, 8)
        match(A[:64], A[64:128], method="sparse")
        before = peak()
        match(A, A[torch.randperm(16384)], method="sparse", candidates=4)
        print(peak() - before)
    """)
    assert int(grown) * 1024 < 16384**2  # bytes: a quarter of the float32 matrix


def test_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    A = randn(8, 4)
    with pytest.raises(RuntimeError, match=r"needs scipy: pip install 'fastsae-engine\[consi"):
        match(A, A)
    assert match(A, A, method="sparse").mean == pytest.approx(1)
    monkeypatch.setattr(matching, "EXACT_ROWS", 7)
    assert match(A, A).mean == pytest.approx(1)


def test_an_exact_matching_that_has_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "available", lambda: 511)
    with pytest.raises(MemoryError, match=r"8 rows needs 512 bytes, there are 511"):
        match(randn(8, 4), randn(8, 4))


@refusals(
    "A, B, options, message",
    [
        (randn(4), randn(4, 2), {}, "A: expected a floating matrix"),
        (randn(4, 2), randn(4, 2).int(), {}, "B: expected a floating matrix"),
        (randn(4, 2), randn(4, 3), {}, "B: expected width 2"),
        (randn(5, 2), randn(4, 2), {}, "A: expected 1 to 4 rows"),
        (randn(0, 2), randn(4, 2), {}, "A: expected 1 to 4 rows"),
        (randn(4, 2), randn(4, 2), {"method": "greedy"}, "method: expected exact or sparse"),
        (randn(4, 2), randn(4, 2), {"gap": 0}, r"gap in \[1e-5, 1\]"),
        (randn(4, 2), randn(4, 2), {"gap": NAN}, r"gap in \[1e-5, 1\]"),
        (randn(4, 2), randn(4, 2), {"candidates": 0}, "candidates >= 1"),
        (randn(4, 2), randn(4, 2) * NAN, {}, "B: expected finite"),
        (randn(4, 2) / 0, randn(4, 2), {"method": "sparse"}, "A: expected finite"),
    ],
)
def test_refused(A: Tensor, B: Tensor, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        match(A, B, **options)


# ---- several runs ----


def test_pairs_and_their_mean() -> None:
    A = randn(40, 16)
    B, C = A.flip(0), randn(40, 16, seed=9)
    found = pw_mcc([A, B, C])
    assert [(pair.first, pair.second) for pair in found.pairs] == [(0, 1), (0, 2), (1, 2)]
    other = match(A, C).mean
    assert [pair.decoder.mean for pair in found.pairs] == pytest.approx([1, other, other])
    assert found.pw_mcc == pytest.approx((1 + 2 * other) / 3)
    assert found.deviation == pytest.approx(np.std([1, other, other])) and found.gap == 0
    with pytest.raises(ValueError, match="encoders, got one without"):
        _ = found.pairs[0].agreement
    with pytest.raises(ValueError, match="at least two runs to compare, got 1"):
        pw_mcc([A])
    with pytest.raises(ValueError, match=r"expected runs of one shape, \(40, 16\), got \(39"):
        pw_mcc([A, A[1:]])


def test_shared_latents_have_one_partner_and_are_close() -> None:
    a, b = (SAE(SAEConfig(12, 8, TopK(2)), seed=seed) for seed in (0, 1))
    eye = torch.eye(12)[:8]
    near = eye + 0.9 * torch.eye(12)[[8, 8, 8, 8, 9, 9, 9, 9]]  # at a cosine of 0.74
    far = eye + 1.2 * torch.eye(12)[[8, 8, 8, 8, 9, 9, 9, 9]]  # at 0.64
    with torch.no_grad():
        a.W_dec.copy_(eye)
        a.W_enc.copy_(3 * eye)
        b.W_dec.copy_(near)
        b.W_dec[7] = far[7]
        b.W_enc.copy_(near)
        b.W_enc[0], b.W_enc[1] = near[1], near[0]  # two encoders change places
        b.W_enc[6] = far[6]
    (pair,) = compare([a, b]).pairs
    assert pair.decoder.partners.tolist() == list(range(8))
    assert pair.encoder is not None and pair.encoder.partners.tolist() == [1, 0, *range(2, 8)]
    assert pair.agreement == 6 / 8
    assert pair.shared() == 4 / 8 and pair.shared(0.6) == 6 / 8 and pair.shared(0.8) == 0


@pytest.mark.parametrize("count", [1, 3, 40])
def test_nearest_others_are_those_of_the_whole_matrix(count: int) -> None:
    units = unit_rows(torch.cat([related(30, 5)[0], torch.zeros(2, 5), randn(1, 5)]))
    units[4] = units[9] = units[2]  # the first of equal ones first, and never the row itself
    cosines = units.double() @ units.double().T
    cosines.fill_diagonal_(-2)
    rows = np.array([0, 2, 4, 9, 31, 32])
    values, ids = matching.nearest_others(units, rows, count)
    assert values.shape == ids.shape == (6, min(count, 33))
    for row, found, near in zip(rows, values, ids, strict=True):
        there = found > 0
        expected = cosines[row].sort(descending=True).values.numpy()[: len(found)]
        assert np.allclose(found[there], expected[expected > 1e-7], atol=1e-6)
        assert np.allclose(cosines[row].numpy()[near[there]], found[there], atol=1e-6)
        assert row not in near[there] and len(set(near[there])) == there.sum()
        assert (found[~there] == -np.inf).all() and (found <= 1).all()
    assert ids[1, 0] == 4 and ids[2, 0] == 2 and ids[3, 0] == 2
    assert (values[4] == -np.inf).all()


def test_histogram_of_cosines() -> None:
    counts = matching.cosine_histogram(np.array([-1, -0.95, -1e-12, 0, 0.05, 0.3, 0.999, 1]))
    assert {i: n for i, n in enumerate(counts) if n} == {0: 1, 1: 1, 20: 2, 21: 1, 26: 1, 39: 2}
    assert matching.cosine_histogram(np.empty(0)) == [0] * 40


def test_compare_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(3):
        SAE(SAEConfig(12, 20, TopK(2)), seed=seed).save(tmp_path / str(seed))
    names = [str(tmp_path / str(seed)) for seed in range(3)]
    out = tmp_path / "0" / "consistency.json"
    main(["compare", *names, "--json", "--out", str(out)])
    said = json.loads(capsys.readouterr().out)
    assert json.loads(out.read_text()) == said and said["runs"] == names
    for pair, (i, j) in zip(said["pairs"], ((0, 1), (0, 2), (1, 2)), strict=True):
        found = match(*(SAE.load(names[n]).W_dec for n in (i, j)))
        assert pair["runs"] == [i, j] and sum(pair["histogram"]) == 20
        assert pair["histogram"] == matching.cosine_histogram(found.cosines)
    main(["compare", *names, "--out", str(out)])
    assert f"PW-MCC {said['pw_mcc']:.4f}" in capsys.readouterr().out


# ---- the model organism ----


def test_organism_is_what_it_says() -> None:
    organism = Organism(n_features=20, d=10, k=4, seed=3)
    x, coefficients = organism.sample(500, seed=1)
    assert x.shape == (500, 10) and ((coefficients > 0).sum(1) == 4).all()
    assert torch.allclose(organism.features.norm(dim=1), torch.ones(20))
    assert torch.equal(x, coefficients @ organism.features)
    used = (coefficients > 0).float().mean(0)
    assert (used > 0.1).all() and (used < 0.3).all()
    size = coefficients[coefficients > 0]  # |N(0, 1)| has a mean of 0.798
    assert size.mean() == pytest.approx(0.798, abs=0.05)
    assert not torch.equal(x, organism.sample(500, seed=2)[0])
    assert torch.equal(x, Organism(20, 10, 4, 3).sample(500, 1)[0])
    for wrong in ((3, 0, 1), (3, 5, 4), (3, 5, 0)):
        with pytest.raises(ValueError, match=r"k in \[1, 3\]"):
            Organism(*wrong)


def test_training_raises_both_figures() -> None:
    organism = Organism()
    x, _ = organism.sample(20_000)

    def train(steps: int, seed: int) -> Tensor:
        sae = SAE(SAEConfig(16, 32, TopK(3)), seed=seed)
        settings = TrainConfig(steps=steps, batch_size=512, lr=3e-3, seed=seed, b_dec="zero")
        Trainer(sae, open_source(x), settings).run(progress=False)
        return sae.W_dec.detach()

    figures = []
    for steps in (5, 500):
        decoders = [train(steps, seed) for seed in range(2)]
        truths = [gt_mcc(organism.features, W_dec).mean for W_dec in decoders]
        figures.append((pw_mcc(decoders).pw_mcc, sum(truths) / 2))
    (pw_before, gt_before), (pw_after, gt_after) = figures
    assert pw_after > pw_before + 0.1 and gt_after > gt_before + 0.1 and gt_after > 0.7
    fewer = gt_mcc(organism.features[:10], decoders[0])
    assert fewer.partners.shape == (10,) and fewer.mean > 0.7
