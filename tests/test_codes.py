"""Codes against the dense matrix that they stand for, in the (N, K) layout and with row_ptr."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsae import Codes

# A token without latents first, last and in between, one with all, ties, negative and tiny values.
DENSE = torch.tensor(
    [
        [0.0, 0.0, 0.0, 0.0, 0.0],
        [1.0, 3.0, 0.0, 3.0, 0.0],
        [2.0, -1.0, 5.0, 1e-30, 4.0],
        [0.0, 0.0, 0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.0, 7.0],
        [0.0, 0.0, 0.0, 0.0, 0.0],
    ]
)
# torch says so once in a process, to whoever makes the first sparse CSR matrix.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")

LAYOUTS = pytest.mark.parametrize("k", [5, 8, None], ids=["k-tight", "k-padded", "row_ptr"])


def fixed(vals: list[list[float]], idx: list[list[int]], n_latents: int = 5) -> Codes:
    return Codes(torch.tensor(vals).float(), torch.tensor(idx, dtype=torch.int32), n_latents)


def varying(vals: list[float], idx: list[int], row_ptr: list[int], n_latents: int = 5) -> Codes:
    entries = torch.tensor(vals).float(), torch.tensor(idx, dtype=torch.int32)
    return Codes(*entries, n_latents, torch.tensor(row_ptr))


# Stored zeros, which are active in nothing, and padding, also in the middle of a token.
STORED_ZEROS = {
    "fixed": fixed([[2, 0, 0], [0, 0, 0], [3, 0, 1]], [[4, 1, -1], [-1, -1, -1], [0, -1, 4]]),
    "row_ptr": varying([2, 0, 0, 3, 0, 1], [4, 1, -1, 0, -1, 4], [0, 3, 3, 6]),
}

# ---- to and from other representations ----


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_from_dense_and_back(k: int | None, dtype: torch.dtype) -> None:
    dense = DENSE.to(dtype)
    back = Codes.from_dense(dense, k).validate().to_dense()
    assert back.dtype == dtype and back.is_contiguous()
    assert torch.equal(back, dense)


def test_from_dense_with_k_pads_and_sorts_by_value_then_latent() -> None:
    codes = Codes.from_dense(DENSE[1:3], 6)
    expected = [[1, 3, 0, -1, -1, -1], [2, 4, 0, 3, 1, -1]]
    assert codes.idx.tolist() == expected and codes.idx.dtype == torch.int32
    tiny = float(torch.tensor(1e-30))
    assert codes.vals.tolist() == [[3, 3, 1, 0, 0, 0], [5, 4, 2, tiny, -1, 0]]
    assert codes.n_latents == 5 and codes.row_ptr is None


def test_from_dense_without_k_stores_nonzeros_only() -> None:
    codes = Codes.from_dense(DENSE)
    assert codes.row_ptr is not None and codes.row_ptr.dtype == torch.int64
    assert codes.row_ptr.tolist() == [0, 0, 3, 8, 8, 9, 9]
    assert codes.idx.tolist() == [1, 3, 0, 2, 4, 0, 3, 1, 4]
    assert len(codes.vals) == 9


def test_from_dense_keeps_negative_values_behind_and_ties_in_order() -> None:
    codes = Codes.from_dense(torch.tensor([[0.0, -2.0, 0.0, 1.0, -3.0]]), 3)
    assert codes.idx.tolist() == [[3, 1, 4]] and codes.vals.tolist() == [[1, -2, -3]]
    # Wide enough for a sort that keeps the order of few ties by accident only.
    ties = (torch.arange(100_000) % 3).float()[None]
    twos, ones = (torch.arange(first, 100_000, 3) for first in (2, 1))
    assert torch.equal(Codes.from_dense(ties).idx, torch.cat([twos, ones]).int())


def test_from_dense_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="at most k = 4 nonzeros a row, got 5"):
        Codes.from_dense(DENSE, 4)
    with pytest.raises(ValueError, match="dense: expected 2 dimensions, got 1"):
        Codes.from_dense(DENSE[0])


@LAYOUTS
def test_to_sparse_csr_is_that_of_torch(k: int | None) -> None:
    csr, expected = Codes.from_dense(DENSE, k).to_sparse_csr(), DENSE.to_sparse_csr()
    assert csr.layout == torch.sparse_csr and csr.shape == expected.shape
    assert torch.equal(csr.crow_indices(), expected.crow_indices())
    assert torch.equal(csr.col_indices(), expected.col_indices())
    assert torch.equal(csr.values(), expected.values())


@pytest.mark.parametrize("codes", STORED_ZEROS.values(), ids=STORED_ZEROS)
def test_to_sparse_csr_keeps_stored_zeros_and_drops_padding(codes: Codes) -> None:
    csr = codes.to_sparse_csr()
    assert csr.crow_indices().tolist() == [0, 2, 2, 4]
    assert csr.col_indices().tolist() == [1, 4, 0, 4]
    assert csr.values().tolist() == [0, 2, 3, 1]
    assert torch.equal(csr.to_dense(), codes.to_dense())


@LAYOUTS
def test_to_dense_is_differentiable_in_vals(k: int | None) -> None:
    codes = Codes.from_dense(DENSE.double(), k)

    def to_dense(vals: Tensor) -> Tensor:
        return dataclasses.replace(codes, vals=vals).to_dense()

    vals = codes.vals.clone().requires_grad_()
    assert torch.autograd.gradcheck(to_dense, vals)
    weights = torch.arange(30.0, dtype=torch.float64).reshape(6, 5) + 1
    (to_dense(vals) * weights).sum().backward()
    there = codes.idx >= 0
    expected = torch.zeros_like(vals)
    expected[there] = weights[codes.token_ids()[there.reshape(-1)], codes.idx[there].long()]
    assert vals.grad is not None and torch.equal(vals.grad, expected)


# ---- counts ----


@LAYOUTS
def test_counts_are_those_of_the_dense_matrix(k: int | None) -> None:
    codes = Codes.from_dense(DENSE, k)
    assert codes.n_tokens == len(codes) == 6
    assert codes.l0().tolist() == [0, 3, 5, 0, 1, 0] and codes.l0().dtype == torch.int64
    assert codes.firing_counts().tolist() == [2, 2, 1, 2, 2]
    assert codes.firing_counts().dtype == torch.int64


@pytest.mark.parametrize("codes", STORED_ZEROS.values(), ids=STORED_ZEROS)
def test_stored_zeros_and_padding_are_not_active(codes: Codes) -> None:
    codes.validate()
    assert codes.l0().tolist() == [1, 0, 2]
    assert codes.firing_counts().tolist() == [1, 0, 0, 0, 2]
    assert codes.to_dense().tolist() == [[0, 0, 0, 0, 2], [0] * 5, [3, 0, 0, 0, 1]]


@LAYOUTS
def test_only_makes_padding_of_the_rest(k: int | None) -> None:
    codes = Codes.from_dense(DENSE, k)
    some = codes.only((codes.idx == 1) | (codes.idx == 4)).validate()
    expected = torch.zeros_like(DENSE)
    expected[:, [1, 4]] = DENSE[:, [1, 4]]
    assert torch.equal(some.to_dense(), expected)
    assert some.idx.shape == codes.idx.shape and some.row_ptr is codes.row_ptr


def test_token_ids_name_the_token_of_every_entry() -> None:
    assert STORED_ZEROS["fixed"].token_ids().tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert STORED_ZEROS["row_ptr"].token_ids().tolist() == [0, 0, 0, 2, 2, 2]


# ---- rows ----

ROWS = {
    "slice": slice(1, 4),
    "slice-step": slice(None, None, 2),
    "slice-negative": slice(-3, -1),
    "slice-all": slice(None),
    "slice-none": slice(4, 2),
    "slice-beyond": slice(4, 99),
    "mask": torch.tensor([False, True, False, True, True, False]),
    "mask-none": torch.zeros(6, dtype=torch.bool),
    "ids": torch.tensor([4, 1, 1, 0]),
    "ids-negative": torch.tensor([-2, 2, -6]),
    "ids-int32": torch.tensor([2, 5], dtype=torch.int32),
    "ids-none": torch.zeros(0, dtype=torch.int64),
}


@LAYOUTS
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_indexing_selects_tokens(k: int | None, rows: Any) -> None:
    part = Codes.from_dense(DENSE, k)[rows].validate()
    again = Codes.from_dense(DENSE[rows], k)
    assert torch.equal(part.to_dense(), DENSE[rows])
    # Not only the same matrix: the same storage, so that layout and order survive.
    assert torch.equal(part.idx, again.idx) and torch.equal(part.vals, again.vals)
    assert (part.row_ptr is None) == (k is not None)


@LAYOUTS
@pytest.mark.parametrize("row", [0, 2, 5, -1, -4, -6])
def test_indexing_by_int_keeps_the_token_dimension(k: int | None, row: int) -> None:
    part = Codes.from_dense(DENSE, k)[row]
    assert part.n_tokens == 1 and part.n_latents == 5
    assert torch.equal(part.to_dense()[0], DENSE[row])


BEYOND_ROWS = {
    "int": (6, "token 6 is out of range for 6 tokens"),
    "int-negative": (-7, "token -7 is out of range for 6 tokens"),
    "ids": (torch.tensor([0, 6]), "out of bounds"),
    "ids-negative": (torch.tensor([-7]), "out of bounds"),
    "ids-negative-twice-around": (torch.tensor([-13]), "out of bounds"),
    "mask-short": (torch.tensor([True]), r"mask: expected shape \(6,\), got \(1,\)"),
    "mask-long": (torch.zeros(7, dtype=torch.bool), r"mask: expected shape \(6,\), got \(7,\)"),
}


@LAYOUTS
@pytest.mark.parametrize(("rows", "message"), BEYOND_ROWS.values(), ids=BEYOND_ROWS)
def test_indexing_beyond_the_tokens_raises(k: int | None, rows: Any, message: str) -> None:
    with pytest.raises(IndexError, match=message):
        Codes.from_dense(DENSE, k)[rows]


@LAYOUTS
def test_indexing_is_differentiable(k: int | None) -> None:
    codes = Codes.from_dense(DENSE, k)
    vals = codes.vals.clone().requires_grad_()
    dataclasses.replace(codes, vals=vals)[torch.tensor([2, 1, 2])].to_dense().sum().backward()
    there = codes.idx >= 0
    counts = torch.tensor([0.0, 1, 2, 0, 0, 0])[codes.token_ids()].reshape(codes.idx.shape)
    assert vals.grad is not None and torch.equal(vals.grad, counts * there)


# ---- devices ----


@LAYOUTS
def test_to_moves_every_tensor(k: int | None) -> None:
    codes = Codes.from_dense(DENSE, k)
    moved = codes.to("meta")
    assert codes.device.type == "cpu" and moved.device.type == "meta"
    tensors = [moved.vals, moved.idx] + ([] if moved.row_ptr is None else [moved.row_ptr])
    assert len(tensors) == (2 if k else 3)
    assert all(t.device.type == "meta" for t in tensors)
    assert moved.vals.shape == codes.vals.shape and moved.n_latents == 5
    assert torch.equal(codes.to(torch.device("cpu")).to_dense(), DENSE)


# ---- emptiness ----

EMPTY = {
    "no-tokens": (Codes.from_dense(torch.zeros(0, 5), 3), 0),
    "no-tokens-row_ptr": (Codes.from_dense(torch.zeros(0, 5)), 0),
    "k-zero": (Codes.from_dense(torch.zeros(4, 5), 0), 4),
    "row_ptr-empty": (varying([], [], [0, 0, 0, 0, 0]), 4),
    "padding-only": (fixed([[0.0, 0.0]] * 4, [[-1, -1]] * 4), 4),
    "padding-only-row_ptr": (varying([0, 0, 0], [-1, -1, -1], [0, 2, 2, 2, 3]), 4),
    "no-latents": (Codes.from_dense(torch.zeros(4, 0), 2), 4),
}


@pytest.mark.parametrize(("codes", "n"), EMPTY.values(), ids=EMPTY)
def test_codes_of_nothing(codes: Codes, n: int) -> None:
    f = codes.n_latents
    codes.validate()
    assert len(codes) == n
    assert torch.equal(codes.to_dense(), torch.zeros(n, f))
    assert codes.l0().tolist() == [0] * n
    assert codes.firing_counts().tolist() == [0] * f
    assert len(codes[: n // 2]) == n // 2
    assert len(codes[torch.ones(n, dtype=torch.bool)].validate()) == n
    csr = codes.to_sparse_csr()
    assert csr.shape == (n, f) and csr.values().numel() == 0
    assert len(codes.token_ids()) == codes.idx.numel()


# ---- what does not fit ----

VALS, IDX = torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.int32)
PTR = torch.tensor([0, 2])


UNFIT = {
    "vals-int": (VALS.int(), IDX, None, TypeError, "vals: expected a floating dtype, got torch.i"),
    "idx-int64": (VALS, IDX.long(), None, TypeError, "idx: expected torch.int32, got torch.int64"),
    "shapes": (VALS[:1], IDX, None, ValueError, r"expected one shape, got \(1, 3\) and \(2, 3\)"),
    "1-D": (VALS[0], IDX[0], None, ValueError, "idx: expected 2 dimensions, got 1"),
    "3-D": (VALS[None], IDX[None], None, ValueError, "idx: expected 2 dimensions, got 3"),
    "2-D-row_ptr": (VALS, IDX, PTR, ValueError, "idx: expected 1 dimensions, got 2"),
    "row_ptr-int32": (VALS[0], IDX[0], PTR.int(), ValueError, "expected int64 .*, got torch.int32"),
    "row_ptr-2-D": (VALS[0], IDX[0], PTR[None], ValueError, r"row_ptr: .* of shape \(1, 2\)"),
    "row_ptr-empty": (VALS[0], IDX[0], PTR[:0], ValueError, r"row_ptr: .* of shape \(0,\)"),
}


@pytest.mark.parametrize(("vals", "idx", "row_ptr", "kind", "message"), UNFIT.values(), ids=UNFIT)
def test_construction_says_what_does_not_fit(
    vals: Tensor, idx: Tensor, row_ptr: Tensor | None, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        Codes(vals, idx, 5, row_ptr)


NAN = float("nan")
BEYOND, BELOW = (rf"idx: expected ids in \[-1, 5\), got {got}" for got in ("0 to 5", "-2 to 0"))
PADDED, TWICE = "vals: expected 0 where idx is -1", "idx: expected each latent at most once"
POINTERS = "row_ptr: expected an ascending sequence from 0 to 2, got "
INVALID = {
    "id-beyond": (fixed([[1, 1]], [[0, 5]]), BEYOND),
    "id-below": (fixed([[1, 0]], [[0, -2]]), BELOW),
    "padding-not-0": (fixed([[1, 2]], [[0, -1]]), PADDED),
    "padding-nan": (fixed([[1, NAN]], [[0, -1]]), PADDED),
    "twice": (fixed([[2, 1], [2, 1]], [[0, 1], [3, 3]]), TWICE),
    "row_ptr-id-beyond": (varying([1, 2], [0, 5], [0, 2]), BEYOND),
    "row_ptr-padding-not-0": (varying([1, 2], [0, -1], [0, 2]), PADDED),
    "row_ptr-twice": (varying([1, 2, 3], [0, 4, 4], [0, 1, 3]), TWICE),
    "row_ptr-starts-late": (varying([1, 2], [0, 1], [1, 2]), POINTERS + "1 to 2"),
    "row_ptr-ends-early": (varying([1, 2], [0, 1], [0, 1]), POINTERS + "0 to 1"),
    "row_ptr-ends-late": (varying([1, 2], [0, 1], [0, 3]), POINTERS + "0 to 3"),
    "row_ptr-descends": (varying([1, 2], [0, 1], [0, 2, 1, 2]), POINTERS + "0 to 2"),
}


@pytest.mark.parametrize(("codes", "message"), INVALID.values(), ids=INVALID)
def test_validate_names_what_is_wrong(codes: Codes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        codes.validate()


def test_validate_returns_the_codes_and_allows_a_latent_in_many_tokens() -> None:
    for codes in (
        fixed([[2, 1], [2, 1], [0, 0]], [[0, 4], [4, 0], [-1, -1]]),
        varying([2, 1, 2, 1], [0, 4, 4, 0], [0, 2, 4]),
    ):
        assert codes.validate() is codes


def test_duplicates_are_told_apart_beyond_int32() -> None:
    # token · n_latents + latent passes 2³¹ here; in 32 bits these two pairs would be one.
    n_latents = 2**30
    idx = torch.zeros(5, 1, dtype=torch.int32)
    assert Codes(torch.ones(5, 1), idx, n_latents).validate().n_latents == n_latents


def test_codes_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        STORED_ZEROS["fixed"].n_latents = 3  # type: ignore[misc]
