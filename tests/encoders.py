"""What the tests of encode, encode_batch, encode_columns and encode_threshold share: their cases.

`CASES` are hard ones by name, `problems` any; `pre_activations` and what follows from them are the
oracle, in numpy and in the order that csrc/simd.h promises.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import pytest
import torch
from common import (
    INF,
    NAN,
    VARIANTS,
    assert_bits,
    fixed_order_dot,
    fixed_order_encode,
    randint,
    randn,
)
from hypothesis import strategies as st
from torch import Tensor

# threads, block_tokens. A block of 1 is as narrow as the instruction set's registers.
WAYS = ((1, 0), (1, 100), (2, 0), (2, 1))


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


# ---- what is refused ----


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


# ---- what encode_batch, encode_columns and encode_threshold are tried with alike ----

Encode = Callable[..., object]
"""(x, W_enc, b_enc, forced=…): one of them, with the rest of its arguments."""

overflows = pytest.mark.parametrize(
    "kind", ["positive", "negative", "bias", "running-sum", "coarse"]
)
not_finite = pytest.mark.parametrize("bad", [NAN, INF, -INF], ids=str)


def problem_of(own: dict[str, Callable[[], Case]]) -> Callable[..., tuple[Case, np.ndarray]]:
    """(name, dtype) → a case, of an encoder's own or of all's, and its pre-activations."""

    @functools.cache
    def problem(name: str, dtype: torch.dtype) -> tuple[Case, np.ndarray]:
        if name not in own:
            return case_and_h(name, dtype)
        case = own[name]()
        case = case._replace(W_enc=case.W_enc.to(dtype))
        return case, pre_activations(case)

    return problem


def check_any_number_of_threads(
    encode: Encode, case: Case, expected: list[Tensor], isa: str, screen: str
) -> None:
    for count in (3, 7, 64, 1024):
        got = encode(*case[:3], forced={"isa": isa, "screen": screen, "threads": count})
        assert_all_bits(got, expected)  # type: ignore[arg-type]


def check_refuses_overflow(encode: Encode, kind: str, isa: str, screen: str) -> None:
    case = overflowing(kind)
    for count in (1, 2):
        forced = {"isa": isa, "screen": screen, "threads": count}
        with pytest.raises(ValueError, match=r"overflow at token \d+, latent 600$"):
            encode(*case[:3], forced=forced)


def check_refuses_not_finite(encode: Encode, bad: float, isa: str, screen: str) -> None:
    for name, message in (("x", "x: .* row 17$"), ("W_enc", "W_enc, b_enc: .* latent 17$")):
        case = plain(45, 29, 65, 3)
        getattr(case, name)[17, 64] = bad
        for count in (1, 2):
            forced = {"isa": isa, "screen": screen, "threads": count}
            with pytest.raises(ValueError, match=message):
                encode(*case[:3], forced=forced)
