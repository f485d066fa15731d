"""Metrics: pure functions of tensors and counts, one definition per name.

All arithmetic is NumPy in float64 on the CPU, in a fixed order: unlike ``torch.sum``, no result
depends on the number of torch's threads. ("Explained variance" has several definitions in the
literature that differ in the third digit; here it is 1 - FVU, nothing else.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

Rows = Tensor | npt.NDArray[Any]  # [n_tokens, width], any float dtype
_Float64 = npt.NDArray[np.float64]

_BLOCK_ROWS = 4096


class _Moments:
    """Count, mean and centred second moment of rows that arrive in blocks.

    Every row is first shifted by the first row ever seen, then blocks are merged by Chan, Golub and
    LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
    Both matter: without the shift, the mean itself would be rounded at the size of the data's
    offset, and data far from the origin would lose the digits of its variance.
    """

    def __init__(self, full: bool) -> None:
        self.n_rows = 0
        self.scatter: Any = 0.0  # Σ (x-x̄)(x-x̄)ᵀ [D, D] if full, else its trace Σ‖x-x̄‖²
        self._full = full
        self._shift: _Float64
        self._mean: _Float64  # of the shifted rows

    def update(self, x: _Float64) -> None:
        if len(x) == 0:
            return
        if self.n_rows == 0:
            self._shift, self._mean = x[0].copy(), np.zeros(x.shape[1])
        elif x.shape[1] != len(self._shift):
            raise ValueError(f"expected rows of width {len(self._shift)}, got {x.shape[1]}")
        x = x - self._shift
        mean = x.mean(axis=0)
        x -= mean
        delta = mean - self._mean
        total = self.n_rows + len(x)
        weight = self.n_rows * len(x) / total
        if self._full:
            self.scatter = self.scatter + (x.T @ x + weight * np.outer(delta, delta))
        else:
            self.scatter += np.square(x).sum() + weight * np.square(delta).sum()
        self._mean += delta * (len(x) / total)
        self.n_rows = total

    def centre(self, x: _Float64) -> _Float64:
        """x - x̄ without rounding x̄ at the size of the shift."""
        return (x - self._shift) - self._mean


class FVU:
    """Fraction of variance unexplained over an evaluated set, fed in batches.

        FVU = Σ_n ‖x_n - x̂_n‖² / Σ_n ‖x_n - x̄‖²,  x̄ = mean of the same x_n

    0 is a perfect reconstruction, 1 that of predicting the mean. For a transcoder, x is the target.
    Does not depend on how the set was cut into batches (relative 1e-12). Definition: that of
    EleutherAI's sparsify, with x̄ over the whole evaluated set rather than over each batch.
    """

    def __init__(self) -> None:
        self._total = _Moments(full=False)
        self._error = 0.0

    def update(self, x: Rows, x_hat: Rows) -> None:
        """Add rows x and their reconstructions, both [N, D]. ValueError: any other shapes."""
        x64, x_hat64 = _float64(x), _float64(x_hat)
        if x64.shape != x_hat64.shape:
            raise ValueError(
                f"expected a reconstruction of shape {list(x64.shape)}, got {list(x_hat64.shape)}"
            )
        self._total.update(x64)
        self._error += float(np.square(x64 - x_hat64).sum())

    @property
    def value(self) -> float:
        """FVU so far; NaN where the rows are all equal. ValueError: no row yet."""
        if self._total.n_rows == 0:
            raise ValueError("expected at least one row to evaluate, got none")
        return self._error / self.variance if self.variance > 0 else float("nan")

    @property
    def variance(self) -> float:
        """Σ‖x_n - x̄‖² so far, the denominator."""
        return float(self._total.scatter)

    @property
    def explained_variance(self) -> float:
        """1 - FVU."""
        return 1.0 - self.value


def fvu(x: Rows, x_hat: Rows) -> float:
    """FVU of reconstructions x_hat of the rows x, both [N, D]: see ``FVU``."""
    total = FVU()
    total.update(x, x_hat)
    return total.value


def pca_fvu(train: Rows | Iterable[Rows], test: Rows | Iterable[Rows], n_components: int) -> float:
    """FVU of the test rows rebuilt from the top principal components of the train rows.

        x̂ = m + V Vᵀ (x - m),  m and V [D, n_components]: mean and leading eigenvectors of train

    The linear baseline of an SAE with k = n_components. ``train`` and ``test`` are matrices [N, D]
    or iterables of them (for data larger than memory); each is passed over once. Memory: a few
    D x D float64 matrices and a block. ValueError: no rows, unequal widths, or n_components not in
    [0, D].
    """
    moments = _Moments(full=True)
    for block in _blocks(train):
        moments.update(block)
    if moments.n_rows == 0:
        raise ValueError("expected at least one train row, got none")
    width = len(moments.scatter)
    if not 0 <= n_components <= width:
        raise ValueError(f"expected n_components in [0, {width}], got {n_components}")
    vectors: _Float64 = np.linalg.eigh(moments.scatter)[1][:, width - n_components :]
    total = FVU()
    for block in _blocks(test):
        if block.shape[1] != width:
            raise ValueError(f"expected test rows of width {width}, got {block.shape[1]}")
        centred = moments.centre(block)
        total.update(centred, (centred @ vectors) @ vectors.T)
    return total.value


def dead_share(firing_counts: Tensor) -> float:
    """Share of latents that never fired: #{i: count_i = 0} / F, of counts [d_sae] over a pass."""
    _check_counts(firing_counts)
    return int((firing_counts == 0).sum()) / len(firing_counts)


