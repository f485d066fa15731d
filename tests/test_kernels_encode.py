"""The Triton encode: every bit that the C++ kernel promises, on hostile data; and as compiled."""

from typing import Any

import numpy as np
import pytest
import torch
from aot import run_all
from common import (
    INF,
    NAN,
    assert_bits,
    fixed_order_dot,
    fixed_order_encode,
    name_of,
    randint,
    randn,
)
from encoders import CASES, Case, case_and_bits, ulps
from kernels_common import check_compiled, few, shipped
from torch import Tensor

from fastsae import reference
from fastsae.kernels import best, encode, norms, rescan, score, screen, select

MODULES = {
    "norms": norms,
    "screen": screen,
    "select": select,
    "rescan": rescan,
    "score": score,
    "best": best,
}
# What deceives the C++ kernels' screens: thousands of latents each, which the interpreter streams.
FOR_THE_CPU = ("bf16-rounds", "screen-rounds", "coarse")

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


@run_all
def test_product_that_overflows_in_the_screen(run):
    """In sequence a sum passes 3.4e38; its value is 1e38, less than the best: it bounds nothing."""
    x, W = torch.zeros(2, 64), torch.zeros(128, 64)
    x[:, 0] = x[:, 1] = x[:, 32] = 1e19
    W[100, 0] = W[100, 1] = 2e19
    W[100, 32], W[50, 0] = -3e19, 1.7e19
    case = Case(x, W, None, 1)
    for absolute in (False, True):
        assert (check_scored(run, case, absolute=absolute) == 50).all()


@run_all
def test_smallest_values_of_a_bucket(run):
    """4 buckets of 32: the last latents have keys with nothing in the lowest bits."""
    b = torch.full((128,), -1.0)
    b[[3, 126, 127]] = torch.tensor([3e-45, 4e-45, 1e-45])
    case = Case(torch.zeros(2, 8), randn(128, 8), b, 2)
    for k in (1, 2):
        check_scored(run, case._replace(k=k))


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


# ---- scores ----


