"""encode_batch: every bit, whatever the screen, the blocks, the threads and their timing."""

import functools

import numpy as np
import pytest
import torch
from common import (
    VARIANTS,
    backends,
    poisoned_empties,
    randint,
    randn,
    threads,
    variants,
    weights,
)
from encoders import (
    WHOLE,
    Case,
    all_ways,
    as_rows,
    assert_all_bits,
    check_any_number_of_threads,
    check_refuses_not_finite,
    check_refuses_overflow,
    not_finite,
    odd_scale,
    overflows,
    plain,
    pre_activations,
    problem_of,
    problems,
    scores,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastsae import cpu, reference


@pytest.fixture(autouse=True)
def poison():
    with poisoned_empties():
        yield


def expected(h: np.ndarray, score: np.ndarray, budget: int) -> list[Tensor]:
    room = min(budget, h.size)
    kept = np.zeros(h.size, bool)
    kept[np.argsort(-score.reshape(-1), kind="stable")[:room]] = True
    return as_rows(h, score, kept.reshape(h.shape) & (score > 0), room)


def equal_pairs(kinds: int) -> Case:  # far more equal scores than the pool holds
    x, W = randn(kinds, 20).abs(), randn(kinds, 20, seed=1).abs()
    which = randint(kinds, 160, seed=2).long(), randint(kinds, 900, seed=3).long()
    return Case(x[which[0]], W[which[1]], None, 1)


def hot_latent() -> Case:
    x, W, b, _, _ = plain(300, 400, 32, 1)
    b[123] = 100
    return Case(x, W, b, 1)


OWN = {
    "all-equal": functools.partial(equal_pairs, 1),
    "few-kinds": functools.partial(equal_pairs, 3),
    "hot-latent": hot_latent,
    "later-tokens-are-larger": lambda: plain(700, 150, 20, 1)._replace(
        x=randn(700, 20) * torch.arange(1, 701)[:, None]
    ),
}


problem = problem_of(OWN)
NAMES = [*OWN, *WHOLE]


@weights
@pytest.mark.parametrize("name", NAMES)
def test_bits(name, dtype):
    case, h = problem(name, dtype)
    budgets = [len(case.x) * 5 + 1, 1, h.size // 3, h.size + 7]
    results = [expected(h, h, budget) for budget in budgets]
    for i, forced in enumerate(all_ways()):
        j = (i + i // 4) % 4
        got = cpu.encode_batch(*case[:3], budgets[j], forced=forced)
        assert_all_bits(got, results[j])


@pytest.mark.parametrize("absolute", [False, True], ids=["h", "abs"])
@pytest.mark.parametrize("scaled", [False, True], ids=["unscaled", "scaled"])
@pytest.mark.parametrize("name", NAMES)
def test_scores(name, absolute, scaled):
    case, h = problem(name, torch.float32)
    scale = odd_scale(h.shape[1]) if scaled else None
    score = scores(h, scale, absolute)
    for i, forced in enumerate(all_ways()):
        if i % 4 == 1 + len(name) % 3:
            budget = (3 * len(h), h.size // 2)[i % 2]
            got = cpu.encode_batch(*case[:3], budget, scale=scale, absolute=absolute, forced=forced)
            assert_all_bits(got, expected(h, score, budget))


def test_infinite_scores():
    x, W = randn(200, 20) * 100, randn(300, 20, seed=1)
    scale = torch.ones(300)
    scale[5::7] = 3e38
    h = pre_activations(Case(x, W, None, 1))
    score = scores(h, scale)
    assert np.isinf(score).sum() > 2000
    for budget in (100, 1000, 5000):
        for forced in all_ways():
            got = cpu.encode_batch(x, W, None, budget, scale=scale, forced=forced)
            assert_all_bits(got, expected(h, score, budget))


@variants
def test_any_number_of_threads(isa, screen):
    case, h = problem("few-kinds", torch.float32)
    encode = functools.partial(cpu.encode_batch, budget=3000)
    check_any_number_of_threads(encode, case, expected(h, h, 3000), isa, screen)


def test_precision_bf16():
    x, W, b, _, _ = plain(60, 300, 70, 1)
    got = cpu.encode_batch(x, W, b, 500, "bf16")
    assert_all_bits(got, list(cpu.encode_batch(x.bfloat16().float(), W.bfloat16(), b, 500)))
    assert not torch.equal(got[0], cpu.encode_batch(x, W, b, 500)[0])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    problems(),
    st.sampled_from(VARIANTS),
    st.sampled_from([1, 2, 5]),
    st.sampled_from([0, 1, 64]),
    st.sampled_from([1, 10, 1000, 10**6]),
    st.booleans(),
    st.booleans(),
)
def test_bits_on_any_data(case, variant, count, block, budget, scaled, absolute):
    h = pre_activations(case)
    assume(np.isfinite(h).all())
    scale = odd_scale(h.shape[1]) if scaled else None
    forced = {"isa": variant[0], "screen": variant[1], "block_tokens": block, "threads": count}
    got = cpu.encode_batch(*case[:3], budget, scale=scale, absolute=absolute, forced=forced)
    assert_all_bits(got, expected(h, scores(h, scale, absolute), budget))


@backends
def test_by_hand(backend):
    encode_batch = {"reference": reference, "cpu": cpu}[backend].encode_batch
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [-1.0, -1.0]])
    W = torch.tensor([[1.0, 2], [3, 2], [-1, 2], [3, -2]])
    vals, idx, row_ptr = encode_batch(x, W, None, 4)
    assert vals.tolist() == [3, 3, 2, 2]
    assert idx.tolist() == [1, 3, 0, 1]
    assert row_ptr.tolist() == [0, 2, 4, 4, 4]
    vals, idx, row_ptr = encode_batch(x, W, None, 10)
    assert vals.tolist() == [3, 3, 1, 2, 2, 2, 0, 0, 0, 0]
    assert idx.tolist() == [1, 3, 0, 0, 1, 2, -1, -1, -1, -1]
    assert row_ptr.tolist() == [0, 3, 6, 6, 10]
    vals, idx, row_ptr = encode_batch(x, W, None, 3, absolute=True)
    assert vals.tolist() == [3, 3, -5]
    assert idx.tolist() == [1, 3, 1]
    assert row_ptr.tolist() == [0, 2, 2, 2, 3]


@backends
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (5, 7)])
def test_nothing(backend, shape):
    encode_batch = {"reference": reference, "cpu": cpu}[backend].encode_batch
    (n, f), budget = shape, 0 if min(shape) else 3
    vals, idx, row_ptr = encode_batch(torch.ones(n, 4), torch.ones(f, 4), None, budget)
    assert len(vals) == len(idx) == 0
    assert row_ptr.tolist() == [0] * (n + 1)


@variants
@overflows
def test_overflowing_pre_activations(kind, isa, screen):
    encode = functools.partial(cpu.encode_batch, budget=40)
    check_refuses_overflow(encode, kind, isa, screen)


@variants
@not_finite
def test_non_finite_inputs(bad, isa, screen):
    encode = functools.partial(cpu.encode_batch, budget=50)
    check_refuses_not_finite(encode, bad, isa, screen)


def test_says_what_is_wrong():
    x, W, b, _, _ = plain(4, 6, 5, 1)
    with pytest.raises(ValueError, match="budget: expected at least 0, got -1"):
        cpu.encode_batch(x, W, b, -1)
    with pytest.raises(ValueError, match=r"W_enc: expected shape \(\*, 5\), got \(6, 4\)"):
        cpu.encode_batch(x, W[:, 1:], b, 3)


def test_non_contiguous_tokens_and_huge_budgets():
    x, W, b, _, _ = plain(40, 300, 50, 1)
    x = x.t().contiguous().t()
    h = pre_activations(Case(x, W, b, 1))
    with threads(2):
        assert_all_bits(cpu.encode_batch(x, W, b, 2**62), expected(h, h, h.size))
