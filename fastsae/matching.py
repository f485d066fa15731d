"""One-to-one matching of two dictionaries by cosine, exactly or with a certified gap.

Sought is the injection π of A's rows into B's with the largest Σ_i C[i, π(i)], C[i, j] = cos(A_i,
B_j), signed; a row of zeros has cosine 0 with everything.

* exact: C as a matrix, solved by scipy.
* sparse: no F×F matrix exists. Each row keeps its c largest cosines, found by the streaming encoder
  (`fastsae.ops.encode` of A's unit rows with B's as weights). An auction (`reference.auction`) on
  these candidates gives a matching and a price p_j ≥ 0 of each row of B. The prices bound what any
  matching reaches, and rows whose bound is loose get new candidates, the best at these prices: the
  encoder once more, with −p as its bias. This repeats until bound and matching are near.

The bound. Let p_j ≥ 0 and u_i ≥ 0 with u_i + p_j ≥ C[i, j] for all pairs. Then for any injection π

    Σ_i C[i, π(i)] ≤ Σ_i (u_i + p_π(i)) ≤ Σ_i u_i + Σ_j p_j,

as no j occurs twice and prices are not negative. Given the prices, the least such u_i is max(0,
max_j C[i, j] − p_j). Over the candidates of i it is a maximum of a few numbers. Any other j has
C[i, j] ≤ t_i, the least cosine kept, so u_i + p_j ≥ u_i ≥ C[i, j] wherever u_i ≥ t_i. For the rows
with u_i < t_i the encoder computes max_j C[i, j] − p_j over all j. So the bound holds for all F²
pairs, up to the rounding of the cosines (fp32 dot products of D terms: about 1e-6). It is the best
of matchings that may leave rows alone, so partners at negative cosines count as 0 in it: where many
rows have no other, in two dimensions for example, the gap stays wide.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastsae import cpu, ops, plan, reference
from fastsae.sums import unit_rows

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Method = Literal["exact", "sparse"]

EXACT_ROWS = 1 << 15
"""Up to this many rows the matching is exact unless asked otherwise."""
_BLOCK_ROWS = 1 << 14  # of A that are encoded in one call
_LEFT_ROWS = 512  # of those left over that are matched in one matrix
_ROUNDS = 10


@dataclass(frozen=True, eq=False)
class Matching:
    """Partners of A's rows among B's, each of these at most once."""

    partners: Ids
    """(F_A): the row of B; a permutation where F_A = F_B."""
    cosines: Floats
    """(F_A): of each row and its partner."""
    upper: float
    """No matching has a larger mean cosine; equal to the mean where the method is exact."""
    nearest: Floats
    """(F_A): the cosine of each row with its nearest of B, taken or not, at least 0."""

    @property
    def mean(self) -> float:
        """The mean cosine of partners."""
        return float(self.cosines.mean())

    @property
    def gap(self) -> float:
        """By how much the mean may be below the best, at most."""
        return self.upper - self.mean


def match(
    A: Tensor,
    B: Tensor,
    *,
    method: Method | None = None,
    gap: float = 0.01,
    candidates: int = 32,
    backend: str | None = None,
) -> Matching:
    """The best matching of the rows of A (F_A, D) with those of B (F_B, D), F_A ≤ F_B.

    method: "exact" needs scipy and 8·F_A·F_B bytes; "sparse" keeps `candidates` cosines a row, more
    where needed, until the mean is within `gap` of the best one's; it says by `Matching.gap` how
    far it came, and stops after ten rounds. None: exact up to EXACT_ROWS rows of B.
    ValueError: other shapes, numbers that are not finite, an unknown method. MemoryError: no room.
    """
    for name, rows in (("A", A), ("B", B)):
        if rows.ndim != 2 or not rows.is_floating_point():
            raise ValueError(
                f"{name}: expected a floating matrix (rows, width), got {rows.dtype} of shape "
                f"{tuple(rows.shape)}"
            )
    if A.shape[1] != B.shape[1]:
        raise ValueError(f"B: expected width {A.shape[1]} as A, got {B.shape[1]}")
    if not 1 <= len(A) <= len(B):
        raise ValueError(f"A: expected 1 to {len(B)} rows, as B has, got {len(A)}")
    if not 1e-5 <= gap <= 1 or candidates < 1:
        raise ValueError(f"expected gap in [1e-5, 1], candidates >= 1, got {gap}, {candidates}")
    if method is None:
        method = "exact" if len(B) <= EXACT_ROWS else "sparse"
    if method == "exact":
        return _exact(A, B)
    if method != "sparse":
        raise ValueError(f"method: expected exact or sparse, got {method!r}")
    return _sparse(unit_rows(A, "A"), unit_rows(B, "B"), gap, min(candidates, len(B)), backend)


def nearest_others(
    units: Tensor, rows: Ids, count: int, *, backend: str | None = None
) -> tuple[Floats, Ids]:
    """The `count` nearest others of some rows of units (F, D), which `unit_rows` made.

    rows [m] → cosines [m, min(count, F)], descending, equal ones by id, and their ids. Only
    cosines above 0 count: -inf pads, with any id. No m×F matrix exists.
    """
    values, columns = _best(units, units, rows, None, min(count + 1, len(units)), backend)
    values[columns == rows[:, None]] = -np.inf
    order = np.argsort(-values, axis=1, kind="stable")[:, :count]
    return np.take_along_axis(values, order, 1).clip(max=1), np.take_along_axis(columns, order, 1)


def cosine_histogram(cosines: Floats) -> list[int]:
    """How many cosines lie in each of 40 equal parts of [-1, 1]; a border belongs to the upper."""
    places = np.floor(cosines * 20 + 1e-9).astype(int) + 20
    return np.bincount(places.clip(0, 39), minlength=40).tolist()


def _exact(A: Tensor, B: Tensor) -> Matching:
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise RuntimeError(
            "an exact matching needs scipy: pip install 'fastsae-engine[consistency]', or take "
            "the method sparse"
        ) from None
    needed = 8 * len(A) * len(B)
    if needed > plan.available():
        raise MemoryError(
            f"an exact matching of {len(A)} with {len(B)} rows needs {needed} bytes, there are "
            f"{plan.available()}: expected the method sparse"
        )
    a = unit_rows(A.cpu(), "A", torch.float64).numpy()
    b = unit_rows(B.cpu(), "B", torch.float64).numpy()
    costs: Floats = a @ -b.T  # not with maximize, which makes a copy
    rows, partners = linear_sum_assignment(costs)
    matched = -costs[rows, partners]
    return Matching(partners, matched, float(matched.mean()), (-costs.min(1)).clip(0))


def _sparse(A: Tensor, B: Tensor, gap: float, c: int, backend: str | None) -> Matching:
    n, step = len(A), gap / 8
    values, columns = _best(A, B, np.arange(n), None, c, backend)
    nearest, least = values[:, 0].clip(0), values[:, -1].clip(0)
    upper = math.inf
    found = np.arange(n), np.full(n, -math.inf)
    for _ in range(_ROUNDS):
        partners, prices = _auction(values, columns, len(B), step)
        # As the encoder adds them, so that both bounds are of the same prices.
        prices = prices.astype(np.float32).astype(np.float64)
        gains = (values - prices[columns]).max(1).clip(0)
        loose = np.flatnonzero(gains < least)
        priced, new = _best(A, B, loose, prices, c, backend)
        gains[loose] = priced[:, 0].clip(0)
        upper = min(upper, float(gains.sum() + prices.sum()) / n)
        partners = _completed(A, B, partners, step)
        found = max(found, (partners, _cosines(A, B, partners)), key=lambda pair: pair[1].mean())
        if upper - found[1].mean() <= gap or not (priced > 0).any():
            break
        values, columns = _joined(values, columns, loose, priced + prices[new], new)
    return Matching(*found, max(upper, float(found[1].mean())), nearest)


def _best(
    A: Tensor, B: Tensor, rows: Ids, prices: Floats | None, c: int, backend: str | None
) -> tuple[Floats, Ids]:
    """The c largest positive C[i, j] − p_j of rows of A, descending, and their j; −inf pads."""
    bias = None if prices is None else -torch.from_numpy(prices).float().to(B.device)
    values = np.empty((len(rows), c))
    columns = np.empty((len(rows), c), np.int64)
    for first in range(0, len(rows), _BLOCK_ROWS):
        some = slice(first, first + _BLOCK_ROWS)
        x = A[torch.from_numpy(rows[some]).to(A.device)]
        vals, idx = ops.encode(x, B, bias, k=c, backend=backend)
        vals = vals.double().masked_fill(idx < 0, -torch.inf)
        values[some], columns[some] = vals.cpu().numpy(), idx.clamp(min=0).cpu().numpy()
    return values, columns


def _auction(values: Floats, columns: Ids, n_columns: int, step: float) -> tuple[Ids, Floats]:
    """`reference.auction` of arrays."""
    run = cpu.auction if cpu.available() else reference.auction
    ids = np.ascontiguousarray(columns, np.int32)
    given = torch.from_numpy(values), torch.from_numpy(ids)
    partners, prices = run(*given, n_columns, step)
    return partners.numpy(), prices.numpy()


def _completed(A: Tensor, B: Tensor, partners: Ids, step: float) -> Ids:
    """Rows without a partner get what is left: at these prices they gain nothing anywhere."""
    free = np.ones(len(B), bool)
    free[partners[partners >= 0]] = False
    alone, left = np.flatnonzero(partners < 0), np.flatnonzero(free)
    partners = partners.copy()
    blocks = max(1, len(alone) // _LEFT_ROWS)
    for rows, columns in zip(
        np.array_split(alone, blocks), np.array_split(left, blocks), strict=True
    ):
        cosines = A[torch.from_numpy(rows)] @ B[torch.from_numpy(columns)].T
        # With 2 more, any of those that nobody bids for gains something: all get one.
        values = 2 + cosines.double().cpu().numpy()
        everything = np.broadcast_to(np.arange(len(columns)), values.shape)
        partners[rows] = columns[_auction(values, everything, len(columns), step)[0]]
    return partners


def _cosines(A: Tensor, B: Tensor, partners: Ids) -> Floats:
    there = torch.from_numpy(partners).to(B.device).split(_BLOCK_ROWS)
    blocks = zip(A.split(_BLOCK_ROWS), there, strict=True)
    return torch.cat([(a.double() * B[j].double()).sum(1) for a, j in blocks]).cpu().numpy()


def _joined(values: Floats, columns: Ids, rows: Ids, more: Floats, new: Ids) -> tuple[Floats, Ids]:
    """The candidates with more of some rows."""
    shape = len(values), more.shape[1]
    values = np.concatenate([values, np.full(shape, -np.inf)], 1)
    columns = np.concatenate([columns, np.zeros(shape, np.int64)], 1)
    values[rows, -shape[1] :], columns[rows, -shape[1] :] = more, new
    return values, columns