def scored_bits(
    case: Case,
    scale: Tensor | None = None,
    absolute: bool = False,
    guide: Tensor | None = None,
    W_dec: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `fixed_order_encode`, in the order of scores: each factor is rounded to float32."""
    ids = np.arange(len(case.W_enc)) if case.latents is None else case.latents.numpy()
    h = fixed_order_dot(case.x.float().numpy(), case.W_enc.float().numpy()[ids])
    with np.errstate(over="ignore"):
        h = h if case.b_enc is None else h + case.b_enc.float().numpy()[ids]
        scores = np.abs(h) if absolute else h
        scores = scores if scale is None else scores * scale.numpy()[ids]
        if guide is not None:
            along = fixed_order_dot(guide.numpy(), W_dec.float().numpy()[ids])
            scores = scores * (np.float32(1) + np.abs(along))
    vals, idx = (np.zeros((len(h), case.k), t) for t in (np.float32, np.int32))
    idx -= 1
    for n, row in enumerate(scores):
        kept = np.lexsort((ids, -row))[: case.k]
        kept = kept[row[kept] > 0]
        vals[n, : len(kept)], idx[n, : len(kept)] = h[n, kept], ids[kept]
    return torch.from_numpy(vals), torch.from_numpy(idx)


def check_scored(run, case: Case, precision: str = "screened", **how: Any) -> Tensor:
    """idx, whose bits and those of vals are as promised."""
    expected = scored_bits(case, **how)
    got = run(encode.encode, *case, precision, **how)
    assert_bits(got[0], expected[0])
    assert_bits(got[1], expected[1])
    return got[1]


def factors(n: int, f: int, d: int, of: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """A third of the scales are 0; rows of W_dec and guides of all sizes around 1."""
    how: dict[str, Any] = {"absolute": "absolute" in of}
    if "scale" in of:
        how["scale"] = randn(f, seed=11).clamp(min=-0.4).add(0.4)
    if "guide" in of:
        how["guide"] = randn(n, d, seed=12) * randn(n, 1, seed=13).exp()
        how["W_dec"] = (randn(f, d, seed=14) * randn(f, 1, seed=15).exp()).to(dtype)
    return how


OPTIONS = ("scale", "absolute", "guide", "scale-absolute", "scale-guide", "scale-absolute-guide")
HOSTILE = ["outliers", "latents-of-all-sizes", "near-ties", "cancelling", "bias-ties", "huge"]
SCORED = [("random", of, torch.float32) for of in OPTIONS]
SCORED += [("random", of, torch.bfloat16) for of in ("scale-absolute", "guide")]
SCORED += [(name, "scale-absolute-guide", torch.float32) for name in HOSTILE]


def two_tiles(name: str, dtype: torch.dtype = torch.float32) -> Case:
    """Two tokens of a case, and two tiles of latents."""
    case, _ = case_and_bits(name, dtype)
    return few(case, 2, 140)._replace(k=min(case.k, 17))


@run_all
@pytest.mark.parametrize(
    ("name", "of", "dtype"), SCORED, ids=[f"{n}-{of}-{name_of(d)}" for n, of, d in SCORED]
)
def test_scores(run, name, of, dtype):
    case = two_tiles(name, dtype)
    assert streams(case)
    check_scored(run, case, **factors(2, 140, 37, of, dtype))


@run_all
def test_scores_of_some_latents(run):
    case = Case(randn(2, 40), randn(210, 40, seed=1), randn(210, seed=2), 7)
    case = case._replace(latents=torch.arange(1, 210, 3, dtype=torch.int32))
    check_scored(run, case, **factors(2, 210, 37, "scale-guide"))


@run_all
def test_equal_scores_are_streamed(run):
    """300 equal latents are more than there is room for."""
    case = Case(randn(1, 24).repeat(2, 1), randn(1, 24, seed=1).repeat(300, 1), None, 2)
    case.x[1] *= -1
    how = {"scale": torch.ones(300), "guide": randn(2, 5), "W_dec": randn(1, 5).repeat(300, 1)}
    how["scale"][:7], how["scale"][9] = 0, 1 + 2.0**-23
    assert select.room_for(2) < 300
    assert check_scored(run, case, absolute=True, **how).tolist() == [[9, 7]] * 2


@run_all
def test_scores_of_several_tiles(run):
    case = Case(randn(70, 24), randn(140, 24, seed=1), randn(140, seed=2), 3)
    check_scored(run, case, **factors(70, 140, 16, "scale-guide"))


@run_all
def test_absolute_keeps_signs(run):
    case = Case(randn(2, 32), randn(80, 32, seed=1), None, 9)
    idx = check_scored(run, case, absolute=True)
    h = case.x @ case.W_enc.T
    assert (h.gather(1, idx.long()) < 0).any(1).all()


@run_all
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precisions_of_scores(run, precision):
    """The guide is not rounded; W_dec of another dtype than W_enc makes both screen in tf32."""
    case = Case(randn(2, 40), randn(80, 40, seed=1), None, 6)
    how = factors(2, 80, 24, "scale-guide")
    rounded = case
    if precision == "bf16":
        rounded = case._replace(x=case.x.bfloat16().float(), W_enc=case.W_enc.bfloat16())
    expected = scored_bits(rounded, **how)
    got = run(encode.encode, *case, precision, **how)
    assert_bits(got[0], expected[0])
    assert_bits(got[1], expected[1])


@run_all
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_guide_whose_rounding_decides(run, dtype):
    """In the screen the guide is 2⁻⁸ of it (tf32: 2⁻¹¹) too short: the winner seems to lose."""
    d, lost = 32, 0.98 * (2.0**-8 if dtype == torch.bfloat16 else 2.0**-11)
    W_dec = torch.zeros(60, d)
    W_dec[50] = 1 / d
    b = torch.zeros(60)
    b[3], b[50] = 2 + lost / 2, 1
    case = Case(torch.zeros(2, 8), torch.zeros(60, 8, dtype=dtype), b, 1)
    guide = torch.full((2, d), 1 + lost)
    idx = check_scored(run, case, guide=guide, W_dec=W_dec.to(dtype))
    assert (idx == 50).all()


@run_all
def test_scores_of_one_unit_in_the_last_place(run):
    """Equal values, of which scales and guides one unit apart decide; and true ties."""
    x, W = torch.ones(2, 1), torch.ones(100, 1)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0)) // 3
    case = Case(x, W, None, 12)
    check_scored(run, case, scale=ulps(torch.ones(100), order))
    check_scored(run, case, guide=torch.ones(2, 1), W_dec=ulps(torch.ones(100), 2 * order)[:, None])


@run_all
def test_scales_of_all_sizes(run):
    """Scores from denormals, where many are equal, to infinities, which all are."""
    case = Case(randn(2, 24) * 1e3, randn(128, 24, seed=1), None, 15)
    sizes = torch.logspace(-44, 38, 128)[randn(128, seed=3).argsort()]
    check_scored(run, case, absolute=True, scale=sizes)
    check_scored(run, case, scale=sizes.clamp(min=1e37))
    check_scored(run, case._replace(x=case.x / 5e3), scale=torch.full((128,), 1e-45))


@run_all
def test_scale_of_zero_shuts_out(run):
    """As `latents` limits the choice; with no other latent nothing is selected."""
    case = Case(randn(2, 24), randn(140, 24, seed=1), randn(140, seed=2), 10)
    open_ = torch.rand(140, generator=torch.Generator().manual_seed(3)) < 0.7
    latents = open_.nonzero()[:, 0].to(torch.int32)
    got = run(encode.encode, *case, scale=open_.float())
    expected = fixed_order_encode(*case._replace(latents=latents))
    assert_bits(got[0], expected[0])
    assert_bits(got[1], expected[1])
    some = torch.zeros(140)
    some[:9] = 1
    assert (check_scored(run, case, scale=some) >= 0).sum(1).max() < 9
    assert (check_scored(run, case, scale=torch.zeros(140)) == -1).all()


@run_all
def test_hot_scores_in_one_bucket_are_repaired(run):
    """300 latents are 3 tiles with 8 buckets each: 0, 24, … share one, which keeps three."""
    case = Case(randn(2, 32).abs(), randn(300, 32, seed=1), None, 8)
    scale, W_dec = torch.ones(300), 0.01 * randn(300, 16, seed=2)
    scale[0 : 12 * 8 : 12] = 9
    W_dec[0 : 12 * 8 : 12] = 9
    case.W_enc[0 : 12 * 8 : 12].abs_()
    for how in ({"scale": scale}, {"guide": randn(2, 16, seed=3).abs(), "W_dec": W_dec}):
        assert (check_scored(run, case, **how) % 12 == 0).all()


@run_all
def test_strides_of_the_guide(run):
    case = Case(randn(2, 40), randn(70, 40, seed=1), None, 6)
    how = factors(2, 70, 40, "guide")
    expected = scored_bits(case, **how)
    W = torch.full((140, 47), NAN)
    W[::2, 7:] = how["W_dec"]
    for guide in (how["guide"].T.contiguous().T, torch.cat([how["guide"]] * 2, 1)[:, :40]):
        got = run(encode.encode, *case, guide=guide, W_dec=W[::2, 7:])
        assert_bits(got[0], expected[0])
        assert_bits(got[1], expected[1])


@run_all
@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize(("f", "k"), [(60, 6), (20, 6)], ids=["kernels", "torch"])
def test_scores_not_finite(run, f, k, bad):
    """A guide spoils its token, a row of W_dec or W_enc all tokens, also where scale is 0."""
    case = Case(randn(4, 24), randn(f, 24, seed=1), randn(f, seed=2), k)
    how = factors(4, f, 16, "scale-guide")
    how["scale"][17] = 0
    fine = run(encode.encode, *case, **how)
    assert fine[0].isfinite().all()
    guide = how["guide"].clone()
    guide[2, 5] = bad
    vals, idx = run(encode.encode, *case, **how | {"guide": guide})
    assert vals[2, 0].isnan() and idx[2, 0] == 0
    for n in (0, 1, 3):
        assert_bits(vals[n], fine[0][n])
        assert_bits(idx[n], fine[1][n])
    W_dec, W_enc = how["W_dec"].clone(), case.W_enc.clone()
    W_dec[17, 3] = W_enc[17, 3] = bad
    for spoilt, other in ((case, how | {"W_dec": W_dec}), (case._replace(W_enc=W_enc), how)):
        vals, idx = run(encode.encode, *spoilt, **other)
        assert vals[:, 0].isnan().all() and (idx[:, 0] == 0).all()


@run_all
@pytest.mark.parametrize(("f", "k"), [(30, 7), (1100, 1030), (5, 9)])
@pytest.mark.parametrize("subset", [False, True])
def test_scores_by_torch(run, f, k, subset):
    """Small integers and powers of two are exact in any order: the bits are the kernels'."""
    latents = torch.arange(0, f, 2, dtype=torch.int32) if subset else None
    case = Case(randint(3, 4, 6, low=-2), randint(3, f, 6, low=-2, seed=1), None, k, latents)
    assert not streams(case)
    scale = 2.0 ** randint(3, f, low=-3, seed=2)
    scale[::5] = 0
    guide, W_dec = randint(3, 4, 5, low=-2, seed=3), randint(3, f, 5, low=-2, seed=4)
    for how in ({"scale": scale, "absolute": True}, {"guide": guide, "W_dec": W_dec}):
        check_scored(run, case, **how)
    check_scored(run, case, scale=scale, absolute=True, guide=guide, W_dec=W_dec)


@run_all
@pytest.mark.parametrize("of", OPTIONS[3:])
def test_scores_are_the_references(run, of):
    """In numbers whose order no rounding changes; the oracle of `scored_bits` too."""
    case = Case(randint(4, 3, 9, low=-3), randint(4, 60, 9, low=-3, seed=1), None, 6)
    how = factors(3, 60, 7, of)
    how |= {name: t.mul(4).round() for name, t in how.items() if isinstance(t, Tensor)}
    expected = reference.encode(*case, **how)
    for got in (scored_bits(case, **how), run(encode.encode, *case, **how)):
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])


