"""encode: every bit of vals and idx, whatever the screen, the blocks, the threads and the data.

The oracle (common.fixed_order_encode) computes all pre-activations in numpy in the order that
csrc/simd.h promises and sorts them. The C++ encode must agree to the bit, for every instruction
set of this CPU.
"""

import re

import numpy as np
import pytest
import torch
from common import (
    INF,
    ISAS,
    NAN,
    VARIANTS,
    WEIGHTS,
    assert_bits,
    backends,
    far_apart,
    fixed_order_dot,
    fixed_order_encode,
    poisoned_empties,
    randn,
    refusals,
    run_child,
    threads,
    variants,
    weights,
)
from encoders import (
    CASES,
    WAYS,
    WHOLE,
    Case,
    all_ways,
    assert_all_bits,
    case_and_bits,
    case_and_h,
    odd_scale,
    overflowing,
    plain,
    pre_activations,
    problems,
    scores,
    screen_rounds,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastsae import SAE, SAEConfig, TopK, cpu, ops, reference


@pytest.fixture(autouse=True)
def poison():
    with poisoned_empties():
        yield


# Every product of the screen is rounded one way for the losers, the other for the winner: a margin
# of 95 % of its size loses the winner, which comes when 200 losers have raised the threshold.
def guide_rounds() -> tuple[Case, Tensor, Tensor]:
    d, half_unit = 32, 2.0**-8
    winner, loser = torch.full((d,), 1 + 0.98 * half_unit), torch.full((d,), 1 + 1.02 * half_unit)
    winner[0], loser[0] = 1 + 2 * half_unit, 1
    W_dec = torch.cat([torch.zeros(12_000, d), loser.repeat(200, 1), winner[None]])
    b = torch.full((len(W_dec),), -1e6)
    b[-201:] = 1
    case = Case(torch.zeros(3, 1), torch.zeros(len(W_dec), 1), b, 1)
    return case, torch.ones(3, d), W_dec


@variants
@weights
@pytest.mark.parametrize("name", CASES)
def test_bits(name, dtype, isa, screen):
    case, (vals, idx) = case_and_bits(name, dtype)
    for count, block in WAYS:
        with threads(count):
            forced = {"isa": isa, "screen": screen, "block_tokens": block}
            got = cpu.encode(*case, forced=forced)
        assert_bits(got[0], vals)
        assert_bits(got[1], idx)


@variants
@pytest.mark.parametrize("name", CASES)
def test_precision_bf16_is_that_of_rounded_inputs(name, isa, screen):
    """Denormals and numbers that become infinite in bf16 included."""
    case = CASES[name]()
    x = case.x.clamp(-3.38e38, 3.38e38)
    W = case.W_enc.clamp(-3.38e38, 3.38e38)
    expected = fixed_order_encode(*case._replace(x=x.bfloat16().float(), W_enc=W.bfloat16()))
    rest = case.b_enc, case.k, case.latents
    got = cpu.encode(x, W, *rest, "bf16", forced={"isa": isa, "screen": screen})
    assert_bits(got[0], expected[0])
    assert_bits(got[1], expected[1])


@backends
def test_precisions(backend):
    x, W, b, k, _ = plain(33, 300, 70, 9)
    screened = ops.encode(x, W, b, k=k, backend=backend)
    fp32 = ops.encode(x, W, b, k=k, precision="fp32", backend=backend)
    assert torch.equal(screened[0], fp32[0]) and torch.equal(screened[1], fp32[1])
    bf16 = ops.encode(x, W, b, k=k, precision="bf16", backend=backend)
    rounded = ops.encode(x.bfloat16(), W.bfloat16(), b, k=k, backend=backend)
    assert torch.equal(bf16[0], rounded[0]) and torch.equal(bf16[1], rounded[1])
    assert not torch.equal(bf16[0], fp32[0])
    sae = SAE(SAEConfig(70, 300, TopK(9)), precision="bf16", backend=backend)
    expected = ops.encode(x, sae.W_enc, sae.b_enc, k=9, precision="bf16", backend=backend)
    assert torch.equal(sae.encode(x).vals, expected[0])
    with pytest.raises(ValueError, match="precision: expected one of screened, fp32, bf16, got"):
        ops.encode(x, W, b, k=k, precision="tf32", backend=backend)


def test_weight_that_overflows_bf16():
    W = torch.randn(5, 8)
    W[3, 2] = 3.4e38
    cpu.encode(torch.zeros(2, 8), W, None, 2)
    with pytest.raises(ValueError, match="W_enc, b_enc: expected finite"):
        cpu.encode(torch.zeros(2, 8), W, None, 2, precision="bf16")


def test_cases_are_what_they_claim():
    def values(name: str) -> Tensor:
        case = CASES[name]()
        h = torch.from_numpy(fixed_order_dot(case.x.numpy(), case.W_enc.numpy()))
        return h if case.b_enc is None else h + case.b_enc

    for name in CASES:
        case, (_, idx) = case_and_bits(name, torch.float32)
        if name.startswith(("screen-rounds", "bf16-rounds")):
            winner = 0 if name.endswith("first") else len(case.W_enc) - 1
            assert (idx == winner).all(), name  # and to a careless screen it is the lowest
    rising, falling = values("ascending").diff(), values("descending").diff()
    assert (rising > 0).all()
    assert (falling < 0).all()
    ties = values("near-ties").sort().values.diff()
    assert (ties == 0).any()
    spread = values("near-ties").amax(1) - values("near-ties").amin(1)
    assert (spread < 1e-4).all()
    assert 0 < values("tiny-products").abs().max() < 1e-38
    assert len(values("equal-latents")[0].unique()) == 1
    assert (case_and_bits("all-negative", torch.float32)[1][1] == -1).all()
    assert ((values("few-positive") > 0).sum(1) == 10).all()


@variants
def test_any_number_of_threads(isa, screen):
    case, (vals, idx) = case_and_bits("random", torch.float32)
    for count in (3, 7, 64, 1024):
        forced = {"isa": isa, "screen": screen, "threads": count}
        got = cpu.encode(*case, forced=forced)
        assert_bits(got[0], vals)
        assert_bits(got[1], idx)


@pytest.mark.parametrize("isa", [isa for isa in ISAS if (isa, "bf16") not in VARIANTS])
def test_bf16_screen_without_bf16(isa):
    case, (vals, idx) = case_and_bits("random", torch.float32)
    got = cpu.encode(*case, forced={"isa": isa, "screen": "bf16"})
    assert_bits(got[0], vals)
    assert_bits(got[1], idx)


@variants
@weights
def test_a_token_alone_and_in_a_batch(isa, screen, dtype):
    x, W, b, k, _ = plain(45, 400, 70, 9)
    x[3:40:7] = x[2]
    with threads(2):  # a token alone has its latents divided among the threads
        batch = cpu.encode(x, W.to(dtype), b, k, forced={"isa": isa, "screen": screen})
        for n in range(0, 45, 4):
            alone = cpu.encode(
                x[n : n + 1], W.to(dtype), b, k, forced={"isa": isa, "screen": screen}
            )
            assert_bits(alone[0][0], batch[0][n])
            assert_bits(alone[1][0], batch[1][n])


@variants
def test_shards_of_the_latents_agree(isa, screen):
    case, (vals, idx) = case_and_bits("integers", torch.float32)
    parts = [
        cpu.encode(
            *case._replace(latents=torch.arange(a, a + 125, dtype=torch.int32)),
            forced={"isa": isa, "screen": screen},
        )
        for a in range(0, 500, 125)
    ]
    all_vals, all_idx = (torch.cat(p, 1) for p in zip(*parts, strict=True))
    best = all_vals.sort(dim=1, descending=True, stable=True).indices[:, : case.k]
    assert_bits(all_vals.gather(1, best), vals)
    assert_bits(all_idx.gather(1, best), idx)


# ---- scores ----


def expected_top(h: np.ndarray, score: np.ndarray, k: int) -> tuple[Tensor, Tensor]:
    vals, idx = np.zeros((len(h), k), np.float32), np.full((len(h), k), -1, np.int32)
    for n in range(len(h)):
        best = np.lexsort((np.arange(h.shape[1]), -score[n]))[:k]
        best = best[score[n, best] > 0]
        vals[n, : len(best)], idx[n, : len(best)] = h[n, best], best
    return torch.from_numpy(vals), torch.from_numpy(idx)


SCORED = (
    {"absolute": True},
    {"scaled": True},
    {"scaled": True, "absolute": True},
    {"guided": 0.0},
    {"guided": 1e-4, "absolute": True},
    {"guided": 1.0, "scaled": True},
    {"guided": 1e6},
)


@pytest.mark.parametrize("how", SCORED, ids=str)
@pytest.mark.parametrize("name", WHOLE)
def test_scores(name, how):
    dtype = WEIGHTS[len(name) % 2]
    case, h = case_and_h(name, dtype)
    (n, f), seed = h.shape, len(name)
    score: dict = {"absolute": "absolute" in how}
    if "scaled" in how:
        score["scale"] = odd_scale(f, seed)
    if "guided" in how:
        width = 1 + 37 * (seed % 3)
        score["guide"] = randn(n, width, seed=seed) * how["guided"]
        score["guide"][::7] *= 1e4  # too coarse for bf16
        score["W_dec"] = randn(f, width, seed=seed + 1).round(decimals=1).to(dtype)
    expected = expected_top(h, scores(h, **score), case.k)
    for i, forced in enumerate(all_ways()):
        if i % 4 == seed % 4 or name == "random":
            assert_all_bits(cpu.encode(*case, **score, forced=forced), list(expected))


def test_scores_of_some_latents():
    x, W, b, k, _ = plain(45, 300, 65, 7)
    ids = torch.arange(2, 300, 3, dtype=torch.int32)
    score: dict = {"scale": odd_scale(300), "guide": randn(45, 20), "W_dec": randn(300, 20)}
    for options in ({}, {"absolute": True}):
        expected = cpu.encode(
            *(x, W[ids], b[ids], k),
            scale=score["scale"][ids],
            guide=score["guide"],
            W_dec=score["W_dec"][ids],
            **options,
        )
        for forced in all_ways():
            vals, idx = cpu.encode(x, W, b, k, ids, **score, **options, forced=forced)
            assert_bits(vals, expected[0])
            at = torch.where(idx < 0, idx, (idx - 2) // 3)
            assert_bits(at.to(torch.int32), expected[1])


@pytest.mark.parametrize("kind", ["bf16", "fp32"])
def test_margin_of_the_guide(kind):
    case, guide, W_dec = guide_rounds()
    if kind == "fp32":
        rounds = screen_rounds(200)
        guide, W_dec = rounds.x, rounds.W_enc
        case = Case(torch.zeros(3, 1), torch.zeros(len(W_dec), 1), torch.ones(len(W_dec)), 1)
    h = pre_activations(case)
    vals, idx = expected_top(h, scores(h, guide=guide, W_dec=W_dec), 1)
    assert (idx == len(W_dec) - 1).all()
    for forced in all_ways():
        got = cpu.encode(*case, guide=guide, W_dec=W_dec, forced=forced)
        assert_all_bits(got, [vals, idx])


def test_infinite_scores():  # h is a number of fp32, h·scale is not: they tie
    x, W, _, _, _ = plain(40, 300, 20, 6)
    scale = torch.full((300,), 1.0)
    scale[5::7] = 3e38
    h = pre_activations(Case(x * 100, W, None, 6))
    score = scores(h, scale=scale)
    assert np.isinf(score).sum() > 500
    for k in (3, 30):
        expected = list(expected_top(h, score, k))
        for forced in all_ways():
            assert_all_bits(cpu.encode(x * 100, W, None, k, scale=scale, forced=forced), expected)


@backends
def test_scores_by_hand(backend):
    encode = {"reference": reference.encode, "cpu": cpu.encode}[backend]
    x, W = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0], [0, 1], [-3, 0], [0.5, 0], [2, 0]])
    scale = torch.tensor([3.0, 1, 1, 6, 0])
    vals, idx = encode(x, W, None, 4, absolute=True)
    assert vals.tolist() == [[-3, 2, 2, 1]]
    assert idx.tolist() == [[2, 1, 4, 0]]
    vals, idx = encode(x, W, None, 4, scale=scale)
    assert vals.tolist() == [[1, 0.5, 2, 0]]
    assert idx.tolist() == [[0, 3, 1, -1]]
    guide, W_dec = torch.tensor([[1.0]]), torch.tensor([[-5.0], [-2], [9], [20], [2]])
    vals, idx = encode(x, W, None, 4, guide=guide, W_dec=W_dec)
    assert vals.tolist() == [[0.5, 1, 2, 2]]
    assert idx.tolist() == [[3, 0, 1, 4]]


