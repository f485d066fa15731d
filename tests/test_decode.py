"""decode, its error and the gradient of vals: bits in the promised order, then sizes and refusals.

csrc/decode.cpp starts from b_dec and adds vals·row in storage order, product and sum rounded apart;
dvals and the squares of a token's error are simd.h's dot; the squares are summed in double.
"""

import pytest
import torch
from common import (
    NAN,
    assert_bits,
    assert_within_eager,
    backends,
    far_apart,
    fixed_order_dot,
    instruction_set,
    isas,
    name_of,
    poisoned_empties,
    ragged,
    randint,
    randn,
    random_codes,
    refusals,
    threads,
    weights,
)
from torch import Tensor

from fastsae import cpu, reference

MODULES = {"reference": reference, "cpu": cpu}
targets = pytest.mark.parametrize("target_dtype", [torch.float32, torch.bfloat16], ids=name_of)

# n, k, d, f
SIZES = [
    (0, 3, 9, 5),
    (1, 1, 1, 1),
    (3, 0, 9, 5),
    (2, 3, 0, 5),
    (17, 5, 3, 4),
    (33, 9, 63, 40),
    (16, 33, 64, 7),
    (50, 4, 65, 300),
    (5, 70, 100, 50),
    (40, 32, 768, 200),
]
sizes = pytest.mark.parametrize(
    ("n", "k", "d", "f"), SIZES, ids=["n{}-k{}-d{}-f{}".format(*s) for s in SIZES]
)


@pytest.fixture(autouse=True)
def poison():
    with poisoned_empties():
        yield


class Case:
    def __init__(self, n: int, k: int, d: int, f: int, dtype=torch.float32, integers=False) -> None:
        def draw(*shape: int, seed: int) -> Tensor:
            return randint(4, *shape, low=-3, seed=seed) if integers else randn(*shape, seed=seed)

        self.vals, self.idx = random_codes(n, k, f)
        if integers:
            self.vals = self.vals.round()
        self.W, self.b = draw(f, d, seed=1).to(dtype), draw(d, seed=2)
        self.g, self.target = draw(n, d, seed=3), draw(n, d, seed=4)
        self.codes = self.vals, self.idx


