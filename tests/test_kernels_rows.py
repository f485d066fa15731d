"""rows.py, column_sum.py, unit_rows.py: against float64, bit by bit where an order is promised, and
as compiled.

Products of two numbers of bf16 are exact in fp32, so with such inputs fused and separate
multiply-adds agree and plain torch can follow the promised order.
"""

from pathlib import Path
from unittest import mock

import pytest
import torch
from aot import TARGETS, compiled, interpreted, run_all
from common import assert_within_eager, name_of, ragged, randint, randn, random_codes
from torch import Tensor

from fastsae import reference
from fastsae.kernels import column_sum, rows, unit_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAN, INF = float("nan"), float("inf")

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)


def bf16_values(*shape: int, seed: int = 0) -> Tensor:
    return randn(*shape, seed=seed).bfloat16().float()


# ---- gradient rows ----


def joined(coef: Tensor, idx: Tensor, src: Tensor, f: int, row_ptr=None, dtype=None) -> Tensor:
    """The rows, and the sums as a last column."""
    found, sums = rows.row_gradients(coef, idx, src, f, row_ptr, dtype)
    assert (found.dtype, sums.dtype) == (dtype or torch.float32, torch.float32)
    assert (found.shape, sums.shape) == ((f, src.shape[1]), (f,))
    return torch.cat([found.float(), sums[:, None]], 1)


def exact(coef: Tensor, idx: Tensor, src: Tensor, f: int, row_ptr=None) -> Tensor:
    found, sums = reference.row_gradients(coef.double(), idx, src.double(), f, row_ptr)
    return torch.cat([found, sums[:, None]], 1)


def integer_codes(n: int, k: int, f: int) -> tuple[Tensor, Tensor]:
    _, idx = random_codes(n, k, f)
    return randint(4, n, k, low=-3).masked_fill(idx < 0, NAN), idx


def with_lengths(lengths: list[int]) -> Tensor:
    """idx (N, 1) in which latent f is in lengths[f] tokens, at random."""
    idx = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(torch.tensor(lengths))
    order = torch.randperm(len(idx), generator=torch.Generator().manual_seed(len(idx)))
    return idx[order][:, None]


SIZES = [
    (1, 1, 1, 1),
    (3, 1, 5, 2),
    (20, 4, 129, 9),
    (5, 3, 600, 20),
    (30, 3, 33, 1),
    (0, 4, 16, 3),
    (3, 0, 16, 3),
    (3, 4, 0, 3),
]


# Sums of small integers are exact in any order, so any index or mask that is wrong shows.
@run_all
@dtypes
@pytest.mark.parametrize("layout", ["padded", "ragged"])
@pytest.mark.parametrize(("n", "k", "d", "f"), SIZES, ids=["-".join(map(str, s)) for s in SIZES])
def test_shapes(run, n, k, d, f, layout, dtype):
    coef, idx = integer_codes(n, k, f)
    src, row_ptr = randint(4, n, d, low=-3, seed=1).to(dtype), None
    if layout == "ragged":
        coef, idx, row_ptr = ragged(coef, idx)
    assert torch.equal(
        run(joined, coef, idx, src, f, row_ptr).double(), exact(coef, idx, src, f, row_ptr)
    )


@run_all
@dtypes
def test_dtypes_of_rows_and_coef(run, dtype):
    coef, idx = integer_codes(12, 3, 8)
    src = randint(4, 12, 40, low=-3, seed=1)
    for src_dtype in (torch.float32, dtype):
        found = run(joined, coef.to(dtype), idx, src.to(src_dtype), 8, None, dtype)
        assert torch.equal(found.double(), exact(coef, idx, src, 8))


