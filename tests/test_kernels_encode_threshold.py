"""The Triton encode_threshold: every bit of the contract, on hostile data; and as compiled."""

import pytest
import torch
from aot import interpreted, run_all
from common import INF, NAN, randint, randn
from encoders import CASES, Case, assert_all_bits
from kernels_common import check_compiled, few, for_reference, shipped
from torch import Tensor

from fastsae import reference
from fastsae.kernels import encode_threshold
from fastsae.reference import TooManyPairs

MODULES = {"encode_threshold": encode_threshold}


def check(run, case: Case, thresholds: Tensor, precision: str = "screened") -> None:
    got = run(encode_threshold.encode_threshold, *case[:3], thresholds, None, precision)
    expected = reference.encode_threshold(*for_reference(case, precision), thresholds)
    assert_all_bits(got, expected)


def at_values(case: Case) -> Tensor:
    """Thresholds that a value of each latent equals, or is one unit above or below."""
    h, *_ = for_reference(case)
    theta = h[torch.arange(h.shape[1]) % len(h), torch.arange(h.shape[1])]
    nudge = torch.tensor([0.0, INF, -INF]).repeat(len(theta))[: len(theta)]
    return theta.nextafter(theta + nudge.nan_to_num(0, INF, -INF)).where(nudge != 0, theta)


HOSTILE = [
    *("random", "outliers", "huge-W", "b-hides-products", "tokens-of-all-sizes", "near-ties"),
    *("latents-of-all-sizes", "integers", "denormal-b", "cancelling", "equal-latents"),
    *("bf16-overflows", "transposed-x", "strided"),
]


@run_all
@pytest.mark.parametrize("name", HOSTILE)
def test_bits(run, name):
    case = few(CASES[name]())
    check(run, case, at_values(case))


@run_all
@pytest.mark.parametrize("name", ["near-ties", "tokens-of-all-sizes", "bf16-overflows-x"])
def test_bf16_weights(run, name):
    case = few(CASES[name]())
    case = case._replace(W_enc=case.W_enc.bfloat16())
    check(run, case, at_values(case))


@run_all
@pytest.mark.parametrize(
    ("x", "W"),
    [(torch.float16, torch.float16), (torch.bfloat16, torch.float32)],
    ids=["fp16-fp16", "bf16-fp32"],
)
def test_other_dtypes(run, x, W):
    case = few(CASES["near-ties"]())
    case = case._replace(x=case.x.to(x), W_enc=case.W_enc.to(W))
    check(run, case, at_values(case))


@run_all
def test_several_tiles(run):
    case = Case(randn(66, 24), randn(300, 24, seed=1), randn(300, seed=2), 0)
    check(run, case, randn(300, seed=3) + 9)


@run_all
def test_thresholds_of_all_kinds(run):
    """Infinite ones shut a latent out or let all in; values below zero pass where they may."""
    case = Case(randn(3, 24), randn(70, 24, seed=1), randn(70, seed=2), 0)
    thresholds = torch.tensor([INF, -INF, 0.0, -2.0, 3e38, -3e38, 1e-45]).repeat(10)
    check(run, case, thresholds)


@run_all
def test_ties_in_a_row_are_in_the_order_of_latents(run):
    x, W = randint(2, 3, 8, seed=1), randint(2, 10, 8, seed=2).repeat(4, 1)
    check(run, Case(x, W, None, 0), torch.full((40,), 0.5))


@run_all
@pytest.mark.parametrize(("n", "f"), [(0, 20), (1, 20), (3, 1), (3, 0)])
def test_sizes(run, n, f):
    check(run, Case(randn(n, 8), randn(f, 8, seed=1), None, 0), torch.full((f,), -1.0))


@run_all
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precisions(run, precision):
    case = Case(randn(3, 40), randn(110, 40, seed=1), None, 0)
    check(run, case, torch.full((110,), 5.0), precision)


def limited(slack: int, *args) -> tuple[Tensor, Tensor, Tensor]:
    before = encode_threshold.SLACK
    try:
        encode_threshold.SLACK = slack
        return encode_threshold.encode_threshold(*args)
    finally:
        encode_threshold.SLACK = before


@pytest.mark.parametrize("slack", [0, 1 << 16])
def test_limit(slack):
    """Also where the first try lists a part of the candidates only, few of which pass."""
    x, W = randn(3, 24), randn(110, 24, seed=1)
    x[:, 0], W[:, 0] = 1e5, 0  # bounds far wider than what values differ by
    thresholds = torch.full((110,), 8.0)
    h = for_reference(Case(x, W, None, 0))
    expected = reference.encode_threshold(*h, thresholds)
    nnz = len(expected[0])
    assert 0 < 2 * nnz < h[0].numel() / 2
    assert_all_bits(interpreted(limited, slack, x, W, None, thresholds, nnz), expected)
    with pytest.raises(TooManyPairs, match=f"more than {nnz - 1} pairs pass their thresholds"):
        interpreted(limited, slack, x, W, None, thresholds, nnz - 1)
    with pytest.raises(TooManyPairs, match="more than 0 pairs"):
        interpreted(limited, slack, x, W, None, thresholds, 0)


@run_all
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["x", "W_enc", "b_enc"])
def test_not_finite(run, bad, where):
    case = Case(randn(3, 40), randn(20, 40, seed=1), randn(20, seed=2), 0)._asdict()
    case[where][2] = bad
    args = list(case.values())[:3]
    vals, idx, row_ptr = run(encode_threshold.encode_threshold, *args, torch.zeros(20))
    assert vals[0].isnan() and idx[0] == 0
    assert len(vals) == len(idx) == row_ptr[-1]


@run_all
def test_not_finite_without_tokens(run):
    W = torch.full((20, 8), NAN)
    vals, idx, row_ptr = run(
        encode_threshold.encode_threshold, randn(0, 8), W, None, torch.zeros(20)
    )
    assert len(vals) == len(idx) == 0 and row_ptr.tolist() == [0]


@run_all
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_overflowing_value(run, sign):
    x, W = randn(2, 8), randn(100, 8, seed=1)
    x[0, 0], W[5, 0] = 1e20, sign * 1e20
    assert run(encode_threshold.encode_threshold, x, W, None, torch.ones(100))[0][0].isnan()


def test_refusals():
    x, W = randn(4, 8), randn(30, 8)
    with pytest.raises(ValueError, match=r"thresholds: expected shape \(30\), got \(29,\)"):
        encode_threshold.encode_threshold(x, W, None, torch.ones(29))
    with pytest.raises(TypeError, match=r"thresholds: expected torch.float32, got torch.bfloat16"):
        encode_threshold.encode_threshold(x, W, None, torch.ones(30).bfloat16())
    with pytest.raises(ValueError, match="thresholds: expected numbers, got a NaN"):
        interpreted(encode_threshold.encode_threshold, x, W, None, torch.full((30,), NAN))


@pytest.mark.parametrize(("module", "variant", "target"), shipped(MODULES))
def test_compiled(module, variant, target):
    check_compiled(module, variant, target)