# ---- any data ----


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    problems(), st.sampled_from(VARIANTS), st.sampled_from([1, 2, 5]), st.sampled_from([0, 1, 64])
)
def test_bits_on_any_data(case, variant, count, block):
    vals, idx = fixed_order_encode(*case)
    forced = {"isa": variant[0], "screen": variant[1], "block_tokens": block, "threads": count}
    got = cpu.encode(*case, forced=forced)
    assert_bits(got[0], vals)
    assert_bits(got[1], idx)


# With denormals flushed, every thread must flush, and squares in the screen's norms vanish early.
FLUSHED = """
    import itertools
    import torch
    from common import VARIANTS, assert_bits, fixed_order_encode, randn
    from fastsae import cpu
    from encoders import WAYS, Case, bf16_rounds_tokens, bf16_rounds_weights, scaled

    assert torch.set_flush_denormal(True)
    assert torch.tensor([1e-39]).mul(1.0).item() == 0
    cases = {f"x {a}, W {b}": scaled(a, b) for a, b in [(1e-20, 1e-20), (1e-40, 1), (1, 1e-40)]}
    cases["at the limit"] = Case(randn(50, 64), randn(300, 64) * 2e-38, randn(300) * 1e-38, 9)
    for e in (54, 58, 62, 63, 64, 66, 70, 75):
        tight = bf16_rounds_weights(200)
        W, b = tight.W_enc * 2.0**-e, tight.b_enc * 2.0**-e
        cases[f"W 2**-{e}"] = tight._replace(W_enc=W, b_enc=b)
        cases[f"x, W 2**-{e}"] = bf16_rounds_tokens(weight=2.0**-e)
    for name, case in cases.items():
        vals, idx = fixed_order_encode(*case)
        for (isa, screen), (count, block) in itertools.product(VARIANTS, WAYS):
            forced = {"isa": isa, "screen": screen, "threads": count, "block_tokens": block}
            got = cpu.encode(*case, forced=forced)
            assert torch.equal(got[1], idx), (name, forced)
            assert_bits(got[0], vals)
"""


