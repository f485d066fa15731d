"""The Triton encode_batch: every bit of the contract, on hostile data; and as compiled."""

import pytest
import torch
from aot import interpreted, run_all
from common import NAN, randint, randn
from encoders import CASES, Case, assert_all_bits
from kernels_common import check_compiled, few, for_reference, shipped
from torch import Tensor

from fastsae import reference
from fastsae.kernels import candidates, encode_batch, keys, pairs, radix, stream

MODULES = {
    "keys": keys,
    "candidates": candidates,
    "encode_batch": encode_batch,
    "pairs": pairs,
    "radix": radix,
    "stream": stream,
}


def check(run, case: Case, budget: int, precision: str = "screened", **options) -> None:
    got = run(encode_batch.encode_batch, *case[:3], budget, precision, **options)
    h = for_reference(case, precision)
    assert_all_bits(got, reference.encode_batch(*h, budget, **options))


HOSTILE = [
    *("outliers", "huge-W", "b-hides-products", "tokens-of-all-sizes", "latents-of-all-sizes"),
    *("near-ties", "all-negative", "zero-x", "denormal-b", "cancelling", "bf16-overflows"),
    *("equal-latents", "transposed-x", "strided"),
]


@run_all
@pytest.mark.parametrize("name", HOSTILE)
def test_bits(run, name):
    check(run, few(CASES[name]()), 40)


@run_all
@pytest.mark.parametrize("name", ["near-ties", "tokens-of-all-sizes", "bf16-overflows-x"])
def test_bf16_weights(run, name):
    case = few(CASES[name]())
    check(run, case._replace(W_enc=case.W_enc.bfloat16()), 40)


@run_all
@pytest.mark.parametrize(
    ("x", "W"),
    [(torch.float16, torch.float16), (torch.bfloat16, torch.float32)],
    ids=["fp16-fp16", "bf16-fp32"],
)
def test_other_dtypes(run, x, W):
    case = few(CASES["near-ties"]())
    case = case._replace(x=case.x.to(x), W_enc=case.W_enc.to(W))
    check(run, case, 40)


@run_all
@pytest.mark.parametrize("budget", [0, 12, 59, 10**12])
def test_budgets(run, budget):
    check(run, Case(randn(3, 8), randn(20, 8, seed=1), randn(20, seed=2), 0), budget)


@run_all
@pytest.mark.parametrize(("n", "f"), [(0, 20), (1, 20), (3, 1), (1, 1), (3, 0)])
def test_sizes(run, n, f):
    check(run, Case(randn(n, 8), randn(f, 8, seed=1), randn(f, seed=2).abs(), 0), 5)


@run_all
def test_several_tiles_and_one_greedy_token(run):
    """Two tiles of tokens and of latents; a token that takes a third of the budget."""
    case = Case(randn(66, 24), randn(130, 24, seed=1), randn(130, seed=2), 0)
    case.x[65] *= 30
    check(run, case, 200)


@run_all
def test_ties_across_tokens_and_latents_are_cut_in_their_order(run):
    x, W = randint(2, 2, 8, seed=1).repeat(2, 1), randint(2, 10, 8, seed=2).repeat(3, 1)
    for budget in (5, 50):
        check(run, Case(x, W, None, 0), budget)


@run_all
def test_hot_latents_in_one_bucket_are_repaired(run):
    """300 latents are 3 tiles of 8 buckets: 0, 24, 48, … share one of 16, which keeps three."""
    case = Case(randn(3, 32).abs(), randn(300, 32, seed=1), None, 0)
    case.W_enc[0 : 24 * 8 : 24] += 3
    assert keys.keys_config(3, 300, 8, "tf32", 32, True, *[False] * 4)["LOG2_G"] == 4
    assert (reference.encode_batch(*for_reference(case), 24)[1] % 24 == 0).all()
    check(run, case, 24)


