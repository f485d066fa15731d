"""encode_columns: every bit, whatever the screen, the blocks and the threads."""

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
    coarse,
    not_finite,
    overflowing,
    overflows,
    plain,
    pre_activations,
    problem_of,
    problems,
    screen_rounds,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastsae import cpu, reference


@pytest.fixture(autouse=True)
def poison():
    with poisoned_empties():
        yield


def needed(budgets: Tensor, n: int) -> int:
    return int(budgets.clamp(max=n).sum())


def expected(h: np.ndarray, budgets: Tensor, room: int) -> list[Tensor]:
    order = np.argsort(-h, axis=0, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(len(h))[:, None], axis=0)
    return as_rows(h, h, (rank < budgets.numpy()) & (h > 0), room if len(h) else 0)


def swapped(case: Case) -> Case:  # hard cases of encode, with tokens for latents
    return Case(case.W_enc, case.x, None, 1)


def equal_tokens(kinds: int) -> Case:
    x, W, b, _, _ = plain(kinds, 90, 20, 1)
    return Case(x[randint(kinds, 700, seed=2).long()], W, b, 1)


OWN = {
    "equal-tokens": functools.partial(equal_tokens, 1),
    "few-kinds-of-tokens": functools.partial(equal_tokens, 3),
    "rising": lambda: Case(torch.arange(1.0, 1501)[:, None], torch.ones(20, 1), None, 1),
    "falling": lambda: Case(torch.arange(1500.0, 0, -1)[:, None], torch.ones(20, 1), None, 1),
    "tokens-screen-rounds-first": lambda: swapped(screen_rounds(200, winner_first=True)),
    "tokens-screen-rounds-last": lambda: swapped(screen_rounds(200)),
    "coarse-latents": lambda: swapped(coarse(64, 96)),
}
BUDGETS = {
    "ones": torch.ones,
    "some": lambda f: randint(7, f),
    "zipf": lambda f: 400 // (1 + randn(f).argsort()),
    "many": lambda f: randint(200, f) * (randn(f, seed=1) > 1),
    "all": lambda f: torch.full((f,), 2.0**30),
}


problem = problem_of(OWN)
NAMES = [*OWN, *WHOLE]


@weights
@pytest.mark.parametrize("name", NAMES)
def test_bits(name, dtype):
    case, h = problem(name, dtype)
    all_budgets = [make(h.shape[1]).to(torch.int32) for make in BUDGETS.values()]
    rooms = [needed(budgets, len(h)) + i % 3 for i, budgets in enumerate(all_budgets)]
    results = [expected(h, *given) for given in zip(all_budgets, rooms, strict=True)]
    for i, forced in enumerate(all_ways()):
        j = i % 5
        got = cpu.encode_columns(*case[:3], all_budgets[j], rooms[j], forced=forced)
        assert_all_bits(got, results[j])


@variants
def test_any_number_of_threads(isa, screen):
    case, h = problem("few-kinds-of-tokens", torch.float32)
    budgets = torch.full((90,), 30, dtype=torch.int32)
    encode = functools.partial(cpu.encode_columns, budgets=budgets, room=2700)
    check_any_number_of_threads(encode, case, expected(h, budgets, 2700), isa, screen)


def test_precision_bf16():
    x, W, b, _, _ = plain(60, 300, 70, 1)
    budgets = torch.full((300,), 4, dtype=torch.int32)
    got = cpu.encode_columns(x, W, b, budgets, 1200, "bf16")
    rounded = cpu.encode_columns(x.bfloat16().float(), W.bfloat16(), b, budgets, 1200)
    assert_all_bits(got, list(rounded))
    assert not torch.equal(got[0], cpu.encode_columns(x, W, b, budgets, 1200)[0])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    problems(),
    st.sampled_from(VARIANTS),
    st.sampled_from([1, 2, 5]),
    st.sampled_from([0, 1, 64]),
    st.sampled_from(sorted(BUDGETS)),
    st.sampled_from([0, 5]),
)
def test_bits_on_any_data(case, variant, count, block, kind, more):
    h = pre_activations(case)
    assume(np.isfinite(h).all())
    budgets = BUDGETS[kind](h.shape[1]).to(torch.int32)
    room = needed(budgets, len(h)) + more
    forced = {"isa": variant[0], "screen": variant[1], "block_tokens": block, "threads": count}
    got = cpu.encode_columns(*case[:3], budgets, room, forced=forced)
    assert_all_bits(got, expected(h, budgets, room))


