"""kernels/index.py: integers, so exactly; and as compiled."""

import pytest
import torch
from aot import TARGETS, compiled, run_all
from common import ragged, random_codes
from torch import Tensor

from fastsae import reference
from fastsae.kernels import index


def joined(idx: Tensor, n_latents: int, row_ptr: Tensor | None = None) -> Tensor:
    """latent_ptr, token and entry, one after the other, without the unused room."""
    latent_ptr, token, entry = index.inverse_index(idx, n_latents, row_ptr)
    assert (latent_ptr.dtype, token.dtype, entry.dtype) == (torch.int64, torch.int32, torch.int32)
    assert token.shape == entry.shape == (idx.numel(),)
    stored = int(latent_ptr[-1])
    return torch.cat([latent_ptr, token[:stored], entry[:stored]])


def check(run, idx: Tensor, n_latents: int, row_ptr: Tensor | None = None) -> None:
    expected = torch.cat(reference.inverse_index(idx, n_latents, row_ptr))
    assert torch.equal(run(joined, idx, n_latents, row_ptr), expected)


def codes(n: int, k: int, n_latents: int) -> Tensor:
    return random_codes(n, k, n_latents)[1]


def hot() -> Tensor:
    """A latent in every token and twice in some, a segment of 450; few in the others."""
    idx = codes(300, 4, 500)
    idx[:, 2] = 77
    idx[::2, 1] = 77
    return idx


CASES = {
    "random": (codes(40, 7, 50), 50),
    "short-segments": (codes(64, 5, 400), 400),
    "hot": (hot(), 500),
    "one-pair": (torch.zeros(1, 1, dtype=torch.int32), 1),
    "one-latent": (torch.zeros(67, 3, dtype=torch.int32), 1),
    "first-and-last": (torch.tensor([[9, 0], [0, 9], [-1, 9]], dtype=torch.int32), 10),
    "n0": (torch.empty(0, 7, dtype=torch.int32), 5),
    "k0": (torch.empty(7, 0, dtype=torch.int32), 5),
    "all-padding": (torch.full((90, 6), -1, dtype=torch.int32), 9),
    "no-latents": (torch.full((3, 6), -1, dtype=torch.int32), 0),
    "nothing": (torch.empty(0, 0, dtype=torch.int32), 0),
}


@run_all
@pytest.mark.parametrize("rows", ["padded", "ragged"])
@pytest.mark.parametrize("name", CASES)
def test_index(run, name, rows):
    idx, n_latents = CASES[name]
    row_ptr = None
    if rows == "ragged":
        _, idx, row_ptr = ragged(idx.float(), idx)
    check(run, idx, n_latents, row_ptr)


# Whatever N is, the search for a token must end on it; empty rows share their begin with the next.
@run_all
@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 9, 33])
def test_rows_of_any_number_and_length(run, n):
    generator = torch.Generator().manual_seed(n)
    lengths = torch.randint(0, 4, (n,), generator=generator) * torch.randint(
        0, 2, (n,), generator=generator
    )
    lengths[0], lengths[-1] = (0, 5) if n % 2 else (5, 0)
    row_ptr = torch.zeros(n + 1, dtype=torch.int64)
    row_ptr[1:] = lengths.cumsum(0)
    idx = torch.randint(-1, 4, (int(row_ptr[-1]),), generator=generator, dtype=torch.int32)
    check(run, idx, 4, row_ptr)


@run_all
def test_padding_between_pairs(run):
    idx = torch.tensor([[-1, 2, -1], [2, -1, 0], [-1, -1, -1], [0, 2, 2]], dtype=torch.int32)
    latent_ptr, token, entry = [0, 2, 2, 6, 6], [1, 3, 0, 1, 3, 3], [5, 9, 1, 3, 10, 11]
    assert run(joined, idx, 4).tolist() == latent_ptr + token + entry


@run_all
def test_the_largest_latents(run):
    f = 2**20 + 3
    idx = torch.tensor([[f - 1, f - 2, 0], [f - 1, -1, f - 1]], dtype=torch.int32)
    check(run, idx, f)


@run_all
@pytest.mark.parametrize("begin", [63, 64, 65, 128])
@pytest.mark.parametrize("length", [1, 64, 65, 129])
def test_segments_across_blocks(run, begin, length):
    idx = torch.arange(begin + length + 40, dtype=torch.int32).clamp(min=length) - length
    idx = torch.cat([idx[length:], torch.full((length,), begin, dtype=torch.int32)])
    check(run, idx.flip(0)[:, None], begin + 40)


@run_all
def test_strides(run):
    idx = codes(20, 4, 9)
    apart = torch.full((40, 7), 8, dtype=torch.int32)[::2, 1:5].copy_(idx)
    assert torch.equal(run(joined, apart, 9), run(joined, idx, 9))


@pytest.mark.parametrize(
    ("idx", "row_ptr", "error", "message"),
    [
        (torch.zeros(2, 3).long(), None, TypeError, "idx: expected torch.int32, got torch.int64"),
        ([[1]], None, TypeError, "idx: expected a tensor, got list"),
        (torch.zeros(3).int(), None, ValueError, r"idx: expected shape \(N, K\), got \(3,\)"),
        (torch.zeros(3, 2).int().t(), None, ValueError, "idx: expected unit inner stride"),
        (
            torch.zeros(1, 1).int().expand(2**31, 1),
            None,
            ValueError,
            r"idx: expected fewer than 2³¹ pairs, got 2147483648",
        ),
        (torch.zeros(2, 3).int(), torch.tensor([0, 3, 6]), ValueError, r"idx: .*\(nnz\).*\(2, 3\)"),
        (torch.zeros(6).int(), torch.tensor([0, 6]).int(), TypeError, "row_ptr: .*torch.int32"),
        (torch.zeros(6).int(), torch.tensor([[0, 6]]), ValueError, r"row_ptr: .* got \(1, 2\)"),
        (torch.zeros(0).int(), torch.tensor([]).long(), ValueError, "row_ptr: expected .* got 0"),
        (torch.zeros(1).int(), torch.zeros(2, device="meta").long(), ValueError, "row_ptr: .*meta"),
    ],
)
def test_says_what_is_wrong(idx, row_ptr, error, message):
    with pytest.raises(error, match=message):
        index.inverse_index(idx, 5, row_ptr)


@pytest.mark.parametrize(("target", "variant"), [(t, v) for t in TARGETS for v in index.variants()])
def test_compiled(target, variant):
    used = compiled("fastsae.kernels.index", variant, TARGETS[target])
    assert used["registers"] <= 96
    assert used["spills"] == 0
    assert used["shared"] <= 4096
    # Of integers: the kernels have no floats.
    assert (used["atomics"] > 0) == variant.startswith(("count", "scatter"))