def frequency_histogram(firing_counts: Tensor, n_tokens: int) -> dict[str, Any]:
    """How many latents fire how often, of counts [d_sae] over N tokens.

    "never": latents that do not; "latents": of the others, how many have a log10 of count / N in
    each interval between two of "log10" (−6 to 0 by halves; below −6 with the lowest).
    """
    _check_counts(firing_counts)
    if n_tokens < 1:
        raise ValueError(f"expected n_tokens >= 1, got {n_tokens}")
    counts = firing_counts.cpu().numpy().astype(np.int64)
    edges = np.arange(-12, 1) / 2
    # From the edges to counts, not back: the logarithm of an edge may be rounded to either side.
    places = np.searchsorted(n_tokens * 10.0 ** edges[1:-1], counts[counts > 0], side="right")
    latents = np.bincount(places, minlength=len(edges) - 1)
    never = int((counts == 0).sum())
    return {"never": never, "log10": edges.tolist(), "latents": latents.tolist()}


def l0(firing_counts: Tensor, n_tokens: int) -> float:
    """Mean number of active latents per token, Σ_i count_i / N, of counts [d_sae] over N tokens."""
    _check_counts(firing_counts)
    if n_tokens < 1:
        raise ValueError(f"expected n_tokens >= 1, got {n_tokens}")
    return int(firing_counts.sum()) / n_tokens


def _check_counts(counts: Tensor) -> None:
    if counts.is_floating_point() or counts.ndim != 1 or len(counts) == 0:
        raise ValueError(
            f"expected integer counts [d_sae], got {counts.dtype} {list(counts.shape)}"
        )


def _float64(x: Rows) -> _Float64:
    array: _Float64
    if isinstance(x, Tensor):
        array = x.detach().cpu().double().numpy()
    else:
        array = x.astype(np.float64, copy=False)
    if array.ndim != 2:
        raise ValueError(f"expected rows [n_tokens, width], got shape {list(array.shape)}")
    return array


def _blocks(rows: Rows | Iterable[Rows]) -> Iterator[_Float64]:
    if isinstance(rows, Tensor | np.ndarray):
        rows = [rows[i : i + _BLOCK_ROWS] for i in range(0, len(rows), _BLOCK_ROWS)]
    for block in rows:
        yield _float64(block)