def test_flushed_denormals():
    run_child(FLUSHED)


# ---- against the reference ----


@weights
@pytest.mark.parametrize("name", ["random", "outliers", "huge", "tiny-W", "near-ties", "d768"])
def test_error_is_at_most_eagers(name, dtype):
    case, _ = case_and_bits(name, dtype)
    vals, idx = cpu.encode(*case)
    x, W = case.x.double(), case.W_enc.double()
    b = 0 if case.b_enc is None else case.b_enc.double()
    exact = x @ W.T + b
    eager = (case.x @ case.W_enc.float().T + (0 if case.b_enc is None else case.b_enc)).double()
    at = idx.clamp(min=0).long()
    assert (idx >= 0).all()
    error = (vals - exact.gather(1, at)).abs().max()
    unit = 2.0**-23 * exact.abs().max()
    assert error <= (eager - exact).abs().max() + unit
    # Nothing that was left out is clearly larger than what was kept.
    best = exact.topk(case.k, dim=1).values
    assert (best - vals).abs().max() <= 2 * ((eager - exact).abs().max() + unit)


@backends
def test_order_ties_and_padding(backend):
    encode = {"reference": reference.encode, "cpu": cpu.encode}[backend]
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [-1.0, -1.0]])
    W = torch.tensor([[1.0, 2], [3, 2], [-1, 2], [3, -2], [1, 0], [3, 2]])
    vals, idx = encode(x, W, None, 4)
    expected = [[3, 3, 3, 1], [2, 2, 2, 2], [0] * 4, [0] * 4]
    assert torch.equal(vals, torch.tensor(expected, dtype=torch.float32))
    expected = [[1, 3, 5, 0], [0, 1, 2, 5], [-1] * 4, [-1] * 4]
    assert torch.equal(idx, torch.tensor(expected, dtype=torch.int32))
    b = torch.tensor([-1.0, -3, 0.5, -2, 0, 1])
    vals, idx = encode(x, W, b, 4, torch.tensor([0, 2, 3, 5], dtype=torch.int32))
    expected = [[4, 1, 0, 0], [3, 2.5, 1, 0], [1, 0.5, 0, 0], [0] * 4]
    assert torch.equal(vals, torch.tensor(expected))
    expected = [[5, 3, -1, -1], [5, 2, 0, -1], [5, 2, -1, -1], [-1] * 4]
    assert torch.equal(idx, torch.tensor(expected, dtype=torch.int32))