# Where the long segments begin and end against the places of the partial sums' rows.
@run_all
@pytest.mark.parametrize(
    "lengths",
    [
        [450],
        [63, 64, 65, 66],
        [1, 127, 128, 129, 0, 65, 64],
        [5, *[65] * 7],
        [63, 192, 1, 130, 62, 191],
        [0, 0, 128, 0, 256, 0],
    ],
    ids=str,
)
def test_long_segments(run, lengths):
    idx, f = with_lengths(lengths), len(lengths)
    coef, src = randint(4, len(idx), 1, low=-3), randint(4, len(idx), 5, low=-3, seed=1)
    assert torch.equal(run(joined, coef, idx, src, f).double(), exact(coef, idx, src, f))


@run_all
@dtypes
def test_error_is_at_most_eagers(run, dtype):
    coef, idx = random_codes(80, 4, 20)
    idx[:, 2] = 11
    coef = torch.where(idx >= 0, randn(80, 4), NAN)
    src = randn(80, 40, seed=1).to(dtype)
    expected = exact(coef, idx, src, 20)
    for out in {torch.float32, dtype}:
        found = run(joined, coef, idx, src, 20, None, out)
        eager, _ = reference.row_gradients(coef.to(out), idx, src.to(out), 20, dtype=out)
        assert_within_eager(found[:, :-1].to(out), eager, expected[:, :-1])
        _, eager_sums = reference.row_gradients(coef, idx, src, 20)
        assert_within_eager(found[:, -1], eager_sums, expected[:, -1])


def in_order(coef: Tensor, idx: Tensor, src: Tensor, f: int) -> Tensor:
    latent_ptr, token, entry = reference.inverse_index(idx, f)
    src = torch.cat([src, torch.ones(len(src), 1)], 1)
    found = torch.zeros(f, src.shape[1])
    for i in range(f):
        begin, end = latent_ptr[i : i + 2].tolist()
        for chunk in range(begin, end, 64):
            acc = torch.zeros(src.shape[1])
            for pair in range(chunk, min(chunk + 64, end)):
                acc = acc + coef.view(-1)[entry[pair].long()] * src[token[pair].long()]
            found[i] += acc
    return found


@run_all
def test_order_of_summation(run):
    idx = with_lengths([1, 30, 64, 65, 200, 0, 128, 3])
    coef, src = bf16_values(len(idx), 1), bf16_values(len(idx), 7, seed=1)
    found = run(joined, coef, idx, src, 8)
    assert torch.equal(found, in_order(coef, idx, src, 8))
    assert not torch.equal(found[4, :-1], (coef * src)[idx[:, 0] == 4].sum(0))  # it matters


@run_all
def test_bits_depend_on_the_latents_own_pairs_alone(run):
    idx = with_lengths([7, 150, 90, 64, 2])
    coef, src = randn(len(idx), 1), randn(len(idx), 20, seed=1)
    found = run(joined, coef, idx, src, 5)
    for f in range(5):
        alone = idx.where(idx == f, -1)
        assert torch.equal(run(joined, coef, alone, src, 5)[f], found[f])
        here = idx[:, 0] == f
        zeros = torch.zeros_like(idx[here])
        assert torch.equal(run(joined, coef[here], zeros, src[here], 1)[0], found[f])


@run_all
def test_bits_do_not_depend_on_the_width(run):
    idx = with_lengths([7, 150])
    coef, src = randn(len(idx), 1), randn(len(idx), 300, seed=1)
    found = run(joined, coef, idx, src, 2)
    narrow = run(joined, coef, idx, src[:, 290:], 2)
    assert torch.equal(narrow, found[:, 290:])


@run_all
def test_strides(run):
    coef, idx = random_codes(70, 3, 12)
    idx[:, 1] = 5
    coef = randn(70, 3).masked_fill(idx < 0, NAN)
    src = randn(70, 50, seed=1)
    found = run(joined, coef, idx, src, 12)
    inside = torch.full((140, 63), NAN)[::2, 5:55].copy_(src)
    for other in (inside, src.t().contiguous().t()):
        assert torch.equal(run(joined, coef, idx, other, 12), found)
    apart = torch.full((70, 8), NAN)[:, 3:6].copy_(coef)
    ids_apart = torch.full((140, 3), 3, dtype=torch.int32)[::2].copy_(idx)
    assert torch.equal(run(joined, apart, ids_apart, src, 12), found)
    one = torch.tensor(0.5).expand(70, 50)  # as .sum() sends it back
    expected = run(joined, coef, idx, one.contiguous(), 12)
    assert torch.equal(run(joined, coef, idx, one, 12), expected)


