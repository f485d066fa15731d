"""Metrics against their formulas, and their independence of batches, offsets and threads."""

import numpy as np
import pytest
import torch

from fastsae.data import in_order, open_source, split
from fastsae.metrics import FVU, dead_share, frequency_histogram, fvu, l0, pca_fvu


def rows(n: int, d: int, seed: int = 0) -> torch.Tensor:
    """Anisotropic rows away from the origin, float32 [n, d]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator)
    return x * torch.linspace(0.1, 3, d) + torch.linspace(-5, 5, d)


def sixteenths(x: torch.Tensor) -> torch.Tensor:
    """x rounded to multiples of 2⁻⁴, float64, so that adding 2⁴⁰ loses none of its bits."""
    return (x * 16).round().double() / 16


def plain_fvu(x: torch.Tensor, x_hat: torch.Tensor) -> float:
    x, x_hat = x.double(), x_hat.double()
    return float(((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum())


def test_fvu_is_its_formula() -> None:
    x, x_hat = rows(300, 7), rows(300, 7, seed=1)
    assert fvu(x, x_hat) == pytest.approx(plain_fvu(x, x_hat), rel=1e-12)


def test_fvu_by_hand() -> None:
    x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]])
    x_hat = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 1.0]])
    total = FVU()
    total.update(x, x_hat)
    assert total.value == 1 / 8
    assert total.explained_variance == 7 / 8


def test_fvu_of_perfect_and_of_mean() -> None:
    x = rows(300, 7)
    assert fvu(x, x) == 0
    mean = x.double().mean(0).expand(300, 7)
    assert fvu(x, mean) == pytest.approx(1, rel=1e-12)
    assert fvu(x, torch.zeros_like(x)) > 2


@pytest.mark.parametrize("batch_size", [1, 3, 64, 999])
@pytest.mark.parametrize("offset", [0.0, 1e6, 1e8])
@pytest.mark.parametrize("first_row", [0.0, 1e4])
def test_fvu_does_not_depend_on_batches(batch_size: int, offset: float, first_row: float) -> None:
    x = rows(1000, 7).double() + offset
    x[0] += first_row
    x_hat = x + rows(1000, 7, seed=1).double()
    total = FVU()
    for batch, batch_hat in zip(x.split(batch_size), x_hat.split(batch_size), strict=True):
        total.update(batch, batch_hat)
    assert total.value == pytest.approx(fvu(x, x_hat), rel=1e-12)


def test_fvu_is_exact_far_from_the_origin() -> None:
    x, error = sixteenths(rows(500, 7)), sixteenths(rows(500, 7, seed=1))
    near, far = fvu(x, x + error), FVU()
    for batch, batch_error in zip((x + 2.0**40).split(13), error.split(13), strict=True):
        far.update(batch, batch + batch_error)
    assert far.value == pytest.approx(near, rel=1e-12)


def test_fvu_does_not_depend_on_threads() -> None:
    x, x_hat = rows(3000, 64), rows(3000, 64, seed=1)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(fvu(x, x_hat))
    finally:
        torch.set_num_threads(threads)
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_fvu_takes_any_float_tensor_and_arrays(dtype: torch.dtype) -> None:
    x, x_hat = rows(50, 4).to(dtype), rows(50, 4, seed=1).to(dtype).requires_grad_()
    expected = plain_fvu(x, x_hat.detach())
    assert fvu(x, x_hat) == pytest.approx(expected, rel=1e-12)
    assert fvu(x.double().numpy(), x_hat) == pytest.approx(expected, rel=1e-12)


def test_fvu_leaves_its_inputs_alone() -> None:
    x, x_hat = rows(50, 4).double().numpy(), rows(50, 4, seed=1).double().numpy()
    before = x.copy(), x_hat.copy()
    total = FVU()
    total.update(x, x_hat)
    total.update(x, x_hat)
    assert np.array_equal(x, before[0])
    assert np.array_equal(x_hat, before[1])


def test_fvu_keeps_a_bad_reconstruction_visible() -> None:
    x = rows(50, 4)
    for bad in (float("nan"), float("inf")):
        x_hat = x.clone()
        x_hat[7, 2] = bad
        assert not np.isfinite(fvu(x, x_hat))


def test_fvu_without_variance_is_nan_and_without_rows_an_error() -> None:
    assert np.isnan(fvu(torch.ones(3, 2), torch.zeros(3, 2)))
    with pytest.raises(ValueError, match="at least one row"):
        _ = FVU().value
    total = FVU()
    total.update(torch.zeros(0, 2), torch.zeros(0, 2))
    with pytest.raises(ValueError, match="at least one row"):
        _ = total.value


def test_fvu_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"of shape \[3, 2\], got \[2, 2\]"):
        fvu(torch.zeros(3, 2), torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"got shape \[3\]"):
        fvu(torch.zeros(3), torch.zeros(3))
    total = FVU()
    total.update(torch.zeros(3, 2), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="expected rows of width 2, got 1"):
        total.update(torch.zeros(3, 1), torch.zeros(3, 1))


# PCA


@pytest.mark.parametrize("n_components", [0, 1, 5, 11, 12])
def test_pca_fvu_is_that_of_a_singular_value_decomposition(n_components: int) -> None:
    train, test = (
        rows(400, 12),
        rows(100, 12, seed=1) @ torch.randn(12, 12, generator=torch.Generator().manual_seed(2)),
    )
    mean = train.double().mean(0)
    basis = torch.linalg.svd(train.double() - mean, full_matrices=False)[2][:n_components]
    x_hat = mean + (test.double() - mean) @ basis.T @ basis
    expected = plain_fvu(test, x_hat)
    assert pca_fvu(train, test, n_components) == pytest.approx(expected, rel=1e-10, abs=1e-24)


def test_pca_fvu_does_not_depend_on_blocks_or_offset() -> None:
    train, test = sixteenths(rows(400, 12)), sixteenths(rows(100, 12, seed=1))
    expected = pca_fvu(train, test, 4)
    assert pca_fvu(train.split(7), test.split(9), 4) == pytest.approx(expected, rel=1e-12)
    far = pca_fvu((block + 2.0**40 for block in train.split(7)), test + 2.0**40, 4)
    assert far == pytest.approx(expected, rel=1e-12)


def test_pca_fvu_of_the_minilm_sample() -> None:
    train, holdout = split(open_source("sample:minilm_l3"), 2048)
    blocks = [(batch.x for batch in in_order(part, 4096)) for part in (train, holdout)]
    assert pca_fvu(blocks[0], blocks[1], 32) == pytest.approx(0.545, abs=0.01)


def test_pca_fvu_refuses_bad_arguments() -> None:
    x = rows(20, 4)
    with pytest.raises(ValueError, match=r"n_components in \[0, 4\], got 5"):
        pca_fvu(x, x, 5)
    with pytest.raises(ValueError, match="test rows of width 4, got 3"):
        pca_fvu(x, x[:, :3], 2)
    with pytest.raises(ValueError, match="at least one train row"):
        pca_fvu([], x, 2)
    with pytest.raises(ValueError, match="at least one row"):
        pca_fvu(x, [], 2)


# Firing counts


def test_dead_share_and_l0_by_hand() -> None:
    counts = torch.tensor([0, 3, 0, 1, 6], dtype=torch.int32)
    assert dead_share(counts) == 0.4
    assert l0(counts, 4) == 2.5


def test_frequency_histogram_by_hand() -> None:
    # Of 10,000,000 tokens: below 10⁻⁶, at it, just below and at 10⁻³, at 10⁻⁰·⁵ and always.
    counts = torch.tensor([0, 0, 3, 10, 9_999, 10_000, 3_162_277, 3_162_278, 10_000_000])
    found = frequency_histogram(counts, 10_000_000)
    assert found["never"] == 2
    assert found["log10"] == [-6 + 0.5 * i for i in range(13)]
    assert found["latents"] == [2, 0, 0, 0, 0, 1, 1, 0, 0, 0, 1, 2]
    rng = np.random.default_rng(0)
    counts = torch.from_numpy(rng.integers(0, 5000, 3000))
    found = frequency_histogram(counts, 5000)
    logs = np.log10(counts[counts > 0].numpy() / 5000)
    expected, _ = np.histogram(logs, found["log10"])
    assert found["latents"] == expected.tolist() and found["never"] + expected.sum() == 3000
    with pytest.raises(ValueError, match="expected n_tokens >= 1, got 0"):
        frequency_histogram(counts, 0)


def test_l0_does_not_overflow() -> None:
    counts = torch.full((3000,), 2**30, dtype=torch.int32)
    assert l0(counts, 2**30) == 3000


@pytest.mark.parametrize("counts", [torch.zeros(0, dtype=torch.int64), torch.zeros(3)])
def test_counts_are_integers_of_at_least_one_latent(counts: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected integer counts \[d_sae\]"):
        dead_share(counts)
    with pytest.raises(ValueError, match=r"expected integer counts \[d_sae\]"):
        l0(counts, 1)


def test_l0_needs_tokens() -> None:
    with pytest.raises(ValueError, match="expected n_tokens >= 1, got 0"):
        l0(torch.tensor([1]), 0)
