"""The Triton encode_columns: every bit of the contract, on hostile data; and as compiled."""

import pytest
import torch
from aot import interpreted, run_all
from common import NAN, randint, randn
from encoders import CASES, Case, assert_all_bits
from kernels_common import check_compiled, few, for_reference, shipped
from torch import Tensor

from fastsae import reference
from fastsae.kernels import encode_columns, keys, stream_columns

MODULES = {"encode_columns": encode_columns, "stream_columns": stream_columns}


def budgets_of(f: int, high: int, seed: int = 9) -> Tensor:
    return randint(high, f, seed=seed).int()


def check(run, case: Case, budgets: Tensor, spare: int = 3, precision: str = "screened") -> None:
    room = int(budgets.clamp(max=len(case.x)).sum()) + spare
    got = run(encode_columns.encode_columns, *case[:3], budgets, room, precision)
    assert_all_bits(got, reference.encode_columns(*for_reference(case, precision), budgets, room))


HOSTILE = [
    *("random", "outliers", "huge-W", "b-hides-products", "tokens-of-all-sizes", "near-ties"),
    *("integers", "all-negative", "zero-x", "denormal-b", "cancelling", "transposed-x"),
]


@run_all
@pytest.mark.parametrize("name", HOSTILE)
def test_bits(run, name):
    check(run, few(CASES[name](), 100, 7), budgets_of(7, 9))


@run_all
@pytest.mark.parametrize("name", ["near-ties", "tokens-of-all-sizes", "bf16-overflows-x"])
def test_bf16_weights(run, name):
    case = few(CASES[name](), 100, 7)
    check(run, case._replace(W_enc=case.W_enc.bfloat16()), budgets_of(len(case.W_enc), 9))


@run_all
@pytest.mark.parametrize(
    ("x", "W"),
    [(torch.float16, torch.float16), (torch.bfloat16, torch.float32)],
    ids=["fp16-fp16", "bf16-fp32"],
)
def test_other_dtypes(run, x, W):
    case = few(CASES["near-ties"](), 100, 7)
    case = case._replace(x=case.x.to(x), W_enc=case.W_enc.to(W))
    check(run, case, budgets_of(7, 9))


@run_all
def test_hot_latents_have_buckets_of_their_own(run):
    """Of 64 latents the two with the largest budgets are one launch, the others another."""
    case = Case(randn(70, 24), randn(64, 24, seed=1), randn(64, seed=2), 0)
    budgets = budgets_of(64, 3)
    budgets[40], budgets[9] = 30, 25
    check(run, case, budgets, spare=40)


@run_all
def test_budgets_from_none_to_all_tokens(run):
    case = Case(randn(12, 24), randn(8, 24, seed=1), randn(8, seed=2).abs() * 9, 0)
    check(run, case, torch.tensor([0, 12, 11, 1, 13, 2**31 - 1, 0, 12], dtype=torch.int32))
    check(run, case, torch.zeros(8, dtype=torch.int32), spare=0)


@run_all
@pytest.mark.parametrize(("n", "f"), [(0, 6), (1, 6), (5, 1), (5, 0)])
def test_sizes(run, n, f):
    case = Case(randn(n, 8), randn(f, 8, seed=1), randn(f, seed=2).abs(), 0)
    check(run, case, budgets_of(f, 3))


@run_all
def test_equal_tokens_are_cut_in_their_order(run):
    """Both tokens and latents come several times."""
    x, W = randint(2, 5, 8, seed=1).repeat(8, 1), randint(2, 3, 8, seed=2).repeat(2, 1)
    check(run, Case(x, W, None, 0), budgets_of(6, 12))


@run_all
def test_hot_tokens_in_one_bucket_are_repaired(run):
    """300 tokens are 3 tiles of 16 buckets: 0, 48, 96, … share one of 8, which keeps three."""
    case = Case(randn(300, 32), randn(5, 32, seed=1).abs(), None, 0)
    case.x[::48] = case.x[::48].abs() + 3
    budgets = torch.tensor([5, 1, 1, 1, 6], dtype=torch.int32)
    config = keys.keys_config(5, 300, 4 * budgets.sum() / 5, "tf32", 32, True, True, *[False] * 3)
    assert config["LOG2_G"] == 3
    h, *_ = for_reference(case)
    assert (h[:, [0, 4]].topk(6, dim=0).indices % 48 == 0).all()
    check(run, case, budgets, spare=0)


