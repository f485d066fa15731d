"""kernels/moments.py: stored moments, to the bit what a CPU stores, interpreted and on a GPU."""

from typing import Any

import pytest
import torch
from aot import run_all
from test_moments import Row, gradients
from torch import Tensor

from fastsae import cpu
from fastsae.kernels import adam
from fastsae.moments import STATES


def stepped(p, dense, m, v, last, m_scale, v_scale, step: int, project: bool, **hyper: Any):
    rest = (1e-2, 0.9 if m is not None else 0.0, 0.99, 1e-8, 0.0, 1.0, step, False)
    options = {"scales": (m_scale, v_scale), "stochastic_rounding": True, **hyper}
    adam.adam_(p, dense, [], project, m, v, last, *rest, **options)
    return [t for t in (p, m, v, m_scale, v_scale, last) if t is not None]


def step(run, row: Row, dense: Tensor, number: int, project: bool = False, **hyper: Any) -> None:
    args = (row.p, dense, row.m, row.v, row.last, *row.scales, number, project)
    found = run(stepped, *args, **hyper)
    for t, new in zip(row.tensors, found, strict=True):
        t.copy_(new)


@run_all
@pytest.mark.parametrize(
    ("d", "state", "m", "dtype"),
    [
        (1, "int8", True, "float32"),
        (15, "bfloat16", True, "bfloat16"),
        (15, "int8", False, "bfloat16"),
        (300, "float32", True, "bfloat16"),
        (300, "bfloat16", False, "float32"),
        (300, "int8", True, "float32"),
        (1313, "bfloat16", True, "float32"),
        (1313, "int8", True, "bfloat16"),
    ],
)
def test_bits_are_a_cpus(run, d: int, state: str, m: bool, dtype: str) -> None:
    ours, theirs = (Row(3, d, state, m=m, dtype=getattr(torch, dtype)) for _ in range(2))
    for number, g in enumerate(gradients(3, 3, d), 1):
        step(run, ours, g, number, first_row=3)
        theirs.step(g, number, cpu.adam_, first_row=3)
        for a, b in zip(ours.tensors, theirs.tensors, strict=True):
            assert torch.equal(a, b)


@run_all
@pytest.mark.parametrize("state", STATES)
def test_rows_of_norm_1(run, state: str) -> None:
    row, wide = Row(5, 300, state), Row(5, 300, "float32")
    for r in (row, wide):
        r.p /= r.p.norm(dim=1, keepdim=True)
    for number in range(1, 6):
        g = torch.randn(5, 300, generator=torch.Generator().manual_seed(number))
        step(run, row, g, number, project=True)
        step(run, wide, g, number, project=True)
    torch.testing.assert_close(row.p, wide.p, rtol=0, atol=5e-3)
    assert (row.p != wide.p).any() == (state != "float32")
    torch.testing.assert_close(row.p.norm(dim=1), torch.ones(5))


@run_all
def test_hostile_gradients(run) -> None:
    ours, theirs = Row(4, 300, "int8"), Row(4, 300, "int8")
    g = torch.ones(4, 300)
    g[0] = 0
    g[1, :3] = torch.tensor([1e30, -1e30, 1e-30])
    g[2, 1] = torch.nan
    for number in (1, 2, 3):
        step(run, ours, g, number)
        theirs.step(g, number)
    for a, b in zip(ours.tensors, theirs.tensors, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@run_all
def test_a_scale_that_is_not_finite_writes_nothing(run) -> None:
    row = Row(4, 300, "int8")
    step(run, row, torch.ones(4, 300), 1)
    before = [t.clone() for t in row.tensors]
    args = (row.p, torch.ones(4, 300), row.m, row.v, row.last, *row.scales, 2)
    found = run(skipped, *args)
    for a, b in zip(found, before, strict=True):
        assert torch.equal(a, b)


def skipped(p, dense, m, v, last, m_scale, v_scale, number: int):
    rest = (1e-2, 0.9, 0.99, 1e-8, 0.0, float("nan"), number, False)
    adam.adam_(p, dense, [], False, m, v, last, *rest, scales=(m_scale, v_scale))
    return [p, m, v, m_scale, v_scale, last]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": (None, None)}, "m_scale: expected a tensor with v of torch.uint8, got None"),
        ({"scales": (torch.zeros(2, 1),) * 2}, r"m_scale: expected shape \(2, 2\)"),
        ({"m": torch.zeros(2, 300)}, "m: expected torch.int8, got torch.float32"),
        ({"v": torch.zeros(2, 300)}, "m: expected .*torch.bfloat16, got torch.int8"),
        ({"m": None}, "m_scale: expected None with v of torch.uint8, got a tensor"),
    ],
)
def test_says_what_is_wrong(change: dict[str, Any], message: str) -> None:
    row = Row(2, 300, "int8")
    for name, value in change.items():
        setattr(row, name, value)
    with pytest.raises((TypeError, ValueError), match=message):
        row.step(torch.ones(2, 300), 1, adam.adam_)
