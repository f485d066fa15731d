"""The Triton encode: every bit that the C++ kernel promises, on hostile data; and as compiled."""

import pytest
import torch
from aot import RUNNERS, TARGETS, compiled
from common import NAN, assert_bits, fixed_order_encode, name_of, randint, randn
from test_encode import CASES, Case, case_and_bits
from torch import Tensor

from fastsae.kernels import encode, norms, score, select

MODULES = {"encode": encode, "norms": norms, "select": select, "score": score}
# What deceives the C++ kernels' screens: thousands of latents each, which the interpreter streams.
FOR_THE_CPU = ("bf16-rounds", "screen-rounds", "coarse")

run_all = pytest.mark.parametrize("run", RUNNERS)
# bf16 has a screen of its own; the rest does not mind the dtype.
BF16 = ["random", "d1", "d127", "outliers", "huge", "tiny-x", "tokens-of-all-sizes", "near-ties"]
INPUTS = [(name, torch.float32) for name in CASES if not name.startswith(FOR_THE_CPU)]
INPUTS += [(name, torch.bfloat16) for name in BF16]


def streams(case: Case) -> bool:
    """Whether the kernels take it, or torch."""
    n_latents = len(case.W_enc) if case.latents is None else len(case.latents)
    return 0 < case.k <= min(1024, n_latents // 8) and case.x.numel() > 0


def take(run, case: Case, precision: str = "screened") -> tuple[Tensor, Tensor]:
    return run(encode.encode, *case, precision)


@run_all
@pytest.mark.parametrize(("name", "dtype"), INPUTS, ids=[f"{n}-{name_of(d)}" for n, d in INPUTS])
def test_bits(run, name, dtype):
    case, expected = case_and_bits(name, dtype)
    n = 3 if len(case.W_enc) < 600 else 1  # the interpreter takes a tenth of a second for each
    case = case._replace(x=case.x[:n])
    vals, idx = take(run, case)
    if streams(case):
        assert_bits(vals, expected[0][:n])
        assert_bits(idx, expected[1][:n])
        return
    # The sums are torch's, and so is the order of values that are closer than its rounding.
    torch.testing.assert_close(vals, expected[0][:n], rtol=1e-5, atol=1e-5)
    h = case.x.double() @ case.W_enc.double().T
    h = h if case.b_enc is None else h + case.b_enc
    there = idx >= 0
    assert torch.equal(there, vals > 0)
    if len(case.W_enc):
        chosen = h.gather(1, idx.long().clamp(min=0))
        torch.testing.assert_close(chosen[there], vals.double()[there], rtol=1e-5, atol=1e-5)
    for row in idx:
        assert len(row[row >= 0].unique()) == (row >= 0).sum()


@run_all
def test_several_tiles_of_tokens_and_latents(run):
    """Two tiles of tokens, and latents that leave the last tile of each width ragged."""
    case = Case(randn(130, 24), randn(300, 24, seed=1), randn(300, seed=2), 3)
    expected = fixed_order_encode(*case)
    got = take(run, case)
    assert_bits(got[0], expected[0])
    assert_bits(got[1], expected[1])


@run_all
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precisions(run, precision):
    case = Case(randn(5, 40), randn(200, 40, seed=1), None, 6)
    inputs = case
    if precision == "bf16":
        inputs = case._replace(x=case.x.bfloat16().float(), W_enc=case.W_enc.bfloat16())
    expected = fixed_order_encode(*inputs)
    got = take(run, case, precision)
    assert_bits(got[0], expected[0])
    assert_bits(got[1], expected[1])


@run_all
def test_hot_latents_in_one_bucket_are_repaired(run):
    """300 latents are 3 tiles with 4 buckets each: 0, 12, 24, … share one, which keeps three."""
    case = Case(randn(3, 32).abs(), randn(300, 32, seed=1), None, 8)
    case.W_enc[0 : 12 * 8 : 12] += 3
    expected = fixed_order_encode(*case)
    assert (expected[1] % 12 == 0).all()
    got = take(run, case)
    assert_bits(got[0], expected[0])
    assert_bits(got[1], expected[1])


@run_all
def test_some_latents(run):
    latents = torch.arange(1, 900, 3, dtype=torch.int32)
    case = Case(randn(4, 40), randn(900, 40, seed=1), randn(900, seed=2), 7, latents)
    expected = fixed_order_encode(*case)
    got = take(run, case)
    assert_bits(got[0], expected[0])
    assert_bits(got[1], expected[1])
    some = case._replace(latents=latents[:30])  # by torch
    assert_bits(take(run, some)[1], fixed_order_encode(*some)[1])


@run_all
def test_strides(run):
    case = Case(randn(4, 40), randn(200, 40, seed=1), None, 6)
    expected = fixed_order_encode(*case)
    x, W = torch.full((4, 51), NAN), torch.full((400, 47), NAN)
    x[:, 3:43], W[::2, 7:] = case.x, case.W_enc
    got = take(run, case._replace(x=x[:, 3:43], W_enc=W[::2, 7:]))
    assert_bits(got[0], expected[0])
    assert_bits(got[1], expected[1])


@run_all
@pytest.mark.parametrize("bad", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize(("f", "k"), [(200, 6), (20, 6)], ids=["kernels", "torch"])
def test_not_finite(run, f, k, bad):
    """A token that is not finite has NaN as first value; a latent that is not spoils all tokens."""
    case = Case(randn(4, 40), randn(f, 40, seed=1), randn(f, seed=2), k)
    fine = take(run, case)
    case.x[2, 5] = bad
    vals, idx = take(run, case)
    assert vals[2, 0].isnan() and idx[2, 0] == 0
    for n in (0, 1, 3):
        assert_bits(vals[n], fine[0][n])
        assert_bits(idx[n], fine[1][n])
    for name in ("W_enc", "b_enc"):
        spoilt = case._replace(x=randn(4, 40))._asdict()
        spoilt[name] = spoilt[name].clone()
        spoilt[name][17] = bad
        vals, idx = take(run, Case(**spoilt))
        assert vals[:, 0].isnan().all() and (idx[:, 0] == 0).all()


@run_all
def test_overflowing_value(run):
    case = Case(torch.full((2, 8), 3e19), torch.full((100, 8), 3e19), None, 4)
    vals, idx = take(run, case)
    assert vals[:, 0].isnan().all() and (idx[:, 0] == 0).all()


@run_all
def test_value_that_overflows_below(run):
    case = Case(randn(2, 8), randn(100, 8, seed=1), None, 4)
    case.x[0, 0], case.W_enc[5, 0] = 1e20, -1e20
    vals, idx = take(run, case)
    assert vals[0, 0].isnan() and idx[0, 0] == 0
    assert vals[1].isfinite().all()


def test_autocast_leaves_torchs_product_alone():
    x, W = randn(4, 40), randn(20, 40, seed=1)
    for b in (None, randn(20, seed=2)):
        expected = encode.encode(x, W, b, 6)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = encode.encode(x, W, b, 6)
        assert_bits(got[0], expected[0])
        assert_bits(got[1], expected[1])


@run_all
def test_ties_by_torch(run):
    case = Case(randint(3, 5, 6), randint(3, 20, 6), None, 10)
    got, expected = take(run, case), fixed_order_encode(*case)
    assert_bits(got[0], expected[0])
    assert_bits(got[1], expected[1])


def test_refusals():
    x, W = randn(4, 8), randn(30, 8)
    with pytest.raises(ValueError, match=r"x: expected shape \(N, 8\), got \(4, 9\)"):
        encode.encode(randn(4, 9), W, None, 2)
    with pytest.raises(TypeError, match=r"latents: expected torch.int32, got torch.int64"):
        encode.encode(x, W, None, 2, torch.arange(3))
    with pytest.raises(ValueError, match=r"b_enc: expected shape \(30\), got \(29,\)"):
        encode.encode(x, W, randn(29), 2)
    with pytest.raises(ValueError, match="W_enc: expected unit inner stride"):
        encode.encode(x, randn(8, 30).T, None, 2)


def shipped() -> list[tuple[str, str, str]]:
    """Wide tiles are not launched on an MI300."""
    every = [(m, v, t) for m, of in MODULES.items() for v in of.variants() for t in TARGETS]
    return [(m, v, t) for m, v, t in every if not (t == "MI300" and v.endswith("-wide"))]


@pytest.mark.parametrize(("module", "variant", "target"), shipped())
def test_compiled(module, variant, target):
    used = compiled(f"fastsae.kernels.{module}", variant, TARGETS[target])
    assert used["registers"] <= 255
    # Bytes of a thread, where tiles fill the registers of what they were not tuned for.
    tuned = target == "H100" or module in ("norms", "score")
    assert used["spills"] <= (0 if tuned else 160)
    assert used["atomics"] == 0
    assert used["shared"] <= {"A100": 163, "MI300": 64}.get(target, 227) << 10
    if target == "H100" and variant in ("bf16-32", "bf16-32-bias"):
        assert used["registers"] <= 128 and used["shared"] <= 113 << 10  # two tiles on an SM
