"""rows: gradient rows, sums of columns, projection and normalisation of rows.

The gradient row of a latent adds coef·row in the order of its tokens, product and sum rounded
apart, so numpy-like float32 arithmetic gives its bits.
"""

import pytest
import torch
from common import (
    INF,
    NAN,
    assert_bits,
    assert_within_eager,
    backends,
    far_apart,
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
outputs = pytest.mark.parametrize("out", [torch.float32, torch.bfloat16], ids=name_of)
THREADS = (1, 2, 5)


@pytest.fixture(autouse=True)
def poison():
    with poisoned_empties():
        yield


# ---- gradient rows ----


def in_order(coef: Tensor, idx: Tensor, src: Tensor, n_latents: int) -> tuple[Tensor, Tensor]:
    rows, sums = torch.zeros(n_latents, src.shape[1]), torch.zeros(n_latents)
    for n, ids in enumerate(idx.tolist()):
        for k, i in enumerate(ids):
            if i >= 0:
                rows[i] += coef[n, k] * src[n].float()
                sums[i] += coef[n, k]
    return rows, sums


def hot(n: int, k: int, n_latents: int) -> tuple[Tensor, Tensor]:
    """Codes with a latent in every token, and latents of 1 to 6 tokens, and most of none."""
    idx = random_codes(n, k, n_latents)[1]
    idx[:, 0] = n_latents // 2
    for i in range(min(6, k - 1)):
        idx[: i + 1, i + 1] = i
    return torch.where(idx >= 0, randn(n, k, seed=9), NAN), idx


SIZES = [(0, 3, 9, 5), (3, 0, 9, 5), (2, 3, 0, 5), (1, 1, 1, 1), (70, 5, 33, 100), (40, 8, 768, 65)]


@isas
@outputs
@weights
@pytest.mark.parametrize(("n", "k", "d", "f"), SIZES, ids=["-".join(map(str, s)) for s in SIZES])
def test_gradient_bits(n, k, d, f, dtype, out, isa):
    coef, idx = hot(n, k, f) if k > 1 and n else random_codes(n, k, f)
    src = randn(n, d, seed=3).to(dtype)
    rows, sums = in_order(coef, idx, src, f)
    flat, flat_idx, row_ptr = ragged(coef, idx)
    for count in THREADS:
        with instruction_set(isa, count):
            got = cpu.row_gradients(coef, idx, src, f, dtype=out)
            assert_bits(got[0], rows.to(out))
            assert_bits(got[1], sums)
            got = cpu.row_gradients(flat, flat_idx, src, f, row_ptr, out)
            assert_bits(got[0], rows.to(out))
            assert_bits(got[1], sums)


@backends
@weights
def test_gradients_exactly(dtype, backend):
    coef, idx = hot(90, 6, 40)
    coef, src = coef.round(), randint(4, 90, 20, low=-3).to(dtype)
    rows, sums = in_order(coef, idx, src, 40)  # small integers: exact in any order
    got = MODULES[backend].row_gradients(coef, idx, src, 40)
    assert torch.equal(got[0], rows)
    assert torch.equal(got[1], sums)


@weights
def test_error_of_gradients(dtype):
    coef, idx = hot(500, 8, 60)
    src = randn(500, 64, seed=3).to(dtype)
    dense = torch.zeros(500, 60)
    dense.scatter_add_(1, idx.clamp(min=0).long(), coef.where(idx >= 0, 0))
    exact = torch.zeros(500, 60, dtype=torch.float64)
    exact.scatter_add_(1, idx.clamp(min=0).long(), coef.where(idx >= 0, 0).double())
    rows, sums = cpu.row_gradients(coef, idx, src, 60)
    # A running sum of up to 500 terms, beside eager's sum in blocks: the n·2⁻²⁴ of the worst case.
    terms = exact.abs().T @ src.double().abs()
    counts = (exact != 0).sum(0)[:, None] + 1
    assert ((rows - exact.T @ src.double()).abs() <= counts * 2.0**-24 * terms).all()
    assert_within_eager(sums, dense.sum(0), exact.sum(0), atol=1e-5)


def test_unused_latents_have_exact_zeros():
    idx = torch.tensor([[3, -1], [3, 7]], dtype=torch.int32)
    coef, src = torch.tensor([[2.0, NAN], [-1.0, 0.0]]), torch.tensor([[1.0, 2], [INF, 1]])
    rows, sums = cpu.row_gradients(coef, idx, src, 9)
    assert (rows[[0, 1, 2, 4, 5, 6, 8]] == 0).all()
    assert not rows[[0, 1, 2, 4, 5, 6, 8]].signbit().any()
    assert sums.tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 0]
    assert rows[3].tolist() == [-INF, 3]
    assert rows[7].isnan().tolist() == [True, False]  # 0·inf: a stored zero is a pair like others