# ---- what encode refuses ----


@variants
@pytest.mark.parametrize("bad", [NAN, INF, -INF], ids=str)
def test_non_finite_inputs(bad, isa, screen):
    for n, d, count in [(0, 64, 1), (17, 0, 2), (32, 63, 1), (44, 31, 2)]:
        forced = {"isa": isa, "screen": screen, "threads": count}
        x, W, b, k, _ = plain(45, 29, 65, 3)
        x[n, d] = bad
        with pytest.raises(ValueError, match=rf"^x: expected finite .* in row {n}$"):
            cpu.encode(x, W, b, k, forced=forced)
        f = n * 28 // 44
        for dtype in (torch.float32, torch.bfloat16):
            x, W, b, k, _ = plain(45, 29, 65, 3)
            W[f, d] = bad
            with pytest.raises(ValueError, match=rf"^W_enc, b_enc: .* in latent {f}$"):
                cpu.encode(x, W.to(dtype), b, k, forced=forced)
        x, W, b, k, _ = plain(45, 29, 65, 3)
        b[f] = bad
        with pytest.raises(ValueError, match=rf"^W_enc, b_enc: .* in latent {f}$"):
            cpu.encode(x, W, b, k, forced=forced)


@backends
def test_non_finite_latents_that_are_not_asked_for(backend):
    encode = {"reference": reference.encode, "cpu": cpu.encode}[backend]
    x, W, b, k, _ = plain(45, 29, 65, 3)
    W[7], b[8] = NAN, INF
    latents = torch.tensor([0, 1, 6, 9, 28], dtype=torch.int32)
    vals, idx = encode(x, W, b, k, latents)
    assert vals.isfinite().all()
    assert torch.isin(idx, torch.cat([latents, torch.tensor([-1])])).all()
    with pytest.raises(ValueError, match="finite"):
        encode(x, W, b, k, torch.tensor([6, 8], dtype=torch.int32))


