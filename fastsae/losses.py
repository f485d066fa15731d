"""Losses beside the squared error: AuxK in its published variants, and nested prefixes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from fastsae import ops
from fastsae.codes import Codes

if TYPE_CHECKING:
    from fastsae.sharding import Shards

AuxK = Literal["dictionary_learning", "openai", "bussmann", "sparsify", "saelens"]
AUXK: tuple[str, ...] = get_args(AuxK)
KEEPS_NEGATIVE = ("saelens",)
"""Variants without a ReLU on what dead latents reconstruct with."""

ErrorOf = Callable[[Codes, Tensor | None, Tensor], tuple[Tensor, Tensor, Tensor | None]]
"""(codes, b_dec, target) → Σ‖x̂ - target‖², x̂ - target, and x̂ or None."""


def auxk(
    variant: AuxK,
    error_of: ErrorOf,
    codes: Codes,
    b_dec: Tensor,
    y: Tensor,
    sse: Tensor,
    error: Tensor,
    share: float,
    backend: str | None,
    shards: Shards | None = None,
) -> Tensor:
    """How badly dead latents reconstruct e = y - x̂, what the live ones left (Gao et al. 2024).

    codes hold the k_aux largest pre-activations among dead latents, of positive ones but for the
    variants in KEEPS_NEGATIVE; ê is what they decode to, y (N, D_out) the target, error = -e with
    Σ‖e‖² = sse. The published codes differ:

        dictionary_learning  ‖e - ê‖² / ‖e - ē‖² over the batch, ē its mean, e constant (default)
        openai               the same value; b_dec is in ê and, held constant, in e
        bussmann             mean over tokens and width of (e - ê)², e not held constant
        sparsify             ‖e - ê - b_dec‖² / ‖y - ȳ‖² · share, share = min(n_dead / k_aux, 1)
        saelens              mean over tokens and width of (e - ê - b_dec)², times share

    A quotient is 0 where its divisor is 0 up to rounding (one token, or equal ones).
    """
    n_elements = max(error.numel(), 1)
    if variant == "bussmann":
        return error_of(codes, None, -error)[0] / n_elements
    error, sse = error.detach(), sse.detach()
    if variant == "sparsify":
        y = y.detach()
        variance = _variance(y, y.square().sum(), backend, shards)
        return share * error_of(codes, b_dec, -error)[0] / variance
    if variant == "saelens":
        return share * error_of(codes, b_dec, -error)[0] / n_elements
    if variant == "openai":
        aux = error_of(codes, b_dec, b_dec.detach() - error)[0]
    else:
        aux = error_of(codes, None, -error)[0]
    return aux / _variance(error, sse, backend, shards)


def _variance(
    rows: Tensor, square_sum: Tensor, backend: str | None, shards: Shards | None
) -> Tensor:
    """Σ‖row - their mean‖²; inf, which leaves no NaN in a gradient, where that is rounding.

    Of ranks with other tokens the mean is that of all tokens, and the sum their mean one.
    """
    mean = ops.column_sum(rows, backend=backend) / max(len(rows), 1)
    if shards is not None:
        mean, square_sum = shards.mean(mean), shards.mean(square_sum)
    variance = square_sum - len(rows) * (mean * mean).sum()
    return variance.where(variance > 1e-5 * square_sum, torch.inf)


def nested_error(
    error_of: ErrorOf, parts: list[tuple[float, Codes]], b_dec: Tensor, y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Σ_g weight_g·‖x̂_g - y‖², with x̂_g decoded from the first g parts; ‖x̂ - y‖² and x̂ - y of all.

    One decode of every pair: a part's target is what the parts before it left.
    """
    total, bias, target = y.new_zeros(()), b_dec, y
    for weight, codes in parts:
        sse, error, _ = error_of(codes, bias, target)
        total = total + weight * sse
        bias, target = None, -error  # type: ignore[assignment]
    return total, sse, error