def test_gradients_of_strided_sources():
    coef, idx = random_codes(40, 5, 30)
    src = randn(40, 50, seed=3)
    rows, _ = cpu.row_gradients(coef, idx, src, 30)
    for other in (torch.full((80, 61), NAN)[::2, 5:55].copy_(src), src.t().contiguous().t()):
        assert_bits(cpu.row_gradients(coef, idx, other, 30)[0], rows)
    same = cpu.row_gradients(coef, idx, src[:1].expand(40, 50), 30)[0]
    assert_bits(same, cpu.row_gradients(coef, idx, src[:1].repeat(40, 1), 30)[0])


# ---- sums of columns ----


def sum_in_order(m: Tensor, coef: Tensor | None) -> Tensor:
    """Sums of 256 rows each, which are then summed."""
    total = torch.zeros(m.shape[1])
    for part in torch.arange(len(m)).split(256):
        own = torch.zeros(m.shape[1])
        for r in part:
            own += m[r].float() * (1 if coef is None else coef[r].float())
        total += own
    return total


@isas
@weights
@pytest.mark.parametrize("n", [0, 1, 3, 255, 256, 257, 600])
def test_column_sum_bits(n, dtype, isa):
    for d in (0, 1, 15, 64, 67):
        m, coef = randn(n, d).to(dtype), randn(n, seed=1)
        expected = sum_in_order(m, None), sum_in_order(m, coef), sum_in_order(m, coef.bfloat16())
        for count in THREADS:
            with instruction_set(isa, count):
                assert_bits(cpu.column_sum(m), expected[0])
                assert_bits(cpu.column_sum(m, coef), expected[1])
                assert_bits(cpu.column_sum(m, coef.bfloat16()), expected[2])


@weights
def test_error_of_column_sum(dtype):
    m, coef = randn(3000, 40).to(dtype), randn(3000, seed=1)
    exact = m.double().sum(0)
    assert ((cpu.column_sum(m) - exact).abs() <= 270 * 2.0**-24 * m.double().abs().sum(0)).all()
    exact = coef.double() @ m.double()
    bound = 270 * 2.0**-24 * (coef.double().abs() @ m.double().abs())
    assert ((cpu.column_sum(m, coef) - exact).abs() <= bound).all()


@backends
def test_column_sum_of_strided_rows(backend):
    m, coef = randint(9, 300, 50), randint(9, 600, seed=1)[::2]
    sums, weighed = m.sum(0), coef @ m
    column_sum = MODULES[backend].column_sum
    for other in (torch.full((300, 61), NAN)[:, 5:55].copy_(m), m.t().contiguous().t()):
        assert torch.equal(column_sum(other), sums)
        assert torch.equal(column_sum(other, coef), weighed)
    one = torch.tensor(0.5).expand(300, 50)  # as .sum() sends it back
    assert torch.equal(column_sum(one), torch.full((50,), 150.0))


# ---- projection ----


@isas
@weights
@pytest.mark.parametrize("scale", [1e-18, 1e-6, 1.0, 1e6, 1e18], ids=str)
def test_projection(scale, dtype, isa):
    W, g = (scale * randn(67, 100)).to(dtype), randn(67, 100, seed=1).to(dtype)
    W[5] = 0
    g[6] = 0
    W_before = W.clone()
    exact = g.double()
    square = W.double().square().sum(1, keepdim=True)
    coef = ((exact * W.double()).sum(1, keepdim=True) / square).where(square > 0, 0)
    exact = exact - coef * W.double()
    results = []
    for count in THREADS:
        with instruction_set(isa, count):
            projected = g.clone()
            cpu.project_rows_(projected, W)
            results.append(projected)
    assert_bits(W, W_before)
    assert_bits(results[0][5:7], g[5:7])  # nothing to project from, or nothing to project
    for other in results:
        assert_bits(other, results[0])
    unit = torch.finfo(dtype).eps / 2
    # One rounding of the result, and dot's of the coefficient: 100 / 64 + 8 steps, and a few more.
    bound = unit * exact.abs() + 2.0**-24 * (12 * norm(g) + 2 * g.double().abs())
    assert ((results[0] - exact).abs() <= bound).all()