@variants
@pytest.mark.parametrize("kind", ["positive", "negative", "bias", "running-sum", "coarse"])
def test_overflowing_pre_activations(kind, isa, screen):
    case = overflowing(kind)
    h = torch.from_numpy(fixed_order_dot(case.x.numpy(), case.W_enc.numpy()))
    h = h if case.b_enc is None else h + case.b_enc
    bad = (~h.isfinite()).nonzero()
    assert (bad[:, 1] == 600).all()
    for count, block in WAYS:
        forced = {"isa": isa, "screen": screen, "threads": count, "block_tokens": block}
        with pytest.raises(ValueError, match=r"overflow at token \d+, latent 600$") as error:
            cpu.encode(*case, forced=forced)
        token = int(str(error.value).split("token ")[1].split(",")[0])
        assert token in bad[:, 0].tolist()


@variants
@pytest.mark.parametrize("bad", [NAN, INF, -INF], ids=str)
def test_non_finite_guides(bad, isa, screen):
    x, W, b, k, _ = plain(45, 29, 65, 3)
    for name, message in (("guide", r"guide: .* in row 17"), ("W_dec", r"W_dec: .* latent 17")):
        score = {"guide": randn(45, 33), "W_dec": randn(29, 33)}
        score[name][17, 32] = bad
        for count in (1, 2):
            forced = {"isa": isa, "screen": screen, "threads": count}
            with pytest.raises(ValueError, match=message):
                cpu.encode(x, W, b, k, **score, forced=forced)


