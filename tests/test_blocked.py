"""fastsae.blocked against the same step written out densely, in float64; and its memory."""

import json

import pytest
import torch
from common import backends, randn, run_child, threads
from torch import Tensor

from fastsae import blocked as module
from fastsae import ops
from fastsae.blocked import Pairs, blocked, row_norms, total
from fastsae.optim import Adam

N, D, D_OUT, F = 7, 5, 6, 11
NAMES = ("x", "W_enc", "b_enc", "pre_bias", "W_dec", "b_dec", "theta", "slope")


def pairs(h: Tensor, theta: Tensor, slope: Tensor) -> Pairs:
    """Every kind of output, each with a gradient of h and of both latent vectors."""
    z = torch.relu(slope * h - theta)
    return Pairs(z, ((z + theta).square(), z.detach(), (h * slope).sin()), torch.relu(h + slope))


def inputs(n: int = N, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    shapes = ((n, D), (F, D), (F,), (D,), (F, D_OUT), (D_OUT,), (F,), (F,))
    made = {name: randn(*s, seed=i) for i, (name, s) in enumerate(zip(NAMES, shapes, strict=True))}
    return {name: t.to(dtype).requires_grad_() for name, t in made.items()}


def ours(t: dict[str, Tensor], **options) -> module.Blocked:
    latents = (t["theta"], t["slope"])
    return blocked(pairs, *(t[name] for name in NAMES[:6]), latents, **options)


def dense(t: dict[str, Tensor]) -> module.Blocked:
    h = (t["x"] - t["pre_bias"]) @ t["W_enc"].T + t["b_enc"]
    z, penalties, frozen = pairs(h, t["theta"].expand_as(h), t["slope"].expand_as(h))
    x_frozen = frozen @ t["W_dec"].detach() + t["b_dec"].detach()
    totals = tuple(p.sum() for p in penalties)
    return module.Blocked(z @ t["W_dec"] + t["b_dec"], x_frozen, totals, (z != 0).sum(0))


def outputs(b: module.Blocked) -> list[Tensor]:
    assert b.frozen is not None
    return [b.x_hat, b.frozen, *b.totals]


def loss(b: module.Blocked, used: range) -> Tensor:
    terms = [randn(*t.shape, seed=20 + i).to(t.dtype) * t for i, t in enumerate(outputs(b))]
    return sum((terms[i].sum() for i in used), torch.zeros((), dtype=torch.float64))


@pytest.fixture(params=[1, 3 * N, 2**20], ids=["a-latent", "3-latents", "whole"])
def block(request, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", request.param)


@pytest.mark.parametrize("n", [0, 1, N])
def test_results_and_gradients(block, n):
    mine, theirs = inputs(n), inputs(n)
    a, b = ours(mine), dense(theirs)
    for got, expected in zip(outputs(a), outputs(b), strict=True):
        torch.testing.assert_close(got, expected)
    assert torch.equal(a.firing_counts, b.firing_counts)
    loss(a, range(5)).backward()
    loss(b, range(5)).backward()
    for name in NAMES:
        torch.testing.assert_close(mine[name].grad, theirs[name].grad, msg=name)


@pytest.mark.parametrize("used", [range(1), range(1, 2), range(2, 3), range(3, 4), range(0)])
def test_an_unused_result_has_no_part_in_the_gradient(block, used):
    mine, theirs = inputs(), inputs()
    value = loss(ours(mine), used) + sum(t.sum() for t in mine.values())
    value.backward()
    (loss(dense(theirs), used) + sum(t.sum() for t in theirs.values())).backward()
    for name in NAMES:
        torch.testing.assert_close(mine[name].grad, theirs[name].grad, msg=name)


@pytest.mark.parametrize("name", NAMES)
def test_any_input_alone(name):
    mine, theirs = inputs(), inputs()
    for t in (mine, theirs):
        for other in NAMES:
            t[other].requires_grad_(other == name)
    loss(ours(mine), range(5)).backward()
    loss(dense(theirs), range(5)).backward()
    for other in NAMES:
        assert (mine[other].grad is None) == (other != name)
    torch.testing.assert_close(mine[name].grad, theirs[name].grad)


def test_without_biases_and_latents():
    t = inputs()
    given = t["x"], t["W_enc"], None, None, t["W_dec"], None

    def relu(h: Tensor) -> Pairs:
        return Pairs(torch.relu(h), ())

    found = blocked(relu, *given)
    assert found.frozen is None and found.totals == ()
    torch.testing.assert_close(found.x_hat, torch.relu(t["x"] @ t["W_enc"].T) @ t["W_dec"])
    found.x_hat.square().sum().backward()
    assert t["W_enc"].grad is not None and t["b_enc"].grad is None


def test_a_second_backward_raises():
    t = inputs()
    gradient = torch.autograd.grad(loss(ours(t), range(5)).square(), t["x"], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_widened(backend, dtype, monkeypatch):
    """bfloat16 weights are what they are rounded to; only their gradients are rounded again."""
    monkeypatch.setattr(module, "BLOCK", 3 * N)
    low = inputs(dtype=dtype)
    exact = {name: t.detach().double().requires_grad_() for name, t in low.items()}
    loss(ours(low, backend=backend), range(5)).backward()
    loss(dense(exact), range(5)).backward()
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-7}
    tolerance.setdefault("atol", 2**-6)
    for name in NAMES:
        assert low[name].grad.dtype == dtype
        torch.testing.assert_close(low[name].grad.double(), exact[name].grad, **tolerance)


def test_precision_bf16_rounds_what_is_encoded():
    t = inputs(dtype=torch.float32)
    rounded = {name: t[name].detach().bfloat16().float() for name in ("W_enc",)}
    rounded["x"] = (t["x"] - t["pre_bias"]).detach().bfloat16().float()
    rounded["pre_bias"] = torch.zeros(D)
    a, b = ours(t, precision="bf16"), dense({**t, **rounded})
    torch.testing.assert_close(a.x_hat, b.x_hat)
    assert not torch.equal(a.x_hat, ours(t).x_hat)


def test_autocast_does_not_round():
    t = inputs(dtype=torch.float32)
    before = ours(t).x_hat
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(t).x_hat, before)


# ---- block gradients ----


class Receiver:
    receiving = True

    def __init__(self) -> None:
        self.got: list[ops.BlockGradient] = []

    def receive_blocks(self, gradient: ops.BlockGradient) -> None:
        self.got.append(gradient)


@pytest.mark.parametrize("only", [None, "W_enc", "W_dec"])
def test_a_receiver_gets_the_rows_of_both_weights(block, only):
    mine, theirs, receiver = inputs(), inputs(), Receiver()
    wanted = ("W_enc", "W_dec") if only is None else (only,)
    for name in ("W_enc", "W_dec"):
        ops.collect_row_gradients(mine[name], receiver)
        mine[name].requires_grad_(name in wanted)
    loss(ours(mine), range(5)).backward()
    loss(dense(theirs), range(5)).backward()
    (gradient,) = receiver.got
    assert len(gradient.parameters) == len(wanted)
    with torch.no_grad():  # an optimiser may have updated them
        for name in ("b_enc", "theta", "slope"):
            mine[name].fill_(torch.nan)
    for i, name in enumerate(wanted):
        assert gradient.parameters[i] is mine[name]
        assert mine[name].grad is None
        for start, stop in ((0, F), (3, 7), (F - 1, F)):
            rows = gradient.rows(start, stop)[i]
            torch.testing.assert_close(rows, theirs[name].grad[start:stop])
    for name in NAMES:
        if name not in ("W_enc", "W_dec", "b_enc", "theta", "slope"):
            torch.testing.assert_close(mine[name].grad, theirs[name].grad)


def test_two_receivers_leave_the_gradients_dense():
    t, receivers = inputs(), (Receiver(), Receiver())
    for name, receiver in zip(("W_enc", "W_dec"), receivers, strict=True):
        ops.collect_row_gradients(t[name], receiver)
    loss(ours(t), range(5)).backward()
    assert t["W_enc"].grad is not None and t["W_dec"].grad is not None
    assert not receivers[0].got and not receivers[1].got


# ---- sums and norms ----


@backends
@pytest.mark.parametrize("shape", [(0,), (1,), (63,), (64,), (65, 3), (129, 1000)])
def test_total(backend, shape):
    v = randn(*shape).requires_grad_()
    sums = []
    for n in (1, 2, 5):
        with threads(n):
            sums.append(total(v, backend=backend))
    torch.testing.assert_close(sums[0].double(), v.double().sum(), rtol=1e-5, atol=1e-4)
    if backend == "cpu":
        assert all(torch.equal(s, sums[0]) for s in sums)
    (sums[0] * 3).backward()
    assert torch.equal(v.grad, torch.full(shape, 3.0))


def test_row_norms():
    W = randn(9, 4).double()
    W[3] = 0
    mine, theirs = (W.clone().requires_grad_() for _ in range(2))
    g = randn(9, seed=1).double()
    torch.testing.assert_close(row_norms(mine), theirs.norm(dim=1))
    (row_norms(mine) * g).sum().backward()
    (theirs.norm(dim=1) * g).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad)
    assert not mine.grad[3].any()