def norm(t: Tensor) -> Tensor:
    return t.double().norm(dim=1, keepdim=True)


@backends
@weights
def test_projection_by_hand(dtype, backend):
    W = torch.tensor([[2.0, 0, 0], [0, 0, 0], [1, 1, 0], [0, -4, 0]]).to(dtype)
    g = torch.tensor([[3.0, 4, 5]]).repeat(4, 1).to(dtype)
    MODULES[backend].project_rows_(g, W)
    assert g.tolist() == [[0, 4, 5], [3, 4, 5], [-0.5, 0.5, 5], [3, 0, 5]]


@weights
@pytest.mark.parametrize("size", [1e-42, 1e-38, 1e-30, 1e30, 1e37], ids=str)
def test_projection_of_extreme_rows(size, dtype):
    """What is left has no part along the row, however small or large the row is."""
    W = (randn(40, 64).sign() * size).to(dtype)
    g = randn(40, 64, seed=1).to(dtype)
    cpu.project_rows_(g, W)
    assert g.isfinite().all()
    along = (g.double() * W.double().sign()).sum(1).abs()
    assert (along <= 64 * torch.finfo(dtype).eps * norm(g)[:, 0]).all()


# ---- normalisation ----

SCALES = (1e-44, 1e-40, 1e-30, 1e-19, 1e-5, 1.0, 1e5, 1e18, 1e19, 1e37)


@isas
@weights
@pytest.mark.parametrize("scale", SCALES, ids=str)
def test_normalisation(scale, dtype, isa):
    for d in (1, 3, 64, 100):
        W = (scale * randn(67, d)).to(dtype)
        W[5] = 0
        W[6, 1:] = 0
        exact = W.double() / norm(W)
        exact[norm(W)[:, 0] == 0] = 0
        results = []
        for count in THREADS:
            with instruction_set(isa, count):
                rows = W.clone()
                cpu.normalize_rows_(rows)
                results.append(rows)
        for other in results:
            assert_bits(other, results[0])
        # dot's roundings (d / 64 + 8, halved by the root), the double's and float32's, and dtype's.
        bound = (torch.finfo(dtype).eps / 2 + (d / 128 + 6) * 2.0**-24) * exact.abs() + 1e-45
        assert ((results[0] - exact).abs() <= bound).all()
        assert_bits(results[0][5], W[5])


@backends
def test_rows_of_zeros_stay(backend):
    W = torch.tensor([[0.0, 0.0], [3.0, -4.0], [0.0, -0.0]])
    MODULES[backend].normalize_rows_(W)
    assert torch.equal(W, torch.tensor([[0, 0], [0.6, -0.8], [0, 0]]))


def test_rows_of_one_huge_weight():
    W = torch.zeros(3, 70)
    W[0, 69], W[1, 0], W[2, 3] = 3.4e38, 1e-45, -2.0
    cpu.normalize_rows_(W)
    expected = torch.zeros(3, 70)
    expected[0, 69], expected[1, 0], expected[2, 3] = 1, 1, -1
    assert torch.equal(W, expected)


@weights
def test_strided_rows(dtype):
    W, g = randn(40, 50).to(dtype), randn(40, 50, seed=1).to(dtype)
    room = torch.full((80, 61), NAN, dtype=dtype)
    inside = room[::2, 5:55].copy_(W)
    room_g = torch.full((40, 99), NAN, dtype=dtype)
    inside_g = room_g[:, 49:].copy_(g)
    cpu.project_rows_(g, W)
    cpu.project_rows_(inside_g, inside)
    assert_bits(inside_g.contiguous(), g)
    cpu.normalize_rows_(W)
    cpu.normalize_rows_(inside)
    assert_bits(inside.contiguous(), W)
    assert int(room.isnan().sum()) == 80 * 61 - 40 * 50  # and nothing beside them
    assert int(room_g.isnan().sum()) == 40 * 49


