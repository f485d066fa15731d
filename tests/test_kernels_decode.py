"""kernels/decode.py: against float64, bit by bit where its order is promised, and as compiled."""

from pathlib import Path
from unittest import mock

import pytest
import torch
from aot import TARGETS, compiled, interpreted, run_all
from torch import Tensor

from fastsae.kernels import decode
from fastsae.reference import padded

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAN = float("nan")

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).split(".")[1])


def reference(vals, idx, W_dec, b_dec=None, dtype=torch.float64) -> Tensor:
    rows = W_dec.to(dtype)[idx.clamp(min=0).long()]
    xhat = (vals.where(idx >= 0, 0.0).to(dtype)[:, None] @ rows)[:, 0]
    return xhat if b_dec is None else xhat + b_dec.to(dtype)


def reference_vals(g, idx, W_dec, dtype=torch.float64) -> Tensor:
    rows = W_dec.to(dtype)[idx.clamp(min=0).long()]
    return (rows @ g.to(dtype)[..., None])[..., 0].where(idx >= 0, 0.0)


class Case:
    """Random codes with duplicates in a row; a quarter of the slots is padding that holds NaN."""

    def __init__(self, n: int, k: int, d: int, f: int, dtype=torch.float32, integers=False) -> None:
        generator = torch.Generator().manual_seed(n + 10 * k + 100 * d)

        def draw(*shape: int) -> Tensor:
            x = torch.randn(shape, generator=generator)
            return (2 * x).round().clamp(-3, 3) if integers else x

        self.W_dec, self.b_dec, self.g = draw(f, d).to(dtype), draw(d).to(dtype), draw(n, d)
        self.idx = torch.randint(0, f, (n, k), generator=generator, dtype=torch.int32)
        self.idx[torch.rand(n, k, generator=generator) < 0.25] = -1
        self.vals = draw(n, k).masked_fill(self.idx < 0, NAN)

    @property
    def codes(self) -> tuple[Tensor, Tensor]:
        return self.vals, self.idx


def assert_within(got: Tensor, eager: Tensor, exact: Tensor) -> None:
    """Not worse than eager torch in the weights' dtype, but for one rounding of the result."""
    assert got.isfinite().all()
    one_ulp = torch.finfo(got.dtype).eps * exact.abs().max()
    assert (got - exact).abs().max() <= (eager - exact).abs().max() + one_ulp


# Sums of small integers are exact in any order, so any index or mask that is wrong shows.
@run_all
@dtypes
@pytest.mark.parametrize(
    ("n", "k", "d", "f"),
    [
        (1, 1, 1, 1),
        (3, 1, 5, 2),
        (2, 8, 128, 9),
        (4, 13, 255, 50),
        (3, 9, 301, 7),
        (2, 3, 768, 40),
        (0, 4, 16, 3),
        (3, 0, 16, 3),
        (3, 4, 0, 3),
    ],
)
def test_shapes(run, dtype, n, k, d, f):
    case = Case(n, k, d, f, dtype, integers=True)
    for b_dec in (None, case.b_dec):
        xhat = run(decode.decode_fwd, *case.codes, case.W_dec, b_dec)
        assert xhat.dtype == dtype
        assert torch.equal(xhat.double(), reference(*case.codes, case.W_dec, b_dec))
    dvals = run(decode.decode_bwd_vals, case.g, case.idx, case.W_dec)
    assert dvals.dtype == torch.float32
    assert torch.equal(dvals.double(), reference_vals(case.g, case.idx, case.W_dec))


@run_all
@dtypes
def test_error_is_at_most_eagers(run, dtype):
    case = Case(6, 37, 300, 90, dtype)
    args = *case.codes, case.W_dec, case.b_dec
    xhat = run(decode.decode_fwd, *args)
    assert_within(xhat, reference(*args, dtype=dtype), reference(*args))
    args = case.g, case.idx, case.W_dec
    dvals = run(decode.decode_bwd_vals, *args)
    assert_within(dvals, reference_vals(*args, dtype=dtype), reference_vals(*args))


