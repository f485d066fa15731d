"""encode: every bit of vals and idx, whatever the screen, the blocks, the threads and the data.

The oracle (common.fixed_order_encode) computes all pre-activations in numpy in the order that
csrc/simd.h promises and sorts them. The C++ encode must agree to the bit, for every instruction
set of this CPU.
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

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
    randint,
    randn,
    refusals,
    run_child,
    threads,
    variants,
    weights,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastsae import SAE, SAEConfig, TopK, cpu, ops, reference

# threads, block_tokens. A block of 1 is as narrow as the instruction set's registers.
WAYS = ((1, 0), (1, 100), (2, 0), (2, 1))


@pytest.fixture(autouse=True)
def poison():
    with poisoned_empties():
        yield


class Case(NamedTuple):
    x: Tensor
    W_enc: Tensor
    b_enc: Tensor | None
    k: int
    latents: Tensor | None = None


def ulps(t: Tensor, steps: Tensor) -> Tensor:
    """The float32 numbers `steps` beyond those of t."""
    return (t.view(torch.int32) + steps.to(torch.int32)).view(torch.float32)


def plain(n: int, f: int, d: int, k: int, seed: int = 0) -> Case:
    return Case(randn(n, d, seed=seed), randn(f, d, seed=seed + 1), randn(f, seed=seed + 2), k)


def outliers() -> Case:
    x, W, b, k, _ = plain(40, 300, 96, 6)
    x[:, 3] *= 1e4
    x[:, 40] *= -1e4
    W[::5, 3] *= 1e4
    return Case(x, W, b, k)


def scaled(x_scale: float, w_scale: float, b_scale: float = 0.0, d: int = 64) -> Case:
    x, W, b, k, _ = plain(40, 300, d, 6)
    return Case(x * x_scale, W * w_scale, b * b_scale if b_scale else None, k)


def tokens_of_all_sizes() -> Case:
    x, W, _, k, _ = plain(61, 300, 48, 6)
    return Case(x * torch.logspace(-30, 30, 61)[:, None], W, None, k)


def latents_of_all_sizes() -> Case:
    x, W, b, k, _ = plain(40, 301, 48, 6)
    size = torch.logspace(-30, 30, 301)[randn(301, seed=3).argsort()]
    return Case(x, W * size[:, None], b * size.flip(0), k)


def near_ties() -> Case:
    x, W = randn(40, 48).abs(), randn(1, 48, seed=1).abs().repeat(400, 1)
    return Case(x, ulps(W, randint(3, 400, 48, low=-2)), None, 7)


def bias_ties() -> Case:  # values one unit in the last place apart, in shuffled order
    order = torch.randperm(700, generator=torch.Generator().manual_seed(0))
    return Case(torch.zeros(20, 8), torch.zeros(700, 8), ulps(torch.ones(700), order // 3), 50)


def integers() -> Case:  # exact in any order, so the ties are true ones
    return Case(randint(2, 60, 16, low=-1), randint(2, 500, 16, low=-1, seed=1), None, 10)


def duplicates(distinct: int, k: int) -> Case:
    which = randint(distinct, 3000, seed=5).long()
    return Case(randn(35, 40), randn(distinct, 40, seed=1)[which], None, k)


def along_the_stream(slope: Tensor, k: int = 8) -> Case:  # every token's values rise or fall
    W = (1 + randn(1, 30, seed=1).abs()) * slope[:, None]
    return Case(randn(33, 30).abs(), W, None, k)


def few_positive() -> Case:
    x, W, b, k, _ = plain(33, 900, 24, 300)
    b[:] = -1e3
    b[::90] = 1e3
    return Case(x, W, b, k)


def cancelling() -> Case:  # large norms, small values: all is within the margin
    x = randn(20, 1, seed=3) * 1e4 * torch.tensor([1.0, -1.0]).repeat(32) + randn(20, 64)
    W = 1e3 + randn(1000, 1, seed=4).repeat(1, 64) + 1e-3 * randn(1000, 64, seed=5)
    return Case(x, W, None, 5)


def coarse(first: int, last: int) -> Case:
    """In bf16, what a huge coordinate of some tokens loses hides how their values differ."""
    x, W, _, _, _ = plain(150, 4000, 96, 4)
    x[first:last, 5], W[:, 5] = 30001.7, 1
    return Case(x, W, None, 4)


def subset(step: int, first: int = 0) -> Case:
    x, W, b, k, _ = plain(40, 300, 48, 6)
    return Case(x, W, b, k, torch.arange(first, 300, step, dtype=torch.int32))


def strided() -> Case:
    x, W = torch.full((40, 70), NAN), torch.full((600, 70), NAN)
    x[:, 3:53], W[::2, 7:57] = randn(40, 50), randn(300, 50, seed=1)
    return Case(x[:, 3:53], W[::2, 7:57], None, 6)


def stacked(losers: Tensor, winner: Tensor, losers_b: float = 0.0, winner_b: float = 0.0) -> Case:
    """The winner is the last latent, after 200 losers: the threshold is raised when it comes.

    Before them come many latents that are far from being chosen: a screen that had too much to
    score would be given up.
    """
    W = torch.cat([torch.zeros(12_000, len(winner)), losers.repeat(200, 1), winner[None]])
    b = torch.full((len(W),), -1e6)
    b[-201:], b[-1] = losers_b, winner_b
    return Case(torch.empty(0), W, b, 1)


# The next make the screen err by almost all that the margin allows: a margin of 95 % of its size
# loses the winner. The first: each product is about half a unit in the last place of the running
# sum, and is rounded up, or down. The others: all that bf16 drops of x or W has one sign.


def screen_rounds(copies: int, winner_first: bool = False) -> Case:
    d, base, unit = 2**14, 1 + 2.0**-10, 2.0**-23
    x = torch.full((d,), 2.0**-12)
    x[::64] = 0  # the lane of the dot product where the sum of size 1 is
    x[0] = 1
    winner, loser = x * (1 - 2.0**-10), x * (1 + 2.0**-10)
    # The winner is screened 2**14 half units too low and the losers as much too high.
    winner[0], loser[0] = base, base - 24 * unit
    order = [winner, *[loser] * copies] if winner_first else [*[loser] * copies, winner]
    return Case(x.repeat(3, 1), torch.stack(order), None, 1)


def bf16_rounds_weights(copies: int) -> Case:
    d, half_unit = 32, 2.0**-8
    winner, loser = torch.full((d,), 1 + 0.98 * half_unit), torch.full((d,), 1 + 1.02 * half_unit)
    case = stacked(loser, winner, losers_b=-d * 0.05 * half_unit)
    if copies == 1:
        case = case._replace(W_enc=case.W_enc[-2:], b_enc=case.b_enc[-2:])
    return case._replace(x=torch.ones(3, d))


def bf16_rounds_tokens(scale: float = 1.0, weight: float = 1.0) -> Case:
    d = 32
    rows = torch.full((d,), weight)
    x = torch.full((3, d), scale * (1 + 0.98 * 2.0**-8))
    step = d * weight * scale * 1e-6
    return stacked(rows, rows, losers_b=step, winner_b=2 * step)._replace(x=x)


def bf16_rounds_huge_weights() -> Case:  # whose norms are beyond fp32
    d, x = 768, 1 + 0.98 * 2.0**-8
    rows = torch.full((d,), x * 2.0**127)
    step = d * 2.0**97 * 1e-5
    case = stacked(rows, rows, losers_b=step, winner_b=2 * step)
    return case._replace(x=torch.full((3, d), x * 2.0**-30))


def bf16_overflows() -> Case:  # 3.4e38 is infinite in bf16, so the screen's sums are too
    W = torch.tensor([[3.4e38, 3e38, 3e38], [3e38, 1e38, 1e38], [3.4e38, 3.4e38, 3.4e38]])
    return Case(torch.tensor([[-1e-30, 1e-30, 1e-30], [1e-30, 1e-30, -1e-30]]), W, None, 2)


def screen_overflows() -> Case:
    # In sequence the sums pass 3.4e38 and come back; in 64 lanes they never get there.
    W = torch.tensor([1.0, -1.0]).repeat_interleave(32).repeat(50, 2) * 2.0**125
    W[:, -1] *= torch.linspace(0, 1, 50)
    return Case(torch.ones(2, 128), W, None, 3)


WIDTHS = (1, 2, 3, 31, 63, 64, 65, 100, 127, 768)
CASES: dict[str, Callable[[], Case]] = {
    "random": lambda: plain(150, 517, 100, 8),
    "many-tokens": lambda: plain(700, 90, 40, 3),
    "no-bias": lambda: plain(150, 300, 63, 8)._replace(b_enc=None),
    **{f"d{d}": functools.partial(plain, 33, 77, d, 5) for d in WIDTHS},
    **{f"n{n}": functools.partial(plain, n, 200, 48, 5) for n in (0, 1, 31, 32, 33)},
    **{f"f{f}": functools.partial(plain, 40, f, 20, 3) for f in (0, 1, 5, 13, 14, 15, 29)},
    **{f"k{k}": functools.partial(plain, 40, 200, 20, k) for k in (0, 1, 200, 205)},
    "k1024": lambda: plain(9, 1500, 24, 1024),
    "k1024-of-many": lambda: plain(5, 9000, 8, 1024),
    "outliers": outliers,
    "huge": lambda: scaled(1e18, 1e18, 1e36),
    "huge-x": lambda: scaled(1e36, 1e-3),
    "huge-W": lambda: scaled(1e-37, 5e37),
    "huge-b": lambda: scaled(1, 1, 1e37),
    "b-hides-products": lambda: scaled(1, 1, 1e7),
    "tiny-W": lambda: scaled(1, 1e-25),
    "tiny-x": lambda: scaled(1e-25, 1),
    "tiny-products": lambda: scaled(1e-20, 1e-20, 1e-40),
    "vanishing-products": lambda: scaled(1e-30, 1e-30),
    "denormal-W": lambda: scaled(1e3, 1e-40, d=65),
    "denormal-x": lambda: scaled(1e-40, 1e3, d=65),
    "denormal-b": lambda: scaled(1e-40, 1e-3, 1e-41),
    "tokens-of-all-sizes": tokens_of_all_sizes,
    "latents-of-all-sizes": latents_of_all_sizes,
    "near-ties": near_ties,
    "bias-ties": bias_ties,
    "integers": integers,
    "equal-latents": lambda: duplicates(1, 4),
    "equal-latents-k150": lambda: duplicates(1, 150),
    "three-kinds-of-latents": lambda: duplicates(3, 40),
    "all-negative": lambda: plain(40, 300, 20, 6)._replace(b_enc=torch.full((300,), -1e3)),
    "all-zero": lambda: Case(torch.zeros(40, 20), torch.zeros(300, 20), None, 6),
    "zero-x": lambda: plain(40, 300, 20, 6)._replace(x=torch.zeros(40, 20)),
    "negative-zeros": lambda: Case(torch.zeros(9, 20), -torch.ones(30, 20), -torch.zeros(30), 6),
    "ascending": lambda: along_the_stream(torch.arange(1.0, 2001)),
    "descending": lambda: along_the_stream(torch.arange(2000.0, 0, -1)),
    "ascending-by-one-ulp": lambda: along_the_stream(ulps(torch.ones(2000), torch.arange(2000))),
    "few-positive": few_positive,
    "cancelling": cancelling,
    "coarse": lambda: coarse(0, 150),
    "coarse-in-the-middle": lambda: coarse(64, 96),
    "coarse-at-the-end": lambda: coarse(149, 150),
    "every-third-latent": lambda: subset(3),
    "all-latents": lambda: subset(1),
    "one-latent": lambda: subset(300, 299),
    "no-latents": lambda: subset(1, 300),
    "strided": strided,
    "transposed-x": lambda: plain(40, 300, 50, 6)._replace(x=randn(50, 40).t()),
    "screen-rounds-first": lambda: screen_rounds(1, winner_first=True),
    "screen-rounds-last": lambda: screen_rounds(1),
    "screen-rounds-overflowing": lambda: screen_rounds(200),
    "bf16-rounds-weights": lambda: bf16_rounds_weights(1),
    "bf16-rounds-weights-overflowing": lambda: bf16_rounds_weights(200),
    "bf16-rounds-tokens": bf16_rounds_tokens,
    "bf16-rounds-tiny-tokens": lambda: bf16_rounds_tokens(1e-30, 1e-5),
    "bf16-rounds-huge-weights": bf16_rounds_huge_weights,
    "bf16-overflows": bf16_overflows,
    "bf16-overflows-x": lambda: Case(bf16_overflows().W_enc, bf16_overflows().x, None, 2),
    "screen-overflows": screen_overflows,
}


SUBSETS = ("every-third-latent", "all-latents", "one-latent", "no-latents")
WHOLE = [name for name in CASES if name not in SUBSETS]


@functools.cache
def case_and_bits(name: str, dtype: torch.dtype) -> tuple[Case, tuple[Tensor, Tensor]]:
    case = CASES[name]()
    if dtype == torch.bfloat16:
        W = torch.full((len(case.W_enc), case.W_enc.shape[1] + 5), NAN, dtype=dtype)
        W[:, 3:-2] = case.W_enc.clamp(-3.38e38, 3.38e38)  # what is larger is infinite in bf16
        case = case._replace(W_enc=W[:, 3:-2])
    expected = fixed_order_encode(*case)
    assert expected[0].isfinite().all()
    return case, expected


# ---- what the other encoders promise: used by test_encode_batch, _columns and _threshold ----


def pre_activations(case: Case) -> np.ndarray:
    h = fixed_order_dot(case.x.float().numpy(), case.W_enc.float().numpy())
    return h if case.b_enc is None else h + case.b_enc.numpy()


def scores(
    h: np.ndarray,
    scale: Tensor | None = None,
    absolute: bool = False,
    guide: Tensor | None = None,
    W_dec: Tensor | None = None,
) -> np.ndarray:
    with np.errstate(over="ignore"):
        score = np.abs(h) if absolute else h
        if scale is not None:
            score = score * scale.numpy()
        if guide is not None and W_dec is not None:
            dots = fixed_order_dot(guide.numpy(), W_dec.float().numpy())
            score = score * (np.float32(1) + np.abs(dots))
    assert score.dtype == np.float32
    return score


def as_rows(h: np.ndarray, score: np.ndarray, kept: np.ndarray, room: int) -> list[Tensor]:
    vals, idx = np.zeros(room, np.float32), np.full(room, -1, np.int32)
    row_ptr = np.zeros(len(h) + 1, np.int64)
    for n in range(len(h)):
        ids = kept[n].nonzero()[0]
        ids = ids[np.lexsort((ids, -score[n, ids]))]
        row_ptr[n + 1] = row_ptr[n] + len(ids)
        entries = slice(row_ptr[n], row_ptr[n + 1])
        vals[entries], idx[entries] = h[n, ids], ids
    row_ptr[-1] = room
    return [torch.from_numpy(t) for t in (vals, idx, row_ptr)]


def assert_all_bits(got: tuple[Tensor, ...], expected: list[Tensor]) -> None:
    for one, other in zip(got, expected, strict=True):
        assert_bits(one, other)


@functools.cache
def case_and_h(name: str, dtype: torch.dtype) -> tuple[Case, np.ndarray]:
    """A case whose latents are all asked for, and its pre-activations."""
    case = case_and_bits(name, dtype)[0]
    return case, pre_activations(case)


def all_ways() -> Iterator[dict[str, object]]:
    for (isa, screen), (count, block) in itertools.product(VARIANTS, WAYS):
        yield {"isa": isa, "screen": screen, "threads": count, "block_tokens": block}


def odd_scale(n: int, seed: int = 0) -> Tensor:
    """0, 1, numbers that differ in the last place, tiny and huge ones."""
    scale = ulps(torch.ones(n), randint(4, n, seed=seed))
    special = torch.tensor([0.0, 1.0, 1e-42, 1e-30, 1e30, 0.3])
    return torch.where(randn(n, seed=seed + 1) > 0, scale, special[torch.arange(n) % 6])


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

scales = st.sampled_from([0.0, 1e-30, 1e-12, 1e-3, 1.0, 1e3, 1e12])


@st.composite
def problems(draw) -> Case:
    seed = draw(st.integers(0, 2**31))
    n, f = draw(st.integers(0, 70)), draw(st.integers(1, 260))
    d, k = draw(st.integers(1, 140)), draw(st.integers(1, 70))
    x, W, b = randn(n, d, seed=seed), randn(f, d, seed=seed + 1), randn(f, seed=seed + 2)
    if draw(st.booleans()):  # few different numbers: many ties
        x, W, b = x.round(), W.round(), b.round()
    if draw(st.booleans()):  # few different latents
        W = W[randint(draw(st.integers(1, 5)), f, seed=seed).long() % f]
    if draw(st.booleans()):  # hardly different latents
        W = ulps(W, randint(2, f, d, seed=seed))
    if draw(st.booleans()):  # rows of all sizes
        W = W * 10 ** (4 * randn(f, 1, seed=seed + 3))
    x, W = x * draw(scales), W * draw(scales)
    b = b * draw(scales) + draw(st.sampled_from([0.0, 1.0, -3.0]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    latents = None
    if draw(st.booleans()):
        latents = (randn(f, seed=seed + 4) > 0).nonzero()[:, 0].to(torch.int32)
    return Case(x, W.to(dtype), draw(st.sampled_from([None, b])), k, latents)


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
    from test_encode import WAYS, Case, bf16_rounds_tokens, bf16_rounds_weights, scaled

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


def overflowing(kind: str) -> Case:
    x, W, b, k, _ = plain(45, 900, 128, 3)
    if kind == "positive":
        x[30], W[600] = 1e20, 1e19
    elif kind == "negative":  # -1e39: no candidate, and yet not a number of fp32
        x[30], W[600] = 1e20, -1e18
    elif kind == "bias":
        W[600], x[30], b[600] = 1e18, 1e18, 3.4e38
    elif kind == "coarse":
        x, W, b, k, _ = *coarse(25, 40)[:2], None, 4, None
        x[30, 6], W[600, 6] = 1e20, 1e19
    elif kind == "running-sum":  # the value is -1e37, but lane 0 of the dot product overflows
        x[30], W[600] = 0, 0
        x[30, [0, 64, 1]], W[600, [0, 64, 1]] = 1e19, torch.tensor([3e19, 3e19, -6.1e19])
    return Case(x, W, b, k)


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
