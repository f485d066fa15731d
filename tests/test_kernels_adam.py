"""kernels/adam.py and gradients.py: against float64 from equal states, bit by bit, as compiled."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from aot import TARGETS, compiled, run_all
from torch import Tensor

from fastsae import reference
from fastsae.kernels import adam, gradients
from fastsae.ops import RowGradient

NAN, INF = float("nan"), float("inf")

HYPER = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0, "lazy": False}


class State:
    """A parameter with its moments; `step` and `norm` run the kernels on flat lists of tensors."""

    def __init__(self, *shape: int, project=False, m=True, dtype=torch.float32, state=None) -> None:
        self.generator = torch.Generator().manual_seed(sum(shape))
        p = self.draw(*shape)
        self.project = project
        self.p = (p / p.norm(dim=-1, keepdim=True) if project else p).to(dtype)
        self.m = torch.zeros(shape, dtype=state or torch.float32) if m else None
        self.v = torch.zeros(shape, dtype=state or torch.float32)
        self.last = torch.zeros(len(reference.as_rows(p)), dtype=torch.int32)

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def pairs(self, n: int, k: int, lengths: list[int] | None = None) -> RowGradient:
        """Of all latents but the last two; a quarter of the slots is padding that holds NaN."""
        shape = (n, k) if lengths is None else (sum(lengths),)
        n_rows = len(self.last)
        idx = torch.randint(0, max(n_rows - 2, 1), shape, generator=self.generator)
        idx[torch.rand(shape, generator=self.generator) < 0.25] = -1
        coef = self.draw(*shape).masked_fill(idx < 0, NAN)
        row_ptr = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0)
        return RowGradient(coef, idx.int(), self.draw(n, self.p.shape[-1]), row_ptr)

    @property
    def tensors(self) -> list[Tensor]:
        return [t for t in (self.p, self.m, self.v, self.last) if t is not None]

    def step(self, run: Callable, step, dense=None, grads=(), lr=0.01, scale=1.0, **hyper) -> None:
        args = self.p, dense, self.m, self.v, self.last, lr, scale, step
        hyper = {**HYPER, **hyper, "project": self.project}
        found = run(stepped, *args, *itertools.chain(*grads), **hyper)
        parts = found.split([t.numel() for t in self.tensors])
        for t, part in zip(self.tensors, parts, strict=True):
            t.copy_(part.view(t.shape))

    def exact_step(self, step, dense=None, grads=(), lr=0.01, scale=1.0, **hyper) -> list[Tensor]:
        p, m, v = (None if t is None else t.double() for t in (self.p, self.m, self.v))
        last, hyper = self.last.clone(), {**HYPER, **hyper}
        dense = None if dense is None else dense.double()
        args = p, dense, [wide(g) for g in grads], self.project, m, v, last
        reference.adam_(*args, lr=lr, scale=scale, step=step, **hyper)
        return [t for t in (p, m, v, last) if t is not None]

    def norm(self, run: Callable, dense=None, grads=()) -> Tensor:
        return run(normed, self.p, dense, *itertools.chain(*grads), project=self.project)

    def exact_norm(self, dense=None, grads=()) -> float:
        dense = None if dense is None else dense.double()
        grads = [wide(g) for g in grads]
        return reference.gradient_square_norm(self.p.double(), dense, grads, self.project)


def unflat(tensors: tuple[Tensor | None, ...]) -> list[RowGradient]:
    step = len(RowGradient._fields)
    return [RowGradient(*tensors[i : i + step]) for i in range(0, len(tensors), step)]


def stepped(p, dense, m, v, last, lr, scale, step, *flat, project, **hyper: Any) -> Tensor:
    args = p, dense, unflat(flat), project, m, v, last
    adam.adam_(*args, lr=lr, scale=scale, step=step, **hyper)
    return torch.cat([t.reshape(-1).double() for t in (p, m, v, last) if t is not None])


def normed(p, dense, *flat, project) -> Tensor:
    found = gradients.gradient_square_norm(p, dense, unflat(flat), project)
    assert found.shape == () and found.dtype == torch.float32 and found.device == p.device
    return found


def wide(g: RowGradient) -> RowGradient:
    return RowGradient(g.coef.double(), g.idx, g.src.double(), g.row_ptr)


@run_all
@pytest.mark.parametrize("project", [False, True], ids=["free", "unit"])
@pytest.mark.parametrize(
    "hyper",
    [
        {},
        {"lazy": True},
        {"beta1": 0.0},
        {"weight_decay": 0.1},
        {"beta1": 0.0, "weight_decay": 0.1},
        {"scale": 0.25, "eps": 1e-3},
    ],
    ids=lambda hyper: "-".join(hyper) or "default",
)
def test_steps_are_the_references(run, project, hyper):
    state = State(7, 37, project=project, m=hyper.get("beta1") != 0)
    given = [
        (None, [state.pairs(4, 1), state.pairs(5, 0, [2, 0, 9, 1, 3]), state.pairs(3, 2)]),
        (None, []),
        (None, [state.pairs(2, 1)]),
        (state.draw(7, 37), [state.pairs(2, 1)]),
    ]
    for step, (dense, grads) in enumerate(given, 1):
        expected = state.exact_step(step, dense, grads, **hyper)
        square = state.exact_norm(dense, grads)
        assert float(state.norm(run, dense, grads)) == pytest.approx(square, rel=1e-6)
        state.step(run, step, dense, grads, **hyper)
        for got, exact in zip(state.tensors[:-1], expected[:-1], strict=True):
            torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=1e-6)
        assert torch.equal(state.last, expected[-1])


@run_all
@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (1, 40), (3, 1300), (1,), (2500,), (2, 3, 5)])
@pytest.mark.parametrize("project", [False, True], ids=["free", "unit"])
def test_shapes(run, shape, project):
    state = State(*shape, project=project)
    n_tokens = 50 if len(state.last) == 1 else 3  # then a row has more than one chunk of pairs
    dense, grads = state.draw(*shape), [state.pairs(n_tokens, 2)]
    for step, given in enumerate([(dense, []), (None, grads), (dense, grads)], 1):
        expected = state.exact_step(step, *given)
        square = state.exact_norm(*given)
        assert float(state.norm(run, *given)) == pytest.approx(square, rel=1e-6, abs=1e-12)
        state.step(run, step, *given)
        if not (project and shape[-1] == 1):  # there the gradient is noise around 0
            for got, exact in zip(state.tensors, expected, strict=True):
                torch.testing.assert_close(got.double(), exact.double(), rtol=1e-6, atol=2e-6)


@run_all
@pytest.mark.parametrize("shape", [(0, 5), (0,)])
def test_nothing(run, shape):
    state = State(*shape)
    state.step(run, 1, state.draw(*shape))
    assert state.norm(run, state.draw(*shape)) == 0


@run_all
def test_dense_and_src_of_any_stride_and_dtype(run):
    one, other = State(4, 70), State(4, 70)
    dense, pairs = one.draw(4, 70), one.pairs(3, 2)
    src = pairs.src.bfloat16()
    one.step(run, 1, dense, [pairs._replace(src=src.float())])
    spread = torch.full((3, 140), NAN, dtype=torch.bfloat16)[:, ::2].copy_(src)
    other.step(run, 1, dense.t().contiguous().t(), [pairs._replace(src=spread)])
    for a, b in zip(one.tensors, other.tensors, strict=True):
        assert torch.equal(a, b)


@run_all
def test_several_gradients_are_one_list_of_pairs(run):
    one, other = State(6, 40, project=True), State(6, 40, project=True)
    a, b = one.pairs(5, 3), one.pairs(4, 3)
    both = RowGradient(*(torch.cat(ts) for ts in list(zip(a, b, strict=True))[:3]), None)
    one.step(run, 1, None, [a, b])
    other.step(run, 1, None, [both])
    for t, u in zip(one.tensors, other.tensors, strict=True):
        assert torch.equal(t, u)


@run_all
@pytest.mark.parametrize("hyper", [{"lazy": True}, {"beta1": 0.0}, {}], ids=str)
def test_rows_that_do_not_move_keep_their_bits(run, hyper):
    state = State(7, 33, m=hyper.get("beta1") != 0, project=True)
    state.p[6], state.v[6] = NAN, NAN
    if hyper:
        state.last += 2  # touched before, and yet they do not move
        state.v += 0.3
    before = [t.clone() for t in state.tensors]
    pairs = state.pairs(4, 2)
    state.step(run, 3, None, [pairs], **hyper)
    touched = torch.zeros(7, dtype=torch.bool)
    touched[pairs.idx[pairs.idx >= 0].long()] = True
    assert 0 < touched.sum() < 7
    for old, new in zip(before, state.tensors, strict=True):
        kept = [t.view(torch.int32)[~touched] for t in (old, new)]
        assert torch.equal(*kept)
        assert (old[touched] != new[touched]).reshape(int(touched.sum()), -1).any(1).all()


@run_all
@pytest.mark.parametrize("scale", [NAN, INF, -INF])
@pytest.mark.parametrize("shape", [(5, 20), (1100,)])
def test_a_scale_that_is_not_finite_writes_nothing(run, scale, shape):
    state = State(*shape)
    before = [t.clone() for t in state.tensors]
    given = {"dense": state.draw(*shape), "weight_decay": 0.1}
    for value in (scale, torch.tensor(scale)):
        state.step(run, 1, scale=value, **given)
        for old, new in zip(before, state.tensors, strict=True):
            assert torch.equal(old, new)
    state.step(run, 1, scale=1.0, **given)
    assert not torch.equal(before[0], state.p)


@run_all
@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.int64])
def test_numbers_may_be_tensors(run, kind):
    numbers, tensors = State(4, 20), State(4, 20)
    dense = numbers.draw(4, 20)
    lr, scale = (2, 3) if kind == torch.int64 else (0.125, 0.75)
    for step in (1, 2):
        numbers.step(run, step, dense, lr=lr, scale=scale)
        given = {"lr": torch.tensor(lr, dtype=kind), "scale": torch.tensor(scale, dtype=kind)}
        tensors.step(run, torch.tensor(step, dtype=kind), dense, **given)
    for a, b in zip(numbers.tensors, tensors.tensors, strict=True):
        assert torch.equal(a, b)


@run_all
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.99, 0.9999), (0.0, 0.5)], ids=str)
@pytest.mark.parametrize("step", [1, 2, 10, 1000, 1_000_000])
def test_bias_corrections(run, betas, step):
    beta1, beta2 = betas
    state = State(1, 4, m=beta1 != 0)
    state.p.zero_()
    state.last += step - 1
    state.step(run, step, torch.ones(1, 4), lr=1.0, beta1=beta1, beta2=beta2, eps=0.0)
    first = (1 - beta1) / -math.expm1(step * math.log(beta1)) if beta1 else 1.0
    second = (1 - beta2) / -math.expm1(step * math.log(beta2))
    assert float(state.p[0, 0]) == pytest.approx(-first / math.sqrt(second), rel=5e-7)


@run_all
def test_second_moment_is_caught_up(run):
    for gap, beta2 in ((1, 0.999), (40, 0.99), (900, 0.999), (3, 0.0)):
        state = State(2, 1030, m=False)  # two slices, and one of them writes `last`
        state.v += 1
        state.last += 7
        state.step(run, 7 + gap, torch.zeros(2, 1030), beta1=0.0, beta2=beta2)
        assert state.v == pytest.approx(torch.full((2, 1030), beta2**gap), rel=1e-5)


@run_all
def test_bf16_is_rounded_to_nearest(run):
    half, full = State(5, 60, dtype=torch.bfloat16, state=torch.bfloat16), State(5, 60)
    half.m += half.draw(5, 60).bfloat16()
    half.v += half.draw(5, 60).bfloat16().abs()
    full.p, full.m, full.v = (t.float() for t in (half.p, half.m, half.v))
    dense = half.draw(5, 60)
    dense[0, :3] = torch.tensor([INF, -INF, NAN])
    half.step(run, 1, dense)
    full.step(run, 1, dense)
    for a, b in zip(half.tensors, full.tensors, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=0, atol=0, equal_nan=True)
    assert (full.p.bfloat16() != full.p)[1:].any()


@run_all
@pytest.mark.parametrize("project", [False, True], ids=["free", "unit"])
def test_fp16_parameters(run, project):
    """Rounded as `.to(float16)` rounds, to inf too; gradients are of the rounded parameter."""
    half = State(5, 60, project=project, dtype=torch.float16)
    full = State(5, 60, project=project)
    full.p = half.p.float()
    dense, grads = half.draw(5, 60).half(), [half.pairs(3, 2)]
    for step in (1, 2):
        expected = float(full.norm(run, dense, grads))
        assert float(half.norm(run, dense, grads)) == expected
        half.step(run, step, dense, grads)
        full.step(run, step, dense, grads)
        for a, b in zip(half.tensors, full.tensors, strict=True):
            assert torch.equal(a, b.to(a.dtype))
        assert (half.p.float() != full.p).any()
        full.p = half.p.float()
    half.step(run, 3, dense, lr=1e9, weight_decay=0.0)
    full.step(run, 3, dense, lr=1e9, weight_decay=0.0)
    assert torch.equal(half.p, full.p.half())
    assert project or half.p.isinf().any()


@run_all
def test_p_m_and_v_have_dtypes_of_their_own(run):
    dtypes = torch.float32, torch.bfloat16
    for dtype, m, v in itertools.product(dtypes, repeat=3):
        state, full = State(2, 20, dtype=dtype), State(2, 20)
        state.m, state.v = state.m.to(m), state.v.to(v)
        full.p = state.p.float()
        dense = state.draw(2, 20)
        state.step(run, 1, dense)
        full.step(run, 1, dense)
        for a, b in zip(state.tensors, full.tensors, strict=True):
            assert torch.equal(a, b.to(a.dtype))


@run_all
def test_stochastic_rounding_has_no_bias(run):
    shape = 24, 1024
    full = State(*shape)
    half = State(*shape, dtype=torch.bfloat16, state=torch.bfloat16)
    full.p = half.p.float()
    dense = full.draw(*shape)
    full.step(run, 1, dense)
    again = State(*shape, dtype=torch.bfloat16, state=torch.bfloat16)
    half.step(run, 1, dense, stochastic_rounding=True)
    again.step(run, 1, dense, stochastic_rounding=True)
    ups = []
    for got, x, same in list(zip(half.tensors, full.tensors, again.tensors, strict=True))[:3]:
        assert torch.equal(got, same)
        bits, low = x.view(torch.int32), x.view(torch.int32) & -65536
        part = (bits - low).double() / 65536  # of the way from low to the next, away from 0
        up = (got.float().view(torch.int32) - low) >> 16
        assert ((up == 0) | ((up == 1) & (part > 0))).all()
        error = (up - part).mean() * x.numel() ** 0.5
        assert abs(error) < 5 * (part * (1 - part)).mean().sqrt()
        ups.append(up.double() - part)
    for a, b in itertools.combinations(ups, 2):
        assert abs((a * b).mean()) * a.numel() ** 0.5 < 5 * a.std() * b.std()

    other = State(*shape, dtype=torch.bfloat16, state=torch.bfloat16)
    other.step(run, 2, dense, stochastic_rounding=True)
    assert (other.v != half.v).float().mean() > 0.2
    other.step(run, 3, torch.full(shape, NAN), stochastic_rounding=True)
    assert all(t.isnan().all() for t in other.tensors[:3])


@run_all
@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e22, 1e30])
def test_projection_of_rows_whose_squares_overflow_or_vanish(run, size):
    state = State(3, 50, project=True)
    unit = State(3, 50, project=True)
    state.p *= size
    dense = state.draw(3, 50)
    state.p[2], unit.p[2] = 0, 0
    assert float(state.norm(run, dense)) == pytest.approx(unit.exact_norm(dense), rel=1e-6)
    state.step(run, 1, dense, lr=0.01 * size)
    expected = unit.exact_step(1, dense)[0]
    torch.testing.assert_close(state.p[:2].double(), expected[:2], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(state.p[2].double(), expected[2], rtol=1e-6, atol=1e-6)
    state.step(run, 2, torch.zeros(3, 50), lr=0.0)
    assert state.p.norm(dim=1) == pytest.approx(torch.ones(3), rel=1e-6)


@run_all
def test_a_row_of_zeros_stays(run):
    state = State(1, 50, project=True)
    state.p.zero_()
    state.step(run, 1, torch.zeros(1, 50))
    assert torch.equal(state.p, torch.zeros(1, 50))


def pairs_added(x: Tensor) -> Tensor:
    width = 1 << (x.shape[-1] - 1).bit_length()
    x = torch.nn.functional.pad(x, (0, width - x.shape[-1]))
    while x.shape[-1] > 1:
        x = x[..., 0::2] + x[..., 1::2]
    return x[..., 0]


@run_all
def test_order_of_the_norms_summation(run):
    state = State(3, 1500)
    dense = state.draw(3, 1500)
    squares = [pairs_added(part.square()) for part in dense.split(1024, dim=1)]
    lanes = torch.zeros(1024)
    lanes[:6] = torch.stack(squares, 1).reshape(-1)
    assert torch.equal(state.norm(run, dense), pairs_added(lanes))


@pytest.mark.gpu
def test_nothing_waits_for_the_device():
    state = State(6, 40, project=True)
    p, m, v, last = (t.cuda() for t in state.tensors)
    grads = [RowGradient(*(t if t is None else t.cuda() for t in state.pairs(5, 3)))]
    grads.append(RowGradient(*(t.cuda() for t in state.pairs(3, 0, [2, 0, 70]))))
    scale, step = torch.ones((), device="cuda"), torch.ones((), device="cuda")
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        square = gradients.gradient_square_norm(p, None, grads, True)
        hyper = {**HYPER, "lr": 0.01, "scale": scale / square.sqrt(), "step": step}
        adam.adam_(p, None, grads, True, m, v, last, **hyper)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert (last == 1).any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"p": torch.zeros(4, 6).double()}, TypeError, "p: expected torch.float32 or .*float64"),
        ({"p": torch.zeros(6, 4).t()}, ValueError, "p: expected"),
        ({"p": torch.zeros(4, 12)[:, ::2]}, ValueError, "p: expected unit inner stride"),
        ({"p": torch.zeros(4, 12)[:, :6]}, ValueError, "p: expected a contiguous tensor"),
        ({"dense": torch.zeros(6, 4)}, ValueError, r"dense: expected shape \(4, 6\), got \(6, 4\)"),
        ({"m": None}, ValueError, "m: expected a tensor, as beta1 is 0.9, got None"),
        ({"v": torch.zeros(4, 5)}, ValueError, r"v: expected shape \(4, 6\), got \(4, 5\)"),
        ({"v": torch.zeros(4, 6).half()}, TypeError, "v: expected .* got torch.float16"),
        ({"last": torch.zeros(4)}, TypeError, "last: expected torch.int32, got torch.float32"),
        ({"last": torch.zeros(3).int()}, ValueError, r"last: expected shape \(4\), got \(3,\)"),
        ({"scale": torch.ones(1)}, ValueError, r"scale: expected shape \(\), got \(1,\)"),
        ({"step": torch.ones(()).bool()}, TypeError, "step: expected .* got torch.bool"),
        (
            {"gradients": [State(4, 5).pairs(3, 2)]},
            ValueError,
            r"src: expected shape \(N, 6\), got \(3, 5\)",
        ),
    ],
)
def test_says_what_is_wrong(change, error, message):
    args: dict[str, Any] = {name: torch.zeros(4, 6) for name in ("p", "dense", "m", "v")}
    args |= {"gradients": [], "project": False, "last": torch.zeros(4, dtype=torch.int32)}
    args |= {**HYPER, "lr": 0.1, "scale": 1.0, "step": 1}
    with pytest.raises(error, match=message):
        adam.adam_(**{**args, **change})


def test_projected_rows_have_a_limit():
    p = torch.zeros(1, 16385)
    with pytest.raises(ValueError, match="rows of at most 16384 with project, got 16385"):
        gradients.gradient_square_norm(p, p, [], True)


@pytest.mark.parametrize(
    ("target", "variant"),
    [
        (target, variant)
        for target in TARGETS
        for variant in (*adam.variants(), *gradients.variants())
        if (target == "H100" and ("no-m" not in variant or "both" in variant))
        or variant in ("bf16-8192-project", "fp32-both", "fp16-4096-project", "constants")
    ],
)
def test_compiled(target, variant):
    module = gradients if variant in gradients.variants() else adam
    used = compiled(module.__name__, variant, TARGETS[target])
    assert used["registers"] <= 255
    # Bytes of a thread; the tiles are tuned for an H100.
    long_rows = {"16384-project-i8": 640, "8192-project-i8": 128, "16384": 400}
    few = 0 if target == "H100" else 16
    allowed = next((limit for name, limit in long_rows.items() if name in variant), few)
    assert used["spills"] <= allowed
    assert used["shared"] <= 65536
    assert used["atomics"] == 0
    if "ragged" not in variant and variant != "constants":
        assert used["load_bytes"] == 16
