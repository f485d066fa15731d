"""kernels/decode_error.py: against float64, bit by bit where its order is promised, as compiled."""

from collections.abc import Callable

import pytest
import torch
from aot import TARGETS, compiled, run_all
from test_kernels_decode import NAN, Case, Ragged, assert_within, dtypes
from torch import Tensor

from fastsae import reference
from fastsae.kernels import decode, sums
from fastsae.kernels import decode_error as kernels

Results = tuple[Tensor, Tensor, Tensor, Tensor]


def flat(*args: Tensor | None, row_ptr: Tensor | None = None, reconstruct: bool = True) -> Tensor:
    """The four results in one tensor, which `on_gpu` can bring back."""
    results = kernels.decode_error(*args, row_ptr=row_ptr, reconstruct=reconstruct)
    assert all(t.dtype == torch.float32 for t in results)
    return torch.cat([t.reshape(-1) for t in results])


def decode_error(
    run: Callable, vals, idx, W_dec, b_dec, target, row_ptr=None, reconstruct=True
) -> Results:
    args = vals, idx, W_dec, b_dec, target
    found = run(flat, *args, row_ptr=row_ptr, reconstruct=reconstruct)
    rows = len(target) if reconstruct else 0
    shapes = (), target.shape, (rows, target.shape[1]), idx.shape
    parts = found.split([torch.Size(shape).numel() for shape in shapes])
    return tuple(part.view(shape) for part, shape in zip(parts, shapes, strict=True))


def exact(vals, idx, W_dec, b_dec, target, row_ptr=None) -> Results:
    wide = (None if t is None else t.double() for t in (W_dec, b_dec, target))
    return reference.decode_error(vals.double().where(idx >= 0, 0), idx, *wide, row_ptr)


def pairs_added(x: Tensor) -> Tensor:
    """Over the last axis, neighbours in pairs; zeros fill it up to a power of two."""
    width = 1 << max(x.shape[-1] - 1, 0).bit_length()
    x = torch.nn.functional.pad(x, (0, width - x.shape[-1]))
    while x.shape[-1] > 1:
        x = x[..., 0::2] + x[..., 1::2]
    return x[..., 0]


@run_all
@dtypes
@pytest.mark.parametrize(
    ("n", "k", "d", "f"),
    [(1, 1, 1, 1), (3, 9, 301, 7), (4, 13, 64, 50), (0, 4, 16, 3), (3, 0, 16, 3), (3, 4, 0, 3)],
)
def test_shapes(run, dtype, n, k, d, f):
    case = Case(n, k, d, f, dtype, integers=True)
    for b_dec in (None, case.b_dec):
        args = *case.codes, case.W_dec, b_dec, case.g
        for got, expected in zip(decode_error(run, *args), exact(*args), strict=True):
            assert torch.equal(got.double(), expected)


@run_all
@dtypes
def test_error_is_at_most_eagers(run, dtype):
    case = Case(5, 37, 300, 90, dtype)
    args = *case.codes, case.W_dec, case.b_dec, case.g
    single = case.vals.where(case.idx >= 0, 0), case.idx, *(t.float() for t in args[2:])
    eager = reference.decode_error(*single)
    for got, near, true in zip(decode_error(run, *args), eager, exact(*args), strict=True):
        assert_within(got, near, true)


@run_all
@dtypes
def test_decode_and_its_error_have_the_bits_of_decode_fwd(run, dtype):
    case = Case(3, 21, 300, 30, dtype)
    _, error, xhat, _ = decode_error(run, *case.codes, case.W_dec, case.b_dec, case.g)
    options = {} if dtype == torch.float32 else {"dtype": torch.float32}
    assert torch.equal(xhat, run(decode.decode_fwd, *case.codes, case.W_dec, case.b_dec, **options))
    assert torch.equal(error, xhat - case.g)


@run_all
@dtypes
@pytest.mark.parametrize("d", [1, 128, 333])
def test_order_of_summation(run, dtype, d):
    case = Case(3, 11, d, 30, dtype)
    sse, error, _, dvals = decode_error(run, *case.codes, case.W_dec, None, case.g)
    rows = case.W_dec.float()[case.idx.clamp(min=0).long()]
    expected = pairs_added(rows * error[:, None]).where(case.idx >= 0, 0)
    assert torch.equal(dvals, expected)
    lanes = torch.zeros(1024)
    lanes[:3] = pairs_added(error.square())
    assert torch.equal(sse, pairs_added(lanes))


@run_all
@pytest.mark.parametrize("size", [0, 1, 2100, 16384 + 1500, 2 * 16384])
def test_order_of_a_vectors_sum(run, size):
    def in_lanes(x: Tensor) -> Tensor:
        lanes = torch.zeros(1024)
        for part in x.split(1024):
            lanes[: len(part)] += part
        return pairs_added(lanes)

    x = torch.randn(size, generator=torch.Generator().manual_seed(size))
    parts = [in_lanes(part) for part in x.split(sums.PART)]
    expected = parts[0] if len(parts) == 1 else in_lanes(torch.stack(parts))
    assert torch.equal(run(sums.vector_sum, x), expected[None])