# ---- fp16 ----


@run_all
@pytest.mark.parametrize("name", ["random", "outliers", "near-ties"])
def test_fp16(run, name):
    """Weights near ties, denormal in fp16, or as large as it has; tokens in fp32 and fp16."""
    case = two_tiles(name)
    W = case.W_enc.clamp(-6e4, 6e4).half()
    W[1::3] *= 1e-5
    case = case._replace(W_enc=W)
    check_scored(run, case)
    case = case._replace(x=case.x.half())
    check_scored(run, case, **factors(2, len(W), 37, "scale-guide", torch.float16))


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
    with pytest.raises(ValueError, match=r"scale: expected shape \(30\), got \(29,\)"):
        encode.encode(x, W, None, 2, scale=torch.ones(29))
    with pytest.raises(TypeError, match=r"scale: expected torch.float32, got"):
        encode.encode(x, W, None, 2, scale=torch.ones(30).double())
    with pytest.raises(ValueError, match="W_dec: expected a tensor with guide, got None"):
        encode.encode(x, W, None, 2, guide=randn(4, 5))
    with pytest.raises(ValueError, match=r"guide: expected shape \(4, 6\), got \(4, 5\)"):
        encode.encode(x, W, None, 2, guide=randn(4, 5), W_dec=randn(30, 6))
    with pytest.raises(ValueError, match=r"W_dec: expected shape \(30, D_out\), got \(29, 5\)"):
        encode.encode(x, W, None, 2, guide=randn(4, 5), W_dec=randn(29, 5))


@pytest.mark.parametrize(("module", "variant", "target"), shipped(MODULES))
def test_compiled(module, variant, target):
    check_compiled(module, variant, target)
