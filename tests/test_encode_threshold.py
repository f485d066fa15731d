"""encode_threshold: every bit, whatever the screen, the blocks and the threads."""

import functools

import numpy as np
import pytest
import torch
from common import (
    INF,
    NAN,
    VARIANTS,
    backends,
    poisoned_empties,
    randint,
    variants,
    weights,
)
from encoders import (
    WHOLE,
    Case,
    all_ways,
    as_rows,
    assert_all_bits,
    case_and_h,
    check_any_number_of_threads,
    check_refuses_not_finite,
    check_refuses_overflow,
    not_finite,
    overflowing,
    overflows,
    plain,
    pre_activations,
    problems,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastsae import cpu, reference


@pytest.fixture(autouse=True)
def poison():
    with poisoned_empties():
        yield


def expected(h: np.ndarray, thresholds: Tensor) -> list[Tensor]:
    kept = h > thresholds.numpy()
    return as_rows(h, h, kept, int(kept.sum()))


def quantile(h: np.ndarray, q: float) -> Tensor:  # one of the latent's values, so not itself kept
    if not len(h):
        return torch.zeros(h.shape[1])
    return torch.from_numpy(np.sort(h, axis=0)[int((len(h) - 1) * q)].copy())


def just_below(h: np.ndarray) -> Tensor:  # each latent's largest value, so that it alone is kept
    return torch.from_numpy(np.nextafter(quantile(h, 1).numpy(), np.float32(-INF)))


def mixed(h: np.ndarray) -> Tensor:
    special = torch.tensor([INF, -INF, 0.0, -0.0, 3e38, -3e38, 1e-45])
    special = special[torch.arange(h.shape[1]) % 7]
    return torch.where(randint(4, h.shape[1]) == 0, special, quantile(h, 0.9))


THRESHOLDS = {
    "just-below": just_below,
    "rare": functools.partial(quantile, q=0.99),
    "common": functools.partial(quantile, q=0.3),
    "mixed": mixed,
    "none": lambda h: torch.full((h.shape[1],), -INF),
}


@weights
@pytest.mark.parametrize("name", WHOLE)
def test_bits(name, dtype):
    case, h = case_and_h(name, dtype)
    thresholds = [make(h) for make in THRESHOLDS.values()]
    results = [expected(h, t) for t in thresholds]
    for i, forced in enumerate(all_ways()):
        j = i % 5
        got = cpu.encode_threshold(*case[:3], thresholds[j], forced=forced)
        assert_all_bits(got, results[j])


@variants
def test_any_number_of_threads(isa, screen):
    case, h = case_and_h("random", torch.float32)
    thresholds = quantile(h, 0.9)
    encode = functools.partial(cpu.encode_threshold, thresholds=thresholds)
    check_any_number_of_threads(encode, case, expected(h, thresholds), isa, screen)


def test_precision_bf16():
    x, W, b, _, _ = plain(60, 300, 70, 1)
    thresholds = torch.full((300,), 9.0)
    got = cpu.encode_threshold(x, W, b, thresholds, None, "bf16")
    rounded = cpu.encode_threshold(x.bfloat16().float(), W.bfloat16(), b, thresholds)
    assert_all_bits(got, list(rounded))
    fp32 = cpu.encode_threshold(x, W, b, thresholds)
    assert fp32[0].shape != got[0].shape or not torch.equal(fp32[0], got[0])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    problems(),
    st.sampled_from(VARIANTS),
    st.sampled_from([1, 2, 5]),
    st.sampled_from([0, 1, 64]),
    st.sampled_from(sorted(THRESHOLDS)),
)
def test_bits_on_any_data(case, variant, count, block, kind):
    h = pre_activations(case)
    assume(np.isfinite(h).all())
    thresholds = THRESHOLDS[kind](h)
    forced = {"isa": variant[0], "screen": variant[1], "block_tokens": block, "threads": count}
    got = cpu.encode_threshold(*case[:3], thresholds, forced=forced)
    assert_all_bits(got, expected(h, thresholds))