@run_all
@dtypes
def test_vals_bias_and_g_have_dtypes_of_their_own(run, dtype):
    case = Case(2, 5, 70, 11, integers=True)
    xhat = run(decode.decode_fwd, case.vals.to(dtype), case.idx, case.W_dec, case.b_dec.to(dtype))
    assert torch.equal(xhat.double(), reference(*case.codes, case.W_dec, case.b_dec))
    for g in (case.g.to(dtype), case.g.double()):
        dvals = run(decode.decode_bwd_vals, g, case.idx, case.W_dec)
        assert torch.equal(dvals.double(), reference_vals(case.g, case.idx, case.W_dec))


# With weights that are powers of two, fused and separate multiply-adds agree, so that plain torch
# can follow the promised order.
@run_all
def test_order_of_summation(run):
    case = Case(3, 21, 333, 30)
    W_dec = case.W_dec.sign() * 2.0 ** (2 * case.W_dec).round()
    rows = W_dec[case.idx.clamp(min=0).long()]
    live = case.idx >= 0

    xhat = case.b_dec.expand(3, -1)
    for k in range(21):
        xhat = xhat + case.vals[:, k, None].where(live[:, k, None], 0.0) * rows[:, k]
    assert torch.equal(run(decode.decode_fwd, *case.codes, W_dec, case.b_dec), xhat)

    lanes = torch.zeros(3, 21, 128)
    for d in range(0, 333, 128):
        products = rows[..., d : d + 128] * case.g[:, None, d : d + 128]
        lanes[..., : products.shape[-1]] += products
    for _ in range(7):
        lanes = lanes[..., 0::2] + lanes[..., 1::2]
    dvals = lanes[..., 0].where(live, 0.0)
    assert torch.equal(run(decode.decode_bwd_vals, case.g, case.idx, W_dec), dvals)


@run_all
@dtypes
def test_bits_depend_on_the_row_alone(run, dtype):
    case = Case(5, 11, 270, 25, dtype)
    batch = run(decode.decode_fwd, *case.codes, case.W_dec, case.b_dec)
    dbatch = run(decode.decode_bwd_vals, case.g, case.idx, case.W_dec)
    for n in range(5):
        alone = slice(n, n + 1)
        row = run(decode.decode_fwd, case.vals[alone], case.idx[alone], case.W_dec, case.b_dec)
        drow = run(decode.decode_bwd_vals, case.g[alone], case.idx[alone], case.W_dec)
        assert torch.equal(row, batch[alone])
        assert torch.equal(drow, dbatch[alone])

    longer = torch.full((5, 9), -1, dtype=torch.int32)
    vals, idx = torch.cat([case.vals, longer * NAN], 1), torch.cat([case.idx, longer], 1)
    assert torch.equal(run(decode.decode_fwd, vals, idx, case.W_dec, case.b_dec), batch)
    dvals = run(decode.decode_bwd_vals, case.g, idx, case.W_dec)
    assert torch.equal(dvals, torch.cat([dbatch, torch.zeros(5, 9)], 1))


@run_all
def test_bits_do_not_depend_on_the_slice_width(run):
    widths = [decode._fwd_config(f, 2)["BLOCK_D"] for f in (25, 70_000, 140_000)]
    assert widths == [256, 128, 256]
    case = Case(2, 6, 160, 25, torch.float16)
    larger = torch.zeros(70_000, 160, dtype=torch.float16)
    larger[:25] = case.W_dec
    xhat = run(decode.decode_fwd, *case.codes, case.W_dec)
    assert torch.equal(run(decode.decode_fwd, *case.codes, larger), xhat)


@run_all
@dtypes
def test_strides(run, dtype):
    case = Case(4, 6, 150, 12, dtype)
    W_dec = torch.full((12, 163), NAN, dtype=dtype)[:, 5:155].copy_(case.W_dec)
    vals = torch.full((8, 9), NAN)[::2, :6].copy_(case.vals)
    idx = torch.full((4, 7), 99, dtype=torch.int32)[:, 1:].copy_(case.idx)
    xhat = run(decode.decode_fwd, *case.codes, case.W_dec)
    dvals = run(decode.decode_bwd_vals, case.g, case.idx, case.W_dec)
    assert torch.equal(run(decode.decode_fwd, vals, idx, W_dec), xhat)
    for g in (case.g.t().contiguous().t(), torch.full((4, 300), NAN)[:, ::2].copy_(case.g)):
        assert torch.equal(run(decode.decode_bwd_vals, g, idx, W_dec), dvals)
    one = torch.tensor(0.5).expand(4, 150)  # as .sum() sends it back
    ones = run(decode.decode_bwd_vals, one.contiguous(), case.idx, case.W_dec)
    assert torch.equal(run(decode.decode_bwd_vals, one, idx, W_dec), ones)
    one_column = run(decode.decode_fwd, vals[:, :1], idx[:, :1], W_dec[:, :1])
    one = run(decode.decode_fwd, *(t[:, :1].contiguous() for t in (vals, idx, W_dec)))
    assert torch.equal(one_column, one)


