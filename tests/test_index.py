"""index: for each latent its tokens, ascending, and where its pairs are; integers, so exactly."""

import pytest
import torch
from common import (
    backends,
    instruction_set,
    isas,
    poisoned_empties,
    ragged,
    random_codes,
    refusals,
    threads,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastsae import cpu, reference

MODULES = {"reference": reference, "cpu": cpu}


@pytest.fixture(autouse=True)
def poison():
    with poisoned_empties():
        yield


def by_hand(idx: Tensor, n_latents: int, row_ptr: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    if row_ptr is None:
        row_ptr = torch.arange(len(idx) + 1) * idx.shape[1]
    flat, bounds = idx.reshape(-1).tolist(), row_ptr.tolist()
    pairs: list[list[tuple[int, int]]] = [[] for _ in range(n_latents)]
    for n in range(len(bounds) - 1):
        for entry in range(bounds[n], bounds[n + 1]):
            if flat[entry] >= 0:
                pairs[flat[entry]].append((n, entry))
    ends = torch.tensor([0] + [len(p) for p in pairs]).cumsum(0)
    token, entry = torch.tensor([pair for p in pairs for pair in p]).view(-1, 2).int().T
    return ends, token, entry


def check(module, idx: Tensor, n_latents: int, row_ptr: Tensor | None = None) -> None:
    latent_ptr, token, entry = module.inverse_index(idx, n_latents, row_ptr)
    expected = by_hand(idx, n_latents, row_ptr)
    assert (latent_ptr.dtype, token.dtype, entry.dtype) == (torch.int64, torch.int32, torch.int32)
    assert torch.equal(latent_ptr, expected[0])
    stored = len(expected[1])
    assert torch.equal(token[:stored], expected[1])
    assert torch.equal(entry[:stored], expected[2])


def hot() -> tuple[Tensor, int]:  # one latent in every token, some twice, most nowhere
    idx = random_codes(300, 8, 5000)[1]
    idx[:, 3] = 777
    idx[::2, 5] = 777
    return idx, 5000


CASES = {
    "random": lambda: (random_codes(100, 7, 50)[1], 50),
    "n0": lambda: (torch.empty(0, 7, dtype=torch.int32), 50),
    "k0": lambda: (torch.empty(7, 0, dtype=torch.int32), 50),
    "one-pair": lambda: (torch.zeros(1, 1, dtype=torch.int32), 1),
    "one-latent": lambda: (torch.zeros(20, 6, dtype=torch.int32), 1),
    "no-latents": lambda: (torch.full((20, 6), -1, dtype=torch.int32), 0),
    "all-padding": lambda: (torch.full((20, 6), -1, dtype=torch.int32), 9),
    "hot": hot,
    "few-of-many": lambda: (random_codes(3, 2, 9_000)[1], 9_000),
    "first-and-last": lambda: (torch.tensor([[9, 0], [0, 9], [-1, 9]], dtype=torch.int32), 10),
    "fewer-latents-than-threads": lambda: (random_codes(40, 3, 3)[1], 3),
}


@isas
@pytest.mark.parametrize("rows", ["padded", "ragged"])
@pytest.mark.parametrize("name", CASES)
def test_index(name, rows, isa):
    idx, n_latents = CASES[name]()
    row_ptr = None
    if rows == "ragged":
        _, idx, row_ptr = ragged(idx.float(), idx)
    for count in (1, 2, 5):
        with instruction_set(isa, count):
            check(cpu, idx, n_latents, row_ptr)


@pytest.mark.parametrize("rows", ["padded", "ragged"])
@pytest.mark.parametrize("name", CASES)
def test_reference(name, rows):
    idx, n_latents = CASES[name]()
    row_ptr = None
    if rows == "ragged":
        _, idx, row_ptr = ragged(idx.float(), idx)
    check(reference, idx, n_latents, row_ptr)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_any_rows(data):
    n_latents = data.draw(st.integers(1, 40))
    rows = data.draw(st.lists(st.lists(st.integers(-1, n_latents - 1), max_size=9), max_size=30))
    lengths = torch.tensor([0] + [len(r) for r in rows])
    idx = torch.tensor([i for r in rows for i in r], dtype=torch.int32)
    with threads(data.draw(st.sampled_from([1, 2, 7]))):
        for module in (cpu, reference):
            check(module, idx, n_latents, lengths.cumsum(0))


def test_more_entries_than_int16():
    idx = torch.arange(200_000, dtype=torch.int32).flip(0).view(50_000, 4) % 70_000
    latent_ptr, token, entry = cpu.inverse_index(idx, 70_000)
    assert torch.equal(latent_ptr.diff(), idx.long().view(-1).bincount(minlength=70_000))
    assert torch.equal(token, entry // 4)
    latents = torch.arange(70_000).repeat_interleave(latent_ptr.diff())
    assert torch.equal(idx.view(-1)[entry.long()].long(), latents)
    within = torch.ones(200_000, dtype=torch.bool)
    within[latent_ptr[1:-1]] = False
    assert (entry.diff() > 0)[within[1:]].all()


@backends
def test_padding_between_pairs(backend):
    idx = torch.tensor([[-1, 2, -1], [2, -1, 0], [-1, -1, -1], [0, 2, 2]], dtype=torch.int32)
    latent_ptr, token, entry = MODULES[backend].inverse_index(idx, 4)
    assert latent_ptr.tolist() == [0, 2, 2, 6, 6]
    assert token[:6].tolist() == [1, 3, 0, 1, 3, 3]
    assert entry[:6].tolist() == [5, 9, 1, 3, 10, 11]


@pytest.mark.parametrize("bad", [5, 2**31 - 1, -2, -(2**31)])
def test_ids_out_of_range(bad):
    for at in (0, 11, 23):
        idx = torch.zeros(6, 4, dtype=torch.int32)
        idx.view(-1)[at] = bad
        with pytest.raises(IndexError, match=rf"idx: expected .*\[-1, 5\), got {bad} at .* {at}$"):
            cpu.inverse_index(idx, 5)


@refusals(
    "idx, row_ptr, error, message",
    [
        (torch.zeros(2, 3), None, TypeError, "idx: expected dtype int32, got float32"),
        (torch.zeros(2, 3).long(), None, TypeError, "idx: expected dtype int32, got int64"),
        (torch.zeros(3).int(), None, ValueError, r"idx: expected shape \(3, \*\), got \(3\)"),
        (torch.zeros(3, 2).int().t(), None, ValueError, "idx: expected unit stride"),
        (torch.zeros(2, 8).int()[:, :3], None, ValueError, "idx: expected a contiguous tensor"),
        (torch.zeros(2, 3).int(), torch.tensor([0, 3, 6]), ValueError, r"idx: .* got \(2, 3\)"),
        (torch.zeros(6).int(), torch.tensor([0, 3, 5]), ValueError, "row_ptr: .* nnz = 6"),
        (torch.zeros(6).int(), torch.tensor([0, 7, 6]), ValueError, "row_ptr: expected an asc"),
        (torch.zeros(6).int(), torch.tensor([0, 6]).int(), TypeError, "row_ptr: .* got int32"),
    ],
)
def test_says_what_is_wrong(idx, row_ptr, error, message):
    with pytest.raises(error, match=message):
        cpu.inverse_index(idx, 5, row_ptr)
