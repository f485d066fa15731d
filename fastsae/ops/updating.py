"""What changes parameters: unit rows, and Adam on gradient rows."""

from torch import Tensor

from fastsae.ops.backend import check, kernel_of, resolve
from fastsae.ops.gradients import RowGradient


def project_rows_(grad: Tensor, W_dec: Tensor, *, backend: str | None = None) -> None:
    """Removes from each row of grad (F, D) its part along the same row of W_dec, in place."""
    check(W_dec, "W_dec", (None, None))
    check(grad, "grad", tuple(W_dec.shape))
    kernel_of(resolve(backend, grad, W_dec), "unit_rows", "project_rows_")(grad, W_dec)


def normalize_rows_(W_dec: Tensor, *, backend: str | None = None) -> None:
    """Scales each row of W_dec (F, D) to norm 1, in place; a row of zeros stays."""
    check(W_dec, "W_dec", (None, None))
    kernel_of(resolve(backend, W_dec), "unit_rows", "normalize_rows_")(W_dec)


def inverse_index(
    idx: Tensor, n_latents: int, row_ptr: Tensor | None = None, *, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """For each latent its pairs, as :func:`fastsae.reference.inverse_index`.

    idx is that of `decode`, int32. On backends "cpu" and "triton", token and entry may end in room
    that is not used.
    """
    return kernel_of(backend, "index", "inverse_index")(idx, n_latents, row_ptr)


def gradient_square_norm(
    p: Tensor,
    dense: Tensor | None,
    gradients: list[RowGradient],
    project: bool,
    *,
    backend: str | None = None,
) -> float | Tensor:
    """‖g‖² of the gradient that `adam_` would apply to p; on backend "triton" a 0-d tensor."""
    backend = resolve(backend, p, dense)
    return kernel_of(backend, "gradients", "gradient_square_norm")(p, dense, gradients, project)


def adam_(
    p: Tensor,
    dense: Tensor | None,
    gradients: list[RowGradient],
    project: bool,
    *,
    m: Tensor | None,
    v: Tensor,
    last: Tensor,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    scale: float | Tensor,
    step: int | Tensor,
    lazy: bool,
    stochastic_rounding: bool = False,
    backend: str | None = None,
) -> None:
    """One step of Adam on p (rows, D) or (D), in place, for the gradient dense + Σ gradients.

    project: the part of each row's gradient along the row is removed first, and the row gets norm 1
    last. The gradient is multiplied with scale after that. m (None where beta1 is 0) and v are p's
    moments, last (rows, int32) the step that last updated each row; all three are updated. step
    counts from 1. lazy: rows without a pair stay as they are; else as torch.optim.Adam, or AdamW
    with weight_decay. With backend "triton", lr, scale and step may be 0-d tensors on p's
    device, nothing is written where scale is not finite, and stochastic_rounding says how bfloat16
    is rounded.
    """
    backend = resolve(backend, p, dense)
    hyper = (lr, beta1, beta2, eps, weight_decay, scale, step, lazy)
    if stochastic_rounding and backend != "triton":
        raise ValueError(f"stochastic_rounding: expected backend 'triton', got {backend!r}")
    options = {"stochastic_rounding": True} if stochastic_rounding else {}
    kernel_of(backend, "adam", "adam_")(p, dense, gradients, project, m, v, last, *hyper, **options)