@backends
def test_by_hand(backend):
    encode_columns = {"reference": reference, "cpu": cpu}[backend].encode_columns
    x = torch.tensor([[1.0, 0], [2, 1], [2, -1], [-1, -1]])
    W = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [1, 1]])
    budgets = torch.tensor([1, 3, 2, 2], dtype=torch.int32)
    vals, idx, row_ptr = encode_columns(x, W, None, budgets, 8)
    assert vals.tolist() == [1, 3, 2, 1, 1, 0, 0, 0]
    assert idx.tolist() == [3, 3, 0, 1, 2, -1, -1, -1]
    assert row_ptr.tolist() == [0, 1, 4, 4, 8]


@backends
@pytest.mark.parametrize(
    ("n", "f", "room"), [(0, 5, 9), (5, 0, 0), (5, 0, 2), (0, 0, 0), (5, 7, 0)]
)
def test_nothing(backend, n, f, room):
    encode_columns = {"reference": reference, "cpu": cpu}[backend].encode_columns
    budgets = torch.full((f,), 0 if n else 1, dtype=torch.int32)
    vals, idx, row_ptr = encode_columns(torch.ones(n, 4), torch.ones(f, 4), None, budgets, room)
    room = room if n else 0
    assert vals.tolist() == [0] * room
    assert idx.tolist() == [-1] * room
    assert row_ptr.tolist() == [0] * n + [room]


@variants
@pytest.mark.parametrize("budget", [0, 3])
@overflows
def test_overflowing_pre_activations(kind, budget, isa, screen):
    budgets = torch.full((len(overflowing(kind).W_enc),), 3, dtype=torch.int32)
    budgets[600] = budget
    encode = functools.partial(cpu.encode_columns, budgets=budgets, room=int(budgets.sum()))
    check_refuses_overflow(encode, kind, isa, screen)


@variants
@not_finite
def test_non_finite_inputs(bad, isa, screen):
    budgets = torch.zeros(29, dtype=torch.int32)
    budgets[3] = 2
    encode = functools.partial(cpu.encode_columns, budgets=budgets, room=2)
    check_refuses_not_finite(encode, bad, isa, screen)


@backends
def test_says_what_is_wrong(backend):
    encode_columns = {"reference": reference, "cpu": cpu}[backend].encode_columns
    x, W, b, _, _ = plain(4, 3, 5, 1)
    budgets = torch.tensor([9, 0, 2], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"room: expected at least Σ min\(budgets, N\) = 6, got 5"):
        encode_columns(x, W, b, budgets, 5)
    with pytest.raises(ValueError, match="budgets: expected at least 0, got -7"):
        encode_columns(x, W, b, budgets - 7, 9)
    with pytest.raises(TypeError, match=r"budgets: expected .*int32, got .*int64"):
        encode_columns(x, W, b, budgets.long(), 9)
    if backend == "cpu":
        with pytest.raises(ValueError, match=r"budgets: expected shape \(3\), got \(2\)"):
            encode_columns(x, W, b, budgets[1:], 9)
        with pytest.raises(ValueError, match="room: expected at least 0, got -1"):
            encode_columns(x, W, b, budgets, -1)


def test_non_contiguous_tokens():
    x, W, b, _, _ = plain(40, 300, 50, 1)
    x = x.t().contiguous().t()
    budgets = torch.full((300,), 2, dtype=torch.int32)
    h = pre_activations(Case(x, W, b, 1))
    assert_all_bits(cpu.encode_columns(x, W, b, budgets, 600), expected(h, budgets, 600))