@run_all
def test_padding_and_foreign_rows_are_not_read(run):
    idx = with_lengths([100, 70, 5])
    coef, src = randn(len(idx), 1), randn(len(idx), 9, seed=1)
    idx[::9] = -1
    coef[::9], src[::9] = NAN, NAN
    src[int((idx[:, 0] == 1).nonzero()[0])] = INF
    found = run(joined, coef, idx, src, 3)
    assert found[[0, 2]].isfinite().all()
    assert not found[1, :-1].isfinite().any()
    none = torch.full((90, 2), -1, dtype=torch.int32)
    assert torch.equal(run(joined, none * NAN, none, src[:90], 3), torch.zeros(3, 10))


def sums_alone(coef: Tensor, idx: Tensor, src: Tensor, f: int) -> Tensor:
    found, sums = rows.row_gradients(coef, idx, src, f, need_rows=False)
    assert found.shape == (0, src.shape[1])
    return sums


@run_all
def test_without_rows(run):
    idx = with_lengths([3, 130, 0])
    coef, src = randn(len(idx), 1), randn(len(idx), 4)
    assert torch.equal(run(sums_alone, coef, idx, src, 3), run(joined, coef, idx, src, 3)[:, -1])


@pytest.mark.gpu
def test_cuda_graph():
    idx = with_lengths([450, 3, 70]).cuda()
    coef, src = randint(4, len(idx), 1).cuda(), randint(4, len(idx), 5, seed=1).cuda()
    rows.row_gradients(coef, idx, src, 3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found, sums = rows.row_gradients(coef, idx, src, 3)
    idx.copy_(idx.flip(0))
    graph.replay()
    assert torch.equal(torch.cat([found, sums[:, None]], 1).double(), exact(coef, idx, src, 3))


# ---- sums of columns ----


@run_all
@pytest.mark.parametrize(
    ("r", "dtype"),
    [(0, torch.float32), (1, torch.float32), (256, torch.float32), (513, torch.float32)]
    + [(257, dtype) for dtype in DTYPES],
    ids=str,
)
def test_column_sum(run, r, dtype):
    m, coef = randint(4, r, 150, low=-3).to(dtype), randint(4, r, low=-3, seed=1).to(dtype)
    for c in (None, coef):
        found = run(column_sum.column_sum, m, c)
        assert found.dtype == torch.float32
        assert torch.equal(found.double(), reference.column_sum(m.double(), c))


@run_all
def test_column_sum_order_and_strides(run):
    m, coef = bf16_values(300, 9), bf16_values(300, seed=1)
    for c in (None, coef):
        terms = m if c is None else c[:, None] * m
        expected = torch.zeros(9)
        for part in terms.split(256):
            acc = torch.zeros(9)
            for term in part:
                acc = acc + term
            expected = expected + acc
        assert torch.equal(run(column_sum.column_sum, m, c), expected)
        inside = torch.full((600, 21), NAN)[::2, 4:13].copy_(m)
        for other in (inside, m.t().contiguous().t()):
            assert torch.equal(run(column_sum.column_sum, other, c), expected)
        one = run(column_sum.column_sum, m[:1].expand(300, 9).contiguous(), c)
        assert torch.equal(run(column_sum.column_sum, m[:1].expand(300, 9), c), one)
    assert run(column_sum.column_sum, m[:, :0]).shape == (0,)


# ---- rows in place ----


def projected(grad: Tensor, W_dec: Tensor) -> Tensor:
    before, bits = grad._version, W_dec.clone()
    unit_rows.project_rows_(grad, W_dec)
    assert grad._version > before
    assert torch.equal(W_dec, bits)
    return grad


def normalized(W_dec: Tensor) -> Tensor:
    before = W_dec._version
    unit_rows.normalize_rows_(W_dec)
    assert W_dec._version > before
    return W_dec


def lane_sum(products: Tensor) -> Tensor:
    lanes = torch.zeros(len(products), 256)
    for part in products.split(256, 1):
        lanes[:, : part.shape[1]] += part
    for _ in range(8):
        lanes = lanes[:, 0::2] + lanes[:, 1::2]
    return lanes


@run_all
def test_order_in_a_row(run):
    W, g = bf16_values(3, 700), bf16_values(3, 700, seed=1)
    square = lane_sum(W * W)
    assert not torch.equal(square, (W * W).sum(1, keepdim=True))  # it matters
    assert torch.equal(run(normalized, W.clone()), W / square.sqrt())
    coef = lane_sum(g * W) / square
    expected = (g.double() - coef.double() * W.double()).float()
    assert torch.equal(run(projected, g.clone(), W), expected)


# Every scale by which squares, or what is divided by them, would overflow or vanish.
SCALES = [1.0, 1e-15, 1e15, 2.0**-126, 2.0**120, 1e-30, 1e30]


@run_all
@dtypes
@pytest.mark.parametrize("d", [1, 5, 300])
def test_rows_against_float64(run, d, dtype):
    top = float(torch.finfo(dtype).max)
    scales = [s for s in SCALES if s * 100 < top and s > torch.finfo(dtype).tiny]
    scale = torch.tensor(scales)[:, None]
    W = (scale * randn(len(scales), d)).to(dtype)
    exact_rows = W.double() / W.double().norm(dim=1, keepdim=True)
    found = run(normalized, W.clone())
    # Half an ulp of the dtype, and of fp32 the sum's roundings, halved by the root, and three.
    bound = torch.finfo(dtype).eps * (1 if run is interpreted else 0.5) + 12 * 2.0**-24
    assert (
        (found - exact_rows).abs() <= bound * exact_rows.abs() + 1e-7 * (dtype != DTYPES[0])
    ).all()

    for g_dtype in {torch.float32, dtype}:
        for g_scale in (1.0, scale.flip(0), scale):
            g = (g_scale * randn(len(scales), d, seed=1)).to(g_dtype)
            along = (g.double() * exact_rows).sum(1, keepdim=True)
            got = run(projected, g.clone(), W).double()
            bound = (2 * torch.finfo(g_dtype).eps + 40 * 2.0**-24) * g.double().norm(dim=1)
            error = (got - (g.double() - along * exact_rows)).norm(dim=1)
            assert (error <= bound + torch.finfo(g_dtype).smallest_normal * 2.0**-8 * d).all()


@run_all
@dtypes
def test_rows_of_extremes(run, dtype):
    top, tiny = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    if not (run is interpreted and dtype == torch.bfloat16):  # it takes bf16's subnormals for 0
        tiny /= 8
    W = torch.zeros(6, 40, dtype=dtype)
    W[0, 39], W[1, 0], W[2, 3], W[4, ::10], W[5, 1::10] = top, tiny, -2.0, top, -tiny
    unit = W.sign() / torch.tensor([1.0, 1, 1, 1, 2, 2])[:, None]
    assert torch.equal(run(normalized, W.clone()), unit.to(dtype))
    got = run(projected, torch.full((6, 40), 3.0, dtype=dtype), W)
    assert (got[W != 0].abs() <= 1e-6).all()
    assert (got[W == 0] == 3).all()
    g = torch.full((3, 5), 2.0**-140)
    g[1], g[2] = 2.0**125, torch.tensor([2.0**127, -1.0, 1e-30, 2.0**-149, 0])
    got = run(
        projected, g.clone(), torch.tensor([[1.0, 0, 0, 0, 0]]).to(dtype).expand(3, 5).clone()
    )
    g[:, 0] = 0
    assert torch.equal(got, g)
    small = torch.tensor([[top, tiny, -0.0]], dtype=dtype)  # stays to the bit beside a row of zeros
    assert torch.equal(run(projected, small.clone(), torch.zeros(1, 3, dtype=dtype)), small)


@run_all
@dtypes
def test_rows_apart(run, dtype):
    W, g = randn(5, 50).to(dtype), randn(5, 50, seed=1).to(dtype)
    room, room_g = torch.full((10, 61), NAN, dtype=dtype), torch.full((5, 99), NAN, dtype=dtype)
    inside, inside_g = room[::2, 5:55].copy_(W), room_g[:, 49:].copy_(g)
    assert torch.equal(run(projected, inside_g, W), run(projected, g.clone(), W))
    assert torch.equal(run(projected, g.clone(), inside), run(projected, g.clone(), W))
    assert torch.equal(run(normalized, inside), run(normalized, W.clone()))


def of_a_parameter(W_dec: Tensor) -> Tensor:
    parameter = torch.nn.Parameter(W_dec)
    projected(grad := torch.ones_like(W_dec), parameter)
    return torch.cat([normalized(parameter).detach(), grad])


@run_all
def test_parameters_that_require_gradients(run):
    W = randn(5, 8)
    expected = torch.cat([run(normalized, W.clone()), run(projected, torch.ones(5, 8), W)])
    assert torch.equal(run(of_a_parameter, W.clone()), expected)


def beside(room: Tensor) -> Tensor:
    """The room around rows that were written."""
    unit_rows.project_rows_(room[::2, 5:55], torch.ones(5, 50, device=room.device))
    unit_rows.normalize_rows_(room[::2, 5:55])
    return room


@run_all
def test_nothing_is_written_beside_the_rows(run):
    room = randn(10, 61)
    after = run(beside, room.clone())
    changed = after != room
    assert changed[::2, 5:55].all()
    assert changed.sum() == 5 * 50


@run_all
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_no_rows_or_columns(run, shape):
    assert run(normalized, torch.empty(shape)).shape == shape
    assert run(projected, torch.empty(shape), torch.empty(shape)).shape == shape


# ---- offsets past 2³¹ ----


def far_rows(far: Tensor) -> Tensor:
    """All functions on three rows, one after the other."""
    idx = torch.tensor([[1, 0], [-1, 0], [1, 1]], dtype=torch.int32, device=far.device)
    coef = torch.tensor([[1.0, 2], [NAN, 3], [4, 5]], device=far.device)
    near = torch.eye(3, 4, dtype=far.dtype, device=far.device) + 1
    found = [rows.row_gradients(coef, idx, far, 2)[0], column_sum.column_sum(far)[None]]
    unit_rows.project_rows_(far, near)
    found.append(far.float())
    unit_rows.project_rows_(near, far)
    unit_rows.normalize_rows_(far)
    return torch.cat([*found, near.float(), far.float()])


FAR = 2**30 + 8  # two rows of this many elements pass 2³¹


def far_rows_interpreted(path: str, inputs: Tensor) -> Tensor:
    # The interpreter copies every argument's storage back, here 4 GB of a sparse file onto itself.
    with mock.patch("triton.runtime.interpreter.GridExecutor._restore_args_dev"):
        storage = torch.from_file(path, shared=True, size=2 * FAR + 4, dtype=torch.float16)
        return far_rows(storage.as_strided((3, 4), (FAR, 1)).copy_(inputs))


def test_offsets_past_2_to_the_31(tmp_path: Path):
    file, inputs = tmp_path / "rows", randn(3, 4).half()
    far = interpreted(far_rows_interpreted, str(file), inputs)
    file.unlink()
    assert torch.equal(far, interpreted(far_rows, inputs.clone()))


@pytest.mark.gpu
def test_offsets_past_2_to_the_31_on_the_gpu():
    inputs = randn(3, 4).half().cuda()
    storage = torch.empty(2 * FAR + 4, dtype=torch.float16, device="cuda")
    far = storage.as_strided((3, 4), (FAR, 1)).copy_(inputs)
    assert torch.equal(far_rows(far), far_rows(inputs.clone()))


# ---- what is refused ----


def gradients(t: Tensor, **changed) -> None:
    coef, idx, src = t, t.int(), t[:, :3]
    rows.row_gradients(**{"coef": coef, "idx": idx, "src": src, "n_latents": 6, **changed})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda t: gradients(t, idx=t.long()), TypeError, "idx: expected .*int32, got torch.int64"),
        (lambda t: gradients(t, coef=t[1:]), ValueError, r"coef: expected shape \(4, 6\)"),
        (lambda t: gradients(t, coef=t.double()), TypeError, "coef: .* got torch.float64"),
        (lambda t: gradients(t, coef=None), TypeError, "coef: expected a tensor, got NoneType"),
        (lambda t: gradients(t, src=t[:3]), ValueError, r"src: .* \(4, D\), got \(3, 6\)"),
        (lambda t: gradients(t, src=t.int()), TypeError, "src: .* got torch.int32"),
        (lambda t: gradients(t, src=t.to("meta")), ValueError, "src: .* on cpu, got meta"),
        (lambda t: gradients(t, dtype=torch.int8), TypeError, "dtype: .* got torch.int8"),
        (
            lambda t: gradients(t, coef=t[0], idx=t[0].int(), row_ptr=torch.tensor([0, 2, 6])),
            ValueError,
            r"src: expected shape \(2, D\), got \(4, 3\)",
        ),
        (
            lambda t: column_sum.column_sum(t[0]),
            ValueError,
            r"m: expected shape \(R, D\), got \(6,\)",
        ),
        (lambda t: column_sum.column_sum(t.double()), TypeError, "m: .* got torch.float64"),
        (
            lambda t: column_sum.column_sum(t, t[0]),
            ValueError,
            r"coef: expected shape \(4\), got \(6,\)",
        ),
        (
            lambda t: column_sum.column_sum(t, t[:, 0]),
            ValueError,
            "coef: expected unit inner stride",
        ),
        (lambda t: unit_rows.normalize_rows_(t[0]), ValueError, r"W_dec: .* got \(6,\)"),
        (lambda t: unit_rows.normalize_rows_(t.double()), TypeError, "W_dec: .* got torch.float64"),
        (
            lambda t: unit_rows.normalize_rows_(t.t()),
            ValueError,
            "W_dec: expected unit inner stride",
        ),
        (
            lambda t: unit_rows.normalize_rows_(t[:1].expand(4, 6)),
            ValueError,
            "W_dec: .* not overlap",
        ),
        (
            lambda t: unit_rows.project_rows_(t[1:], t),
            ValueError,
            r"grad: .* \(4, 6\), got \(3, 6\)",
        ),
        (lambda t: unit_rows.project_rows_(t.int(), t), TypeError, "grad: .* got torch.int32"),
        (
            lambda t: unit_rows.project_rows_(t, t.to("meta")),
            ValueError,
            "grad: .* on meta, got cpu",
        ),
        (
            lambda t: unit_rows.project_rows_(t[:1].expand(4, 6), t),
            ValueError,
            "grad: .* not overlap",
        ),
    ],
)
def test_says_what_is_wrong(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.arange(24.0).view(4, 6) % 6)


MODULES = {"rows": rows, "column_sum": column_sum, "unit_rows": unit_rows}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("of", "variant"), [(of, v) for of in MODULES for v in MODULES[of].variants()]
)
def test_compiled(of, variant, target):
    used = compiled(f"fastsae.kernels.{of}", variant, TARGETS[target])
    assert used["registers"] <= 128
    assert used["spills"] == 0
    assert used["shared"] <= 1024
    assert used["atomics"] == 0
    if target != "MI300" and not variant.endswith(("-ragged", "-sums")):
        halves = variant.startswith(("column-sum-bf16", "column-sum-fp16"))
        assert used["load_bytes"] == (8 if halves else 16)