@run_all
def test_bits_depend_on_the_row_alone_and_not_on_the_slice(run):
    widths = [1 << kernels._config(f, 2)["LOG2_D"] for f in (25, 140_000, 300_000)]
    assert widths == [128, 64, 64]
    case = Case(3, 9, 200, 25, torch.float16)
    batch = decode_error(run, *case.codes, case.W_dec, case.b_dec, case.g)
    larger = torch.zeros(140_000, 200, dtype=torch.float16)
    larger[:25] = case.W_dec
    for whole, narrow in zip(
        batch, decode_error(run, *case.codes, larger, case.b_dec, case.g), strict=True
    ):
        assert torch.equal(whole, narrow)
    for n in range(3):
        one = slice(n, n + 1)
        codes = case.vals[one], case.idx[one]
        alone = decode_error(run, *codes, case.W_dec, case.b_dec, case.g[one])
        for whole, row in zip(batch[1:], alone[1:], strict=True):
            assert torch.equal(whole[one], row)


@run_all
@pytest.mark.parametrize("reconstruct", [True, False], ids=["x̂", "no x̂"])
@pytest.mark.parametrize("lengths", [[4, 0, 0, 19, 1], [0, 300], [0, 0], [3], []], ids=str)
def test_rows_of_any_length(run, lengths, reconstruct):
    case = Ragged(lengths, 70, 23)
    args = case.W_dec, case.b_dec, case.g
    sse, error, xhat, dvals = decode_error(run, *case.codes, *args, case.row_ptr, reconstruct)
    expected = decode_error(run, *case.table, *args)
    assert torch.equal(sse, expected[0])
    assert torch.equal(error, expected[1])
    assert torch.equal(xhat, expected[2][: None if reconstruct else 0])
    there = torch.arange(case.table[1].shape[1]) < case.row_ptr.diff()[:, None]
    assert torch.equal(dvals, expected[3][there])


@run_all
@dtypes
def test_strides(run, dtype):
    case = Case(4, 6, 150, 12, dtype)
    W_dec = torch.full((12, 163), NAN, dtype=dtype)[:, 5:155].copy_(case.W_dec)
    vals = torch.full((8, 9), NAN)[::2, :6].copy_(case.vals)
    idx = torch.full((4, 7), 99, dtype=torch.int32)[:, 1:].copy_(case.idx)
    expected = decode_error(run, *case.codes, case.W_dec, case.b_dec, case.g)
    for target in (
        case.g.t().contiguous().t(),
        torch.full((4, 300), NAN)[:, ::2].copy_(case.g),
        case.g.double(),
    ):
        found = decode_error(run, vals, idx, W_dec, case.b_dec, target)
        for got, same in zip(found, expected, strict=True):
            assert torch.equal(got, same)


@run_all
def test_padding_reads_nothing_and_zeros_have_gradients(run):
    case = Case(3, 5, 40, 6)
    case.idx[1] = -1
    case.idx[case.idx == 0] = 1
    case.W_dec[0] = NAN  # where a padding slot would land if it were clamped
    case.vals[case.idx >= 0] = 0
    case.g[1, ::3], case.g[2, 7] = float("inf"), NAN
    sse, error, xhat, dvals = decode_error(run, *case.codes, case.W_dec, case.b_dec, case.g)
    assert sse.isnan()
    assert torch.equal(xhat, case.b_dec.expand(3, 40))
    assert (dvals[case.idx < 0] == 0).all()
    assert (dvals[0][case.idx[0] >= 0] != 0).all()
    assert dvals[2][case.idx[2] >= 0].isnan().all()
    assert error[1].isinf().sum() == 14


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"target": torch.ones(2, 8)}, ValueError, r"target: expected shape \(3, 8\), got \(2, 8"),
        ({"target": torch.ones(3, 8).int()}, TypeError, "target: expected .* got torch.int32"),
        ({"vals": torch.ones(3, 3)}, ValueError, r"vals: expected shape \(3, 4\), got \(3, 3\)"),
        ({"row_ptr": torch.arange(4)}, ValueError, r"idx: expected shape \(nnz\), got \(3, 4\)"),
        ({"b_dec": torch.ones(7)}, ValueError, r"b_dec: expected shape \(8\), got \(7,\)"),
    ],
)
def test_says_what_is_wrong(change, error, message):
    case = Case(3, 4, 8, 5)
    args = {"vals": case.vals, "idx": case.idx, "W_dec": case.W_dec, "b_dec": case.b_dec}
    with pytest.raises(error, match=message):
        kernels.decode_error(**{**args, "target": case.g, **change})


@pytest.mark.parametrize(
    ("target", "variant"),
    [(t, v) for t in TARGETS for v in kernels.variants() if t == "H100" or "bf16-256" in v],
)
def test_compiled(target, variant):
    check_compiled("fastsae.kernels.decode_error", variant, target)


@pytest.mark.parametrize("target", TARGETS)
def test_vector_sum_compiled(target):
    for variant in sums.variants():
        check_compiled("fastsae.kernels.sums", variant, target)


def check_compiled(module: str, variant: str, target: str) -> None:
    used = compiled(module, variant, TARGETS[target])
    assert used["registers"] <= 96  # 20 warps or more on an SM
    assert used["spills"] == 0
    assert used["shared"] <= 1024
    assert used["atomics"] == 0
    if "error" in variant and "ragged" not in variant:
        assert used["load_bytes"] == 16