class Ragged(Case):
    """A case in CSR form, with rows of these lengths; `table` is its (N, K) form."""

    def __init__(self, lengths: list[int], d: int, f: int, dtype=torch.float32, **kwargs) -> None:
        super().__init__(1, sum(lengths), d, f, dtype, **kwargs)
        self.vals, self.idx = self.vals[0], self.idx[0]
        self.g = torch.arange(1.0, len(lengths) + 1)[:, None] * self.g
        self.row_ptr = torch.tensor([0, *lengths]).cumsum(0)
        self.table = padded(self.vals, self.row_ptr, NAN), padded(self.idx, self.row_ptr, -1)


@run_all
@dtypes
@pytest.mark.parametrize(
    ("lengths", "d"),
    [([4, 0, 0, 19, 1, 8], 150), ([0, 300, 3], 3), ([0, 0], 9), ([3], 0), ([], 5), ([7, 7], 64)],
)
def test_rows_of_any_length(run, dtype, lengths, d):
    case = Ragged(lengths, d, 23, dtype)
    args = case.W_dec, case.b_dec
    xhat = run(decode.decode_fwd, *case.codes, *args, row_ptr=case.row_ptr)
    assert xhat.shape == (len(lengths), d)
    assert torch.equal(xhat, run(decode.decode_fwd, *case.table, *args))
    dvals = run(decode.decode_bwd_vals, case.g, case.idx, case.W_dec, case.row_ptr)
    assert dvals.shape == case.idx.shape
    in_table = run(decode.decode_bwd_vals, case.g, case.table[1], case.W_dec)
    there = torch.arange(in_table.shape[1]) < case.row_ptr.diff()[:, None]
    assert torch.equal(dvals, in_table[there])


@run_all
def test_rows_of_any_length_against_the_sums(run):
    case = Ragged([2, 0, 70, 11], 40, 9, integers=True)
    xhat = run(decode.decode_fwd, *case.codes, case.W_dec, case.b_dec, case.row_ptr)
    assert torch.equal(xhat.double(), reference(*case.table, case.W_dec, case.b_dec))
    dvals = run(decode.decode_bwd_vals, case.g, case.idx, case.W_dec, case.row_ptr)
    expected = padded(dvals.double(), case.row_ptr, 0.0)
    assert torch.equal(expected, reference_vals(case.g, case.table[1], case.W_dec))


@run_all
@dtypes
def test_the_result_has_the_dtype_asked_for(run, dtype):
    case = Case(3, 6, 70, 11)
    W_dec = case.W_dec.bfloat16()
    wide = run(decode.decode_fwd, *case.codes, W_dec.float(), case.b_dec)
    xhat = run(decode.decode_fwd, *case.codes, W_dec, case.b_dec, dtype=dtype)
    assert xhat.dtype == dtype
    # Triton's interpreter cuts bf16 off where a GPU rounds it.
    assert (xhat.float() - wide).abs().max() <= torch.finfo(dtype).eps * wide.abs().max()
    if dtype == torch.float32:
        assert torch.equal(xhat, wide)