def in_order(vals: Tensor, idx: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    x = torch.zeros(len(idx), W.shape[1]) if b is None else b.float().repeat(len(idx), 1)
    for n, (row, ids) in enumerate(zip(vals, idx.tolist(), strict=True)):
        for v, i in zip(row, ids, strict=True):
            if i >= 0:
                x[n] += v * W[i].float()
    return x


def dots(g: Tensor, idx: Tensor, W: Tensor) -> Tensor:
    dense = torch.from_numpy(fixed_order_dot(g.float().numpy(), W.float().numpy()))
    return dense.gather(1, idx.long().clamp(min=0)).where(idx >= 0, 0)


def squares(error: Tensor) -> Tensor:
    own = fixed_order_dot(error.numpy(), error.numpy()).diagonal()
    return torch.tensor(float(own.astype("float64").sum()), dtype=torch.float32)


# ---- bits ----


@isas
@weights
@sizes
def test_bits(n, k, d, f, dtype, isa):
    case = Case(n, k, d, f, dtype)
    for count in (1, 2):
        with instruction_set(isa, count):
            for b in (None, case.b, case.b.bfloat16()):
                xhat = cpu.decode_fwd(*case.codes, case.W, b)
                assert_bits(xhat, in_order(*case.codes, case.W, b).to(dtype))
            for g in (case.g, case.g.bfloat16()):
                dvals = cpu.decode_bwd_vals(g, case.idx, case.W)
                assert_bits(dvals, dots(g, case.idx, case.W))


@isas
@weights
@targets
@sizes
def test_bits_of_the_error(n, k, d, f, dtype, target_dtype, isa):
    case = Case(n, k, d, f, dtype)
    target = case.target.to(target_dtype)
    for b in (None, case.b):
        reconstruction = in_order(*case.codes, case.W, b)
        error = reconstruction - target.float()
        expected = squares(error), error, reconstruction, dots(error, case.idx, case.W)
        for count in (1, 2):
            with instruction_set(isa, count):
                got = cpu.decode_error(*case.codes, case.W, b, target)
                without = cpu.decode_error(*case.codes, case.W, b, target, reconstruct=False)
            assert without[2].shape == (0, d)
            for one, other, exact in zip(got, without, expected, strict=True):
                assert_bits(one, exact)
                if other is not without[2]:
                    assert_bits(other, exact)


@isas
@weights
@sizes
def test_rows_of_any_length(n, k, d, f, dtype, isa):
    case = Case(n, k, d, f, dtype)
    vals, idx, row_ptr = ragged(*case.codes)
    kept = row_ptr.diff()[:, None] == k
    kept = kept | (case.idx >= 0)
    with instruction_set(isa, 2):
        xhat = cpu.decode_fwd(vals, idx, case.W, case.b, row_ptr)
        assert_bits(xhat, in_order(*case.codes, case.W, case.b).to(dtype))
        dvals = cpu.decode_bwd_vals(case.g, idx, case.W, row_ptr)
        assert_bits(dvals, dots(case.g, case.idx, case.W)[kept])
        padded = cpu.decode_error(*case.codes, case.W, case.b, case.target)
        error = cpu.decode_error(vals, idx, case.W, case.b, case.target, row_ptr)
        for one, other in zip(padded[:3], error[:3], strict=True):
            assert_bits(other, one)
        assert_bits(error[3], padded[3][kept])


@weights
def test_one_token_with_everything(dtype):
    vals, idx = random_codes(1, 500, 90)
    W, g = randn(90, 77, seed=1).to(dtype), randn(6, 77, seed=2)
    row_ptr = torch.tensor([0, 0, 0, 500, 500, 500, 500])
    with threads(2):
        xhat = cpu.decode_fwd(vals[0], idx[0], W, None, row_ptr)
        dvals = cpu.decode_bwd_vals(g, idx[0], W, row_ptr)
    assert_bits(xhat[2:3], in_order(vals, idx, W, None).to(dtype))
    assert (xhat[[0, 1, 3, 4, 5]] == 0).all()
    assert_bits(dvals, dots(g[2:3], idx, W)[0])


@weights
def test_bits_depend_on_the_token_alone(dtype):
    case = Case(45, 11, 130, 60, dtype)
    with threads(2):
        batch = cpu.decode_error(*case.codes, case.W, case.b, case.target)
    # Longer rows of padding, and a token alone.
    more = torch.full((45, 6), -1, dtype=torch.int32)
    vals, idx = torch.cat([case.vals, more * NAN], 1), torch.cat([case.idx, more], 1)
    longer = cpu.decode_error(vals, idx, case.W, case.b, case.target)
    for one, other in zip(batch[:3], longer[:3], strict=True):
        assert_bits(other, one)
    assert_bits(longer[3], torch.cat([batch[3], torch.zeros(45, 6)], 1))
    for n in range(0, 45, 7):
        one = slice(n, n + 1)
        alone = cpu.decode_error(vals[one], idx[one], case.W, case.b, case.target[one])
        assert_bits(alone[1], batch[1][one])
        assert_bits(alone[2], batch[2][one])
        assert_bits(alone[3][:, :11], batch[3][one])


# ---- against the reference ----


@backends
@weights
@sizes
def test_values(n, k, d, f, dtype, backend):
    """Sums of small integers are exact in any order, so every wrong index shows."""
    case, module = Case(n, k, d, f, dtype, integers=True), MODULES[backend]
    codes = case.vals.where(case.idx >= 0, 0).double()
    rows = case.W.double()[case.idx.clamp(min=0).long()] if f else torch.zeros(n, k, d)
    xhat = torch.einsum("nk,nkd->nd", codes, rows) + case.b
    dvals = torch.einsum("nd,nkd->nk", case.g.double(), rows).where(case.idx >= 0, 0)
    got = module.decode_fwd(*case.codes, case.W, case.b)
    assert got.dtype == dtype
    assert torch.equal(got, xhat.to(dtype))
    got = module.decode_bwd_vals(case.g, case.idx, case.W)
    assert got.dtype == torch.float32
    assert torch.equal(got.double(), dvals)
    sse, error, reconstruction, _ = module.decode_error(*case.codes, case.W, case.b, case.target)
    assert torch.equal(reconstruction.double(), xhat)
    assert torch.equal(error.double(), xhat - case.target)
    assert sse.shape == ()
    assert sse == (xhat - case.target).square().sum()


@weights
def test_error_is_at_most_eagers(dtype):
    case = Case(60, 32, 768, 300, dtype)
    vals = case.vals.where(case.idx >= 0, 0)
    for scale in (1.0, 1e-12, 1e12):
        W, b = (case.W.float() * scale).to(dtype), case.b * scale

        def dense(
            kind: torch.dtype, W: Tensor = W, b: Tensor = b, scale: float = scale
        ) -> list[Tensor]:
            codes = torch.zeros(60, 300, dtype=kind)
            codes.scatter_add_(1, case.idx.clamp(min=0).long(), vals.to(kind))
            wide = W.to(kind)
            xhat = codes @ wide + b.to(kind)
            error = xhat - case.target.to(kind) * scale
            dvals = (error @ wide.T).gather(1, case.idx.clamp(min=0).long())
            return [error.square().sum(), error, xhat, dvals.where(case.idx >= 0, 0)]

        got = cpu.decode_error(*case.codes, W, b, case.target * scale)
        for one, eager, exact in zip(got, dense(torch.float32), dense(torch.float64), strict=True):
            assert_within_eager(one, eager, exact)
        xhat = cpu.decode_fwd(*case.codes, W, b)
        assert_within_eager(xhat, dense(torch.float32)[2].to(dtype), dense(torch.float64)[2])


@backends
def test_padding_reads_nothing(backend):
    module = MODULES[backend]
    W = torch.tensor([[NAN, NAN], [1.0, 2.0], [NAN, NAN]])  # rows that a clamped -1 would read
    vals, idx = torch.tensor([[NAN, 3.0], [NAN, NAN]]), torch.tensor([[-1, 1], [-1, -1]]).int()
    target = torch.tensor([[1.0, 1.0], [2.0, -1.0]])
    assert module.decode_fwd(vals, idx, W).tolist() == [[3, 6], [0, 0]]
    assert module.decode_bwd_vals(target, idx, W).tolist() == [[0, 3], [0, 0]]
    sse, error, xhat, dvals = module.decode_error(vals, idx, W, None, target)
    assert sse == 4 + 25 + 4 + 1
    assert xhat.tolist() == [[3, 6], [0, 0]]
    assert error.tolist() == [[2, 5], [-2, 1]]
    assert dvals.tolist() == [[0, 12], [0, 0]]


def test_no_latents():
    idx, W, b = torch.full((2, 3), -1, dtype=torch.int32), torch.zeros(0, 2), torch.ones(2)
    assert cpu.decode_fwd(idx * NAN, idx, W, b).tolist() == [[1, 1], [1, 1]]
    assert cpu.decode_bwd_vals(b.expand(2, 2), idx, W).tolist() == [[0, 0, 0], [0, 0, 0]]


@backends
def test_stored_zeros_have_gradients(backend):
    idx = torch.tensor([[1, 1, 0], [2, -1, 1]], dtype=torch.int32)
    W, g = randint(5, 3, 8, low=1), randint(5, 2, 8, low=1, seed=1)
    dvals = MODULES[backend].decode_bwd_vals(g, idx, W)
    assert (dvals[idx >= 0] > 0).all()
    error = MODULES[backend].decode_error(torch.zeros(2, 3), idx, W, None, -g)
    assert torch.equal(error[3], dvals)


def test_bf16_results_are_rounded_to_nearest_even():
    wanted = torch.tensor([1.00390625, 1.01171875, 1.00390637, -1.00390625, 3.3895e38, 1e-40, 0.0])
    xhat = cpu.decode_fwd(
        torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, 7).bfloat16(), wanted
    )
    assert_bits(xhat, wanted.bfloat16()[None])
    assert xhat[0, :4].tolist() == [1.0, 1.015625, 1.0078125, -1.0]