@weights
def test_offsets_past_2_to_the_31(dtype, tmp_path):
    W, g = randn(3, 50).to(dtype), randn(3, 50, seed=1).to(dtype)
    far_W, far_g = far_apart(tmp_path / "W", W), far_apart(tmp_path / "g", g)
    coef, idx = random_codes(3, 4, 9)
    near = cpu.row_gradients(coef, idx, g, 9)
    assert_bits(cpu.row_gradients(coef, idx, far_g, 9)[0], near[0])
    assert_bits(cpu.column_sum(far_g), cpu.column_sum(g))
    for one, other in ((g, W), (far_g, far_W)):
        cpu.project_rows_(one, other)
        cpu.normalize_rows_(other)
    assert_bits(far_g.contiguous(), g)
    assert_bits(far_W.contiguous(), W)


def test_parameters_that_require_gradients():
    W = torch.nn.Parameter(randn(5, 8))
    exact = W.detach().double() / norm(W.detach())
    cpu.normalize_rows_(W)
    assert W.requires_grad
    assert (W.detach() - exact).abs().max() < 1e-7


@backends
def test_autograd_notices_what_was_written_over(backend):
    W = torch.nn.Parameter(randn(5, 8))
    before = W._version
    MODULES[backend].normalize_rows_(W)
    assert W._version > before
    loss = (W * W).sum()
    MODULES[backend].normalize_rows_(W)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    g = randn(5, 8)
    before = g._version
    MODULES[backend].project_rows_(g, W)
    assert g._version > before


def test_inference_tensors():
    with torch.inference_mode():
        W, g = randn(5, 8), randn(5, 8, seed=1)
        cpu.normalize_rows_(W)
        cpu.project_rows_(g, W)
    assert torch.allclose(W.norm(dim=1), torch.ones(5))
    assert (g * W).sum(1).abs().max() < 1e-6


# ---- what is refused ----


@refusals(
    "call, error, message",
    [
        (lambda t: cpu.normalize_rows_(t[0]), ValueError, r"W_dec: .* got \(6\)"),
        (lambda t: cpu.normalize_rows_(t.double()), TypeError, "W_dec: .* got float64"),
        (lambda t: cpu.normalize_rows_(t.t()), ValueError, r"W_dec: .* strides \(1, 6\)"),
        (lambda t: cpu.normalize_rows_(t[:1].expand(4, 6)), ValueError, "W_dec: .* not overlap"),
        (lambda t: cpu.normalize_rows_(t[0, :1].expand(4, 1)), ValueError, "W_dec: .* overlap"),
        (lambda t: cpu.project_rows_(t[1:], t), ValueError, r"grad: .* got \(3, 6\)"),
        (lambda t: cpu.project_rows_(t.bfloat16(), t), TypeError, "grad: .* got bfloat16"),
        (lambda t: cpu.project_rows_(t, t.bfloat16()), TypeError, "grad: .* got float32"),
        (lambda t: cpu.project_rows_(t[:1].expand(4, 6), t), ValueError, "grad: .* not overlap"),
        (lambda t: cpu.column_sum(t.half()), TypeError, "m: .* got float16"),
        (lambda t: cpu.column_sum(t, t[0]), ValueError, r"coef: expected shape \(4\), got \(6\)"),
        (lambda t: cpu.row_gradients(t, t.int(), t[:3], 9), IndexError, r"token: .*\[0, 3\)"),
        (lambda t: cpu.row_gradients(t[:3], t.int(), t, 9), IndexError, r"entry: .*\[0, 18\)"),
        (lambda t: cpu.row_gradients(t, t.int(), t.half(), 9), TypeError, "src: .* got float16"),
        (lambda t: cpu.row_gradients(t.half(), t.int(), t, 9), TypeError, "coef: .* got float16"),
        (lambda t: cpu.row_gradients(t, t.int(), t, 5), IndexError, r"idx: .*\[-1, 5\)"),
    ],
)
def test_says_what_is_wrong(call, error, message):
    with threads(2), pytest.raises(error, match=message):
        call(torch.arange(24.0).view(4, 6) % 6)