@run_all
def test_padding_reads_nothing(run):
    case = Case(3, 5, 40, 6)
    case.idx[1] = -1
    case.idx[case.idx == 0] = 1
    case.W_dec[0] = NAN  # where a padding slot would land if it were clamped
    case.g[1, ::3], case.g[2, 7] = float("inf"), NAN
    xhat = run(decode.decode_fwd, *case.codes, case.W_dec, case.b_dec)
    assert xhat.isfinite().all()
    assert torch.equal(xhat[1], case.b_dec)
    dvals = run(decode.decode_bwd_vals, case.g, case.idx, case.W_dec)
    assert (dvals[case.idx < 0] == 0).all()
    assert dvals[2][case.idx[2] >= 0].isnan().all()

    none = torch.full((2, 3), -1, dtype=torch.int32)
    no_latents = torch.empty(0, 40)
    assert torch.equal(run(decode.decode_fwd, none * NAN, none, no_latents), torch.zeros(2, 40))
    dvals = run(decode.decode_bwd_vals, case.g[:2], none, no_latents)
    assert torch.equal(dvals, torch.zeros(2, 3))


@run_all
def test_stored_zeros_have_gradients(run):
    case = Case(2, 6, 33, 4)
    before = run(decode.decode_bwd_vals, case.g, case.idx, case.W_dec)
    assert (before[case.idx >= 0] != 0).all()


@run_all
def test_extreme_values(run):
    huge, inf, tiny = 2.0**127, float("inf"), 1e-40  # tiny is subnormal
    idx = torch.tensor([[0, 1], [1, -1], [2, 0], [1, 1], [0, 0]], dtype=torch.int32)
    vals = torch.tensor([[2.0**63, 1], [tiny, NAN], [1, 1], [huge, -huge], [huge, 0]])
    W_dec = torch.tensor([2.0**64, 1, inf])[:, None].repeat(1, 3)
    xhat = run(decode.decode_fwd, vals, idx, W_dec)
    assert torch.equal(xhat[:, 0], torch.tensor([huge, tiny, inf, 0, inf]))
    g = torch.tensor([[tiny, 0, 0], [huge, 0, -huge], [inf, 0, 0], [1, NAN, 0], [0, 0, 0]])
    dvals = run(decode.decode_bwd_vals, g, idx[3:4].repeat(5, 1), W_dec)
    assert torch.equal(dvals[:3, 0], torch.tensor([tiny, 0, inf]))
    assert dvals[3].isnan().all()


FAR = 2**30 + 8  # two rows of this many elements pass 2³¹


def decode_far(storage: Tensor) -> tuple[Tensor, Tensor]:
    W_dec = storage.as_strided((3, 4), (FAR, 1))
    W_dec.copy_(torch.arange(12.0).view(3, 4))
    idx = torch.tensor([[2, 0]], dtype=torch.int32, device=storage.device)
    vals = torch.tensor([[1.0, 10.0]], device=storage.device)
    g = torch.ones(1, 4, device=storage.device)
    return decode.decode_fwd(vals, idx, W_dec).cpu(), decode.decode_bwd_vals(g, idx, W_dec).cpu()


def decode_far_interpreted(path: str) -> tuple[Tensor, Tensor]:
    # The interpreter copies every argument's storage back, here 4 GB of a sparse file onto itself.
    with mock.patch("triton.runtime.interpreter.GridExecutor._restore_args_dev"):
        size = 2 * FAR + 4
        return decode_far(torch.from_file(path, shared=True, size=size, dtype=torch.float16))


def check_far(xhat: Tensor, dvals: Tensor) -> None:
    assert torch.equal(xhat, torch.tensor([[8.0, 19.0, 30.0, 41.0]], dtype=torch.float16))
    assert torch.equal(dvals, torch.tensor([[38.0, 6.0]]))


def test_offsets_past_2_to_the_31(tmp_path: Path):
    file = tmp_path / "weights"
    check_far(*interpreted(decode_far_interpreted, str(file)))
    file.unlink()