# ---- strides ----


@weights
def test_strides(dtype):
    case = Case(40, 6, 50, 30, dtype)
    expected = cpu.decode_error(*case.codes, case.W, case.b, case.target)
    W = torch.full((60, 61), NAN, dtype=dtype)[::2, 5:55].copy_(case.W)
    b = torch.full((100,), NAN)[::2].copy_(case.b)
    wide = torch.full((40, 60), NAN)[:, 7:57].copy_(case.target)
    for target in (wide, case.target.t().contiguous().t()):
        got = cpu.decode_error(*case.codes, W, b, target)
        for one, exact in zip(got, expected, strict=True):
            assert_bits(one, exact)
    dvals = cpu.decode_bwd_vals(case.g, case.idx, case.W)
    for g in (case.g.t().contiguous().t(), torch.full((80, 51), NAN)[::2, :50].copy_(case.g)):
        assert_bits(cpu.decode_bwd_vals(g, case.idx, W), dvals)
    one = torch.tensor(0.5).expand(40, 50)  # as .sum() sends it back
    dvals = cpu.decode_bwd_vals(one.contiguous(), case.idx, case.W)
    assert_bits(cpu.decode_bwd_vals(one, case.idx, case.W), dvals)
    same = case.target[:1].expand(40, 50)
    expected = cpu.decode_error(*case.codes, case.W, case.b, same.contiguous())
    assert_bits(cpu.decode_error(*case.codes, case.W, case.b, same)[1], expected[1])