@backends
def test_row_norms_reach_an_optimiser_as_rows(backend):
    mine, theirs = (torch.nn.Parameter(randn(9, 4)) for _ in range(2))
    a, b = Adam([mine], lr=0.1, backend=backend), torch.optim.Adam([theirs], lr=0.1)
    for step in range(3):
        g = randn(9, seed=step)
        for p, optimizer in ((mine, a), (theirs, b)):
            optimizer.zero_grad()
            norms = row_norms(p, backend=backend) if p is mine else p.norm(dim=1)
            (norms * g).sum().backward()
            assert (p.grad is None) == (p is mine)
            optimizer.step()
    torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-6)


# ---- memory ----

STEP = """
import ctypes, json, sys
from pathlib import Path

import torch

from fastsae import blocked as module
from fastsae.blocked import Pairs, blocked
from fastsae.optim import Adam

module.BLOCK = 2**17
n, f, d, receives = json.loads(sys.argv[1])


def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def pairs(h, theta):
    z = torch.relu(h - theta)
    return Pairs(z, (z,), torch.relu(h))


torch.set_num_threads(1)
torch.manual_seed(0)
x = torch.randn(n, d)
W_enc, W_dec = (torch.nn.Parameter(torch.randn(f, d) / 8) for _ in range(2))
b_enc, theta = (torch.nn.Parameter(torch.zeros(f)) for _ in range(2))
b_dec = torch.nn.Parameter(torch.zeros(d))
parameters = [W_enc, W_dec, b_enc, theta, b_dec]
cls = Adam if receives else torch.optim.Adam
optimizer = cls(parameters, lr=1e-3)


def step():
    optimizer.zero_grad()
    found = blocked(pairs, x, W_enc, b_enc, b_dec, W_dec, b_dec, (theta,))
    loss = (found.x_hat - x).square().mean() + (found.frozen - x).square().mean()
    (loss + 1e-3 * found.totals[0] / n).backward()
    optimizer.step()
    return float(found.firing_counts.sum()) / (n * f)


step()
optimizer.zero_grad()
ctypes.CDLL(None).malloc_trim(0)
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # starts VmHWM anew
density = step()
print(json.dumps({"peak": memory("VmHWM") - before, "density": density}))
"""


def step_memory(n: int, f: int, d: int, receives: bool) -> int:
    measured = json.loads(run_child(STEP, json.dumps([n, f, d, receives])).splitlines()[-1])
    assert 0.2 < measured["density"] < 0.8
    return measured["peak"]


def test_memory():
    """A dozen blocks of 0.5 MiB; an N×F matrix, and a gradient of one weight, would have 32 MiB.

    torch's own optimiser needs the gradients, which shows that the measurement sees them.
    """
    n, f, d = 128, 2**16, 128
    allowed = 12 * 4 * 2**17 + 32 * f + 16 * n * d + 12 * 2**20
    assert allowed < 4 * f * d == 4 * n * f
    assert 0 < step_memory(n, f, d, True) < allowed
    assert step_memory(n, f, d, False) > 2 * 4 * f * d