@run_all
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precisions(run, precision):
    case = Case(randn(40, 40), randn(6, 40, seed=1), None, 0)
    check(run, case, budgets_of(6, 9), precision=precision)


def streamed(slack: int, *args) -> tuple[tuple[Tensor, ...], Tensor]:
    """encode_columns with another room; and which latents have more candidates than their own."""
    before = encode_columns.SLACK, encode_columns.stream_columns
    seen = []

    def stream(of, budgets, pairs, counts):
        seen.append(counts != pairs.ptr.diff())
        before[1](of, budgets, pairs, counts)

    try:
        encode_columns.SLACK, encode_columns.stream_columns = slack, stream
        return encode_columns.encode_columns(*args), seen[0]
    finally:
        encode_columns.SLACK, encode_columns.stream_columns = before


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_more_candidates_than_room_are_streamed(bias):
    """Latents 0 to 3 see tokens that are nearly all equal; the others have room."""
    x, W = randn(90, 70), randn(8, 70, seed=1)
    x[:, :35] = randint(2, 1, 35)
    W[:4, 35:] = 0
    b = randn(8, seed=2).abs() if bias else None
    budgets = torch.tensor([5, 1, 40, 88, 3, 2, 1, 4], dtype=torch.int32)
    W[:4] = W[:4].abs()
    room = int(budgets.sum())
    got, which = interpreted(streamed, -4 * room, x, W, b, budgets, room)
    assert which[:2].all() and not which[3:].any()
    h = for_reference(Case(x, W, b, 0))
    assert_all_bits(got, reference.encode_columns(*h, budgets, room))


@run_all
@pytest.mark.parametrize("bad", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["x", "W_enc", "b_enc"])
def test_not_finite(run, bad, where):
    case = Case(randn(9, 40), randn(4, 40, seed=1), randn(4, seed=2), 0)._asdict()
    case[where][2] = bad
    budgets = torch.full((4,), 2, dtype=torch.int32)
    vals, idx, row_ptr = run(encode_columns.encode_columns, *list(case.values())[:3], budgets, 8)
    assert vals[0].isnan() and idx[0] == 0
    assert len(vals) == len(idx) == row_ptr[-1] == 8


@run_all
def test_overflowing_value(run):
    x, W = randn(9, 8), randn(4, 8, seed=1)
    x[4, 0], W[1, 0] = 1e20, 1e20
    budgets = torch.ones(4, dtype=torch.int32)
    assert run(encode_columns.encode_columns, x, W, None, budgets, 4)[0][0].isnan()


def test_refusals():
    x, W, budgets = randn(4, 8), randn(30, 8), torch.ones(30, dtype=torch.int32)
    with pytest.raises(TypeError, match=r"budgets: expected torch.int32, got torch.int64"):
        encode_columns.encode_columns(x, W, None, budgets.long(), 30)
    with pytest.raises(ValueError, match=r"budgets: expected shape \(30\), got \(29,\)"):
        encode_columns.encode_columns(x, W, None, budgets[1:], 30)
    with pytest.raises(ValueError, match=r"room: expected at least .* = 30, got 29"):
        encode_columns.encode_columns(x, W, None, budgets, 29)


@pytest.mark.gpu
def test_waits_for_nothing_and_reports_too_small_a_room():
    x, W = randn(300, 64).cuda(), randn(1000, 64, seed=1).cuda()
    budgets = budgets_of(1000, 5).cuda()
    room = int(budgets.sum())
    encode_columns.encode_columns(x, W, None, budgets, room)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        fits = encode_columns.encode_columns(x, W, None, budgets, room)
        lacks = encode_columns.encode_columns(x, W, None, budgets, room - 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert fits[0].isfinite().all() and lacks[0][0].isnan()


@pytest.mark.parametrize(("module", "variant", "target"), shipped(MODULES))
def test_compiled(module, variant, target):
    check_compiled(module, variant, target)