@variants
def test_overflowing_guides(isa, screen):
    x, W, b, k, _ = plain(45, 900, 65, 3)
    guide, W_dec = randn(45, 33), randn(900, 33)
    guide[30], W_dec[600], b[600] = 1e20, 1e19, 100
    for count, block in WAYS:
        forced = {"isa": isa, "screen": screen, "threads": count, "block_tokens": block}
        with pytest.raises(
            ValueError, match="guide and W_dec, got an overflow at token 30, latent 600"
        ):
            cpu.encode(x, W, b, k, guide=guide, W_dec=W_dec, forced=forced)


@pytest.mark.parametrize("bad", [NAN, INF, -INF, -1.0, -1e-30], ids=str)
def test_bad_scales(bad):
    scale = torch.ones(29)
    scale[7] = bad
    message = f"scale: expected finite numbers of at least 0, got {float(scale[7])} at position 7"
    for call in (cpu.encode, cpu.encode_batch):
        with pytest.raises(ValueError, match=re.escape(message)):
            call(*plain(5, 29, 8, 3)[:4], scale=scale)


@refusals(
    "name, change, error, message",
    [
        ("scale", lambda _: torch.ones(4), ValueError, r"scale: expected shape \(5\), got \(4\)"),
        ("scale", lambda _: torch.ones(5).double(), TypeError, "scale: .* float32, got float64"),
        ("guide", lambda _: torch.ones(3, 4), ValueError, "guide: expected W_dec with it"),
        ("W_dec", lambda _: torch.ones(5, 4), ValueError, "guide: expected W_dec with it"),
        ("x", lambda t: t[0], ValueError, r"x: expected shape \(\*, \*\), got \(8\)"),
        ("x", lambda t: t[:, 1:], ValueError, r"W_enc: expected shape \(\*, 7\), got \(5, 8\)"),
        ("x", lambda t: t.to("meta"), ValueError, "x: expected a CPU tensor, got one on meta"),
        ("W_enc", lambda t: t.double(), TypeError, "W_enc: .* bfloat16, got float64"),
        ("W_enc", lambda t: t.half(), TypeError, "W_enc: .* bfloat16, got float16"),
        ("W_enc", lambda t: t.t().contiguous().t(), ValueError, "W_enc: expected unit stride"),
        ("W_enc", lambda t: t[:, ::2], ValueError, r"W_enc: expected shape \(\*, 8\)"),
        ("W_enc", lambda t: t.tolist(), TypeError, "W_enc: expected a torch.Tensor, got .*list"),
        ("W_enc", lambda t: t.numpy(), TypeError, "W_enc: expected a torch.Tensor, got .*ndarray"),
        ("b_enc", lambda t: t[1:], ValueError, r"b_enc: expected shape \(5\), got \(4\)"),
        ("b_enc", lambda t: t[:, None], ValueError, r"b_enc: expected shape \(5\), got \(5, 1\)"),
        ("latents", lambda t: t.long(), TypeError, "latents: expected dtype int32, got int64"),
        ("latents", lambda t: t + 1, IndexError, r"latents: expected values in \[0, 5\), got 5"),
        ("latents", lambda t: t - 1, IndexError, r"latents: .* got -1 at position 0"),
        ("latents", lambda t: t.flip(0), ValueError, "latents: expected strictly ascending ids"),
        ("latents", lambda t: t // 2, ValueError, "latents: .* got 0 at position 1"),
        ("latents", lambda t: t[::2], ValueError, "latents: expected unit stride"),
        ("forced", lambda _: {"isa": "mmx"}, ValueError, f"isa: expected one of {ISAS[0]}.*, got"),
        ("forced", lambda _: {"screen": "int4"}, ValueError, "screen: expected fp32 or bf16, got"),
        ("forced", lambda _: {"threads": 0}, ValueError, "threads: expected 1 to 1024, got 0"),
        ("forced", lambda _: {"threads": -1}, ValueError, "threads: expected 1 to 1024, got -1"),
        ("forced", lambda _: {"threads": 2000}, ValueError, "threads: expected 1 to 1024"),
    ],
)
def test_says_what_is_wrong(name, change, error, message):
    latents = torch.tensor([0, 1, 2, 3, 4], dtype=torch.int32)
    args = {"x": randn(3, 8), "W_enc": randn(5, 8), "b_enc": randn(5), "latents": latents}
    with pytest.raises(error, match=message):
        cpu.encode(**{**args, name: change(args.get(name))}, k=2)


@variants
def test_tokens_without_width(isa, screen):  # the bias is all there is
    case = Case(torch.zeros(40, 0), torch.zeros(6, 0), torch.tensor([1.0, -1, 3, 3, 0, 2]), 4)
    for count, block in WAYS:
        forced = {"isa": isa, "screen": screen, "block_tokens": block, "threads": count}
        vals, idx = cpu.encode(*case, forced=forced)
        assert torch.equal(vals, torch.tensor([[3.0, 3, 2, 1]]).repeat(40, 1))
        assert torch.equal(idx, torch.tensor([[2, 3, 5, 0]], dtype=torch.int32).repeat(40, 1))


@variants
@pytest.mark.parametrize("block", [-5, 10**9, 2**62, 2**63 - 1])
def test_absurd_blocks(block, isa, screen):
    case, (vals, idx) = case_and_bits("random", torch.float32)
    forced = {"isa": isa, "screen": screen, "block_tokens": block}
    got = cpu.encode(*case, forced=forced)
    assert_bits(got[0], vals)
    assert_bits(got[1], idx)


@weights
def test_offsets_past_2_to_the_31(dtype, tmp_path):
    x, W = randn(3, 40), randn(3, 40, seed=1).to(dtype)
    far_x, far_W = far_apart(tmp_path / "x", x), far_apart(tmp_path / "W", W)
    for isa, screen in VARIANTS:
        vals, idx = cpu.encode(far_x, far_W, None, 3, forced={"isa": isa, "screen": screen})
        expected = fixed_order_encode(x, W, None, 3)
        assert_bits(vals, expected[0])
        assert_bits(idx, expected[1])


def test_weights_are_not_copied():
    # 2**17 latents of 64 KiB of weights each, all the same memory: 8 GiB if they were copied.
    W = randn(1, 2**14).expand(2**17, -1)
    vals, idx = cpu.encode(W[:1], W, None, 3)
    assert idx.tolist() == [[0, 1, 2]]
    assert (vals == vals[0, 0]).all()