@pytest.mark.gpu
def test_offsets_past_2_to_the_31_on_the_gpu():
    check_far(*decode_far(torch.empty(2 * FAR + 4, dtype=torch.float16, device="cuda")))


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("idx", lambda t: t.long(), TypeError, "idx: expected torch.int32, got torch.int64"),
        ("vals", lambda t: t.double(), TypeError, "vals: expected torch.float32 or .*float64"),
        ("W_dec", lambda t: t.to(torch.int8), TypeError, "W_dec: expected .* got torch.int8"),
        ("b_dec", lambda t: t.tolist(), TypeError, "b_dec: expected a tensor, got list"),
        ("idx", lambda t: t[0], ValueError, r"idx: expected shape \(N, K\), got \(4,\)"),
        ("vals", lambda t: t[:, 1:], ValueError, r"vals: expected shape \(3, 4\), got \(3, 3\)"),
        ("b_dec", lambda t: t[1:], ValueError, r"b_dec: expected shape \(8\), got \(7,\)"),
        ("W_dec", lambda t: t[0], ValueError, r"W_dec: expected shape \(F, D\), got \(8,\)"),
        ("vals", lambda t: t.to("meta"), ValueError, "vals: expected a tensor on cpu, got meta"),
        ("W_dec", lambda t: t.t().contiguous().t(), ValueError, "W_dec: expected unit inner"),
        ("idx", lambda t: t.t().contiguous().t(), ValueError, r"got strides \(1, 3\)"),
        ("dtype", lambda t: torch.int32, TypeError, "dtype: expected .* got torch.int32"),
        ("row_ptr", lambda t: torch.arange(4), ValueError, r"idx: expected shape \(nnz\)"),
    ],
)
def test_fwd_says_what_is_wrong(name, change, error, message):
    case = Case(3, 4, 8, 5)
    args = {"vals": case.vals, "idx": case.idx, "W_dec": case.W_dec, "b_dec": case.b_dec}
    with pytest.raises(error, match=message):
        decode.decode_fwd(**{**args, name: change(args.get(name))})


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("g", lambda t: t.int(), TypeError, "g: expected .* got torch.int32"),
        ("g", lambda t: t[1:], ValueError, r"g: expected shape \(3, 8\), got \(2, 8\)"),
        ("idx", lambda t: t.long(), TypeError, "idx: expected torch.int32"),
        ("W_dec", lambda t: t[:, ::2], ValueError, "W_dec: expected unit inner"),
    ],
)
def test_bwd_says_what_is_wrong(name, change, error, message):
    case = Case(3, 4, 8, 5)
    args = {"g": case.g, "idx": case.idx, "W_dec": case.W_dec}
    with pytest.raises(error, match=message):
        decode.decode_bwd_vals(**{**args, name: change(args[name])})


@pytest.mark.parametrize(
    ("row_ptr", "error", "message"),
    [
        (torch.tensor([0, 4], dtype=torch.int32), TypeError, "row_ptr: expected torch.int64"),
        (torch.tensor([[0, 4]]), ValueError, r"row_ptr: expected shape \(N \+ 1\), got \(1, 2\)"),
        (torch.tensor([0]), ValueError, "row_ptr: expected at least 2 numbers, got 1"),
        ([0, 4], TypeError, "row_ptr: expected a tensor, got list"),
        (torch.tensor([0, 2, 4]), ValueError, r"g: expected shape \(2, 8\), got \(1, 8\)"),
    ],
)
def test_bwd_says_what_is_wrong_with_row_ptr(row_ptr, error, message):
    case = Ragged([4], 8, 5)
    with pytest.raises(error, match=message):
        decode.decode_bwd_vals(case.g, case.idx, case.W_dec, row_ptr)


@pytest.mark.parametrize(
    ("target", "variant"),
    [(t, v) for t in TARGETS for v in decode.variants() if t == "H100" or "bf16" in v],
)
def test_compiled(target, variant):
    used = compiled("fastsae.kernels.decode", variant, TARGETS[target])
    assert used["registers"] <= (104 if "csr" in variant else 96)  # 20 warps on an SM, 19 with csr
    assert used["spills"] == 0
    assert used["shared"] <= 1024
    assert used["atomics"] == 0
    if "ragged" not in variant:
        row_bytes = 256 if "256" in variant else 512
        lanes = TARGETS[target][2]
        assert used["load_bytes"] == (row_bytes // lanes if "fwd" in variant else 16)


def test_cost_of_the_design_study():
    cost = decode.decode_cost(8192, 4096, 131072, 64, itemsize=2)
    assert cost.flops == 2 * 8192 * 64 * 4096
    assert cost.bytes_gathered == pytest.approx(4.3e9, rel=0.02)
    assert cost.bytes_once == pytest.approx(131072 * 4096 * 2, rel=0.08)