@backends
def test_by_hand(backend):
    encode_threshold = {"reference": reference, "cpu": cpu}[backend].encode_threshold
    x = torch.tensor([[1.0, 0], [2, 1], [-0.0, 0], [-1, -1]])
    W, b = torch.tensor([[1.0, 0], [0, 1], [1, 1], [0, 0]]), torch.tensor([0.0, 0, 0, -0.0])
    thresholds = torch.tensor([0.0, -1, 1, -1])
    vals, idx, row_ptr = encode_threshold(x, W, b, thresholds)
    assert vals.tolist() == [1, 0, 0, 3, 2, 1, 0, 0, 0, 0]
    assert idx.tolist() == [0, 1, 3, 2, 0, 1, 3, 1, 3, 3]
    assert row_ptr.tolist() == [0, 3, 7, 9, 10]


@backends
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (5, 7)])
def test_nothing(backend, shape):
    encode_threshold = {"reference": reference, "cpu": cpu}[backend].encode_threshold
    (n, f), high = shape, torch.full((shape[1],), INF)
    vals, idx, row_ptr = encode_threshold(torch.ones(n, 4), torch.ones(f, 4), None, high)
    assert len(vals) == len(idx) == 0
    assert row_ptr.tolist() == [0] * (n + 1)


def test_limit():
    x, W, b, _, _ = plain(70, 500, 40, 1)
    thresholds = torch.full((500,), 5.0)
    nnz = len(reference.encode_threshold(x, W, b, thresholds)[0])
    assert nnz > 1000
    message = "more than {} pairs pass their thresholds"
    for forced in all_ways():
        assert len(cpu.encode_threshold(x, W, b, thresholds, nnz, forced=forced)[0]) == nnz
        for limit in (nnz - 1, 0):
            with pytest.raises(reference.TooManyPairs, match=message.format(limit)):
                cpu.encode_threshold(x, W, b, thresholds, limit, forced=forced)
    with pytest.raises(reference.TooManyPairs, match=message.format(nnz - 1)):
        reference.encode_threshold(x, W, b, thresholds, nnz - 1)


def test_stops_early():
    """2**34 pairs pass: 256 GiB if they were kept. x and W are small, each one row many times."""
    x, W = torch.ones(1, 8).expand(2**16, 8), torch.ones(1, 8).expand(2**18, 8)
    with pytest.raises(reference.TooManyPairs):
        cpu.encode_threshold(x, W, None, torch.zeros(2**18), 10**6)


@variants
@pytest.mark.parametrize("threshold", [INF, 0.0])
@overflows
def test_overflowing_pre_activations(kind, threshold, isa, screen):
    thresholds = torch.full((len(overflowing(kind).W_enc),), 1e9)
    thresholds[600] = threshold
    encode = functools.partial(cpu.encode_threshold, thresholds=thresholds)
    check_refuses_overflow(encode, kind, isa, screen)


@variants
@not_finite
def test_non_finite_inputs(bad, isa, screen):
    encode = functools.partial(cpu.encode_threshold, thresholds=torch.full((29,), 5.0))
    check_refuses_not_finite(encode, bad, isa, screen)


@backends
def test_says_what_is_wrong(backend):
    encode_threshold = {"reference": reference, "cpu": cpu}[backend].encode_threshold
    x, W, b, _, _ = plain(4, 3, 5, 1)
    with pytest.raises(ValueError, match="thresholds: expected numbers, got a NaN"):
        encode_threshold(x, W, b, torch.tensor([0, NAN, 1]))
    if backend == "cpu":
        with pytest.raises(ValueError, match=r"thresholds: expected shape \(3\), got \(2\)"):
            encode_threshold(x, W, b, torch.zeros(2))
        with pytest.raises(TypeError, match="thresholds: expected dtype float32, got float64"):
            encode_threshold(x, W, b, torch.zeros(3).double())


def test_non_contiguous_tokens():
    x, W, b, _, _ = plain(40, 300, 50, 1)
    x = x.t().contiguous().t()
    thresholds = torch.full((300,), 8.0)
    h = pre_activations(Case(x, W, b, 1))
    assert_all_bits(cpu.encode_threshold(x, W, b, thresholds), expected(h, thresholds))