@run_all
@pytest.mark.parametrize("absolute", [False, True], ids=["", "absolute"])
@pytest.mark.parametrize("scaled", [False, True], ids=["", "scale"])
def test_scores(run, absolute, scaled):
    """A latent of scale 0 is shut out; a tiny score is still one."""
    case = Case(randn(3, 40), randn(110, 40, seed=1), randn(110, seed=2), 0)
    scale = randn(110, seed=3).abs()
    scale[:50] = 0
    scale[50], scale[51], scale[100:] = 1e-42, 1e38, 1e-45
    options = {"scale": scale} if scaled else {}
    check(run, case, 200, absolute=absolute, **options)


@run_all
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precisions(run, precision):
    check(run, Case(randn(3, 40), randn(110, 40, seed=1), None, 0), 30, precision)


def streamed(slack: int, *args, **options) -> tuple[tuple[Tensor, ...], int]:
    """encode_batch with another room; and how many lists were filled by the stream."""
    before = encode_batch.SLACK, stream.pointers
    seen = []
    try:
        encode_batch.SLACK = slack
        stream.pointers = lambda counts: seen.append(int(counts.sum())) or before[1](counts)
        return encode_batch.encode_batch(*args, **options), seen[0]
    finally:
        encode_batch.SLACK, stream.pointers = before


@pytest.mark.parametrize("name", ["random", "equal-latents", "scale-absolute"])
def test_more_candidates_than_room_are_streamed(name):
    """The stream leaves the budget itself of the list, whatever there was before."""
    budget = 40
    x, W, b = randn(3, 70), randn(100, 70, seed=1), randn(100, seed=2)
    options = {}
    if name == "equal-latents":
        x, W, b = randint(3, 3, 70), randint(2, 4, 70, seed=1).repeat(25, 1), None
        x[2] = x[0]
    if name == "scale-absolute":
        options = {"scale": randn(100, seed=3).abs(), "absolute": True}
    got, listed = interpreted(streamed, -3 * budget, x, W, b, budget, **options)
    assert listed == budget
    h = for_reference(Case(x, W, b, 0))
    assert_all_bits(got, reference.encode_batch(*h, budget, **options))


@run_all
@pytest.mark.parametrize("bad", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["x", "W_enc", "b_enc"])
def test_not_finite(run, bad, where):
    case = Case(randn(3, 40), randn(20, 40, seed=1), randn(20, seed=2), 0)._asdict()
    case[where][2] = bad
    vals, idx, row_ptr = run(encode_batch.encode_batch, *list(case.values())[:3], 7)
    assert vals[0].isnan() and idx[0] == 0
    assert len(vals) == len(idx) == row_ptr[-1] == 7


@run_all
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_overflowing_value(run, sign):
    x, W = randn(2, 8), randn(100, 8, seed=1)
    x[0, 0], W[5, 0] = 1e20, sign * 1e20
    assert run(encode_batch.encode_batch, x, W, None, 4)[0][0].isnan()


def test_refusals():
    x, W = randn(4, 8), randn(30, 8)
    with pytest.raises(ValueError, match=r"x: expected shape \(N, 8\), got \(4, 9\)"):
        encode_batch.encode_batch(randn(4, 9), W, None, 2)
    with pytest.raises(ValueError, match=r"scale: expected shape \(30\), got \(29,\)"):
        encode_batch.encode_batch(x, W, None, 2, scale=randn(29))
    with pytest.raises(TypeError, match=r"scale: expected torch.float32, got torch.float64"):
        encode_batch.encode_batch(x, W, None, 2, scale=randn(30).double())
    with pytest.raises(ValueError, match="budget: expected at least 0, got -1"):
        encode_batch.encode_batch(x, W, None, -1)
    with pytest.raises(ValueError, match="precision: expected screened, fp32 or bf16, got 'fp8'"):
        encode_batch.encode_batch(x, W, None, 2, "fp8")


@pytest.mark.gpu
def test_waits_for_nothing():
    x, W, scale = randn(100, 64).cuda(), randn(3000, 64, seed=1).cuda(), torch.ones(3000).cuda()
    encode_batch.encode_batch(x, W, None, 800, scale=scale)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        encode_batch.encode_batch(x, W, None, 800, scale=scale)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("module", "variant", "target"), shipped(MODULES))
def test_compiled(module, variant, target):
    check_compiled(module, variant, target)