@weights
def test_offsets_past_2_to_the_31(dtype, tmp_path):
    case = Case(3, 4, 50, 3, dtype)
    W = far_apart(tmp_path / "W", case.W)
    target, g = (far_apart(tmp_path / name, getattr(case, name)) for name in ("target", "g"))
    assert_bits(cpu.decode_fwd(*case.codes, W), cpu.decode_fwd(*case.codes, case.W))
    dvals = cpu.decode_bwd_vals(case.g, case.idx, case.W)
    assert_bits(cpu.decode_bwd_vals(g, case.idx, W), dvals)
    near = cpu.decode_error(*case.codes, case.W, case.b, case.target)
    far = cpu.decode_error(*case.codes, W, case.b, target)
    for one, other in zip(far, near, strict=True):
        assert_bits(one, other)


# ---- what decode refuses ----

WRONG = [
    ("vals", lambda t: t[1:], ValueError, r"vals: expected shape \(3, 4\), got \(2, 4\)"),
    ("vals", lambda t: t[:, 1:], ValueError, r"vals: expected shape \(3, 4\), got \(3, 3\)"),
    ("vals", lambda t: t.double(), TypeError, "vals: expected dtype float32, got float64"),
    ("vals", lambda t: t.bfloat16(), TypeError, "vals: expected dtype float32, got bfloat16"),
    ("vals", lambda _: None, TypeError, "vals: expected a torch.Tensor, got .*NoneType"),
    ("vals", lambda t: t.t().contiguous().t(), ValueError, "vals: expected unit stride"),
    ("idx", lambda t: t.long(), TypeError, "idx: expected dtype int32, got int64"),
    ("idx", lambda t: t[0], ValueError, r"idx: expected shape \(3, \*\), got \(4\)"),
    ("idx", lambda t: t + 6, IndexError, r"idx: expected values in \[-1, 5\), got \d+ at position"),
    ("idx", lambda t: t - 9, IndexError, r"idx: expected values in \[-1, 5\), got -\d+ at posit"),
    ("idx", lambda t: t.repeat(1, 2)[:, ::2], ValueError, "idx: expected unit stride"),
    ("idx", lambda t: t.repeat(1, 2)[:, :4], ValueError, "idx: expected a contiguous tensor"),
    ("W_dec", lambda t: t[None], ValueError, r"W_dec: expected shape .*, got \(1, 5, 8\)"),
    ("W_dec", lambda t: t.half(), TypeError, "W_dec: expected dtype float32 bfloat16, got float16"),
    ("W_dec", lambda t: t.t().contiguous().t(), ValueError, "W_dec: expected unit stride"),
    ("b_dec", lambda t: t[1:], ValueError, r"b_dec: expected shape \(8\), got \(7\)"),
    ("b_dec", lambda t: t.to("meta"), ValueError, "b_dec: expected a CPU tensor, got one on meta"),
    ("target", lambda t: t[:, 1:], ValueError, r"target: expected shape \(\*, 8\), got \(3, 7\)"),
    ("target", lambda t: t.int(), TypeError, "target: expected dtype float32 bfloat16, got int32"),
]


@refusals("name, change, error, message", WRONG)
def test_says_what_is_wrong(name, change, error, message):
    case = Case(3, 4, 8, 5)
    args = {"vals": case.vals, "idx": case.idx, "W_dec": case.W, "b_dec": case.b}
    args = {**args, "target": case.target}
    args[name] = change(args[name])
    with pytest.raises(error, match=message):
        cpu.decode_error(**args)
    target = args.pop("target")
    if name != "target" and name not in ("idx", "vals"):
        with pytest.raises(error, match=message):
            cpu.decode_fwd(**args)
    if name == "idx" and error is IndexError:
        for function in (lambda: cpu.decode_fwd(**args), lambda: bwd(case.g, args)):
            with pytest.raises(error, match=message):
                function()
    if name == "target":
        with pytest.raises(error, match=message.replace("target", "g")):
            bwd(target, args)


def bwd(g: Tensor, args: dict) -> Tensor:
    return cpu.decode_bwd_vals(g, args["idx"], args["W_dec"])


@refusals(
    "row_ptr, error, message",
    [
        ([0, 4, 2, 5], ValueError, "row_ptr: expected an ascending sequence from 0 to nnz = 5"),
        ([1, 2, 3, 5], ValueError, "row_ptr: expected an ascending"),
        ([0, 2, 3, 4], ValueError, "row_ptr: expected an ascending"),
        ([0, 2, 3, 6], ValueError, "row_ptr: expected an ascending"),
        ([0, -1, 3, 5], ValueError, "row_ptr: expected an ascending"),
        ([0, 2**62, 3, 5], ValueError, "row_ptr: expected an ascending"),
        ([0, 2, 5], ValueError, r"row_ptr: expected shape \(4\), got \(3\)"),
        ([[0, 2, 3, 5]], ValueError, r"row_ptr: expected shape \(4\), got \(1, 4\)"),
        ([0.0, 2, 3, 5], TypeError, "row_ptr: expected dtype int64, got float32"),
    ],
)
def test_says_what_is_wrong_with_row_ptr(row_ptr, error, message):
    vals, idx = random_codes(1, 5, 7)
    W, g, row_ptr = randn(7, 3), randn(3, 3), torch.tensor(row_ptr)
    with pytest.raises(error, match=message):
        cpu.decode_bwd_vals(g, idx[0], W, row_ptr)
    with pytest.raises(error, match=message):
        cpu.decode_error(vals[0], idx[0], W, None, g, row_ptr)
