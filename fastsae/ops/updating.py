"""What changes parameters: unit rows, and Adam on gradient rows."""

from torch import Tensor

from fastsae.moments import Scales
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
    scales: Scales = (None, None),
    stochastic_rounding: bool = False,
    first_row: int = 0,
    backend: str | None = None,
) -> None:
    """One step of Adam on p (rows, D) or (D), in place, for the gradient dense + Σ gradients.

    project: the part of each row's gradient along the row is removed first, and the row gets norm 1
    last. The gradient is multiplied with scale after that. m (None where beta1 is 0) and v are p's
    moments, last (rows, int32) the step that last updated each row; all three are updated. step
    counts from 1. lazy: rows without a pair stay as they are; else as torch.optim.Adam, or AdamW
    with weight_decay. With backend "triton", lr, scale and step may be 0-d tensors on p's
    device, and nothing is written where scale is not finite.

    m and v: both in float32 or bfloat16, or codes in int8 and uint8 with their scales, which are
    updated too (`fastsae.moments`). stochastic_rounding: bfloat16 is rounded at random, not to
    nearest, by step, column and the row's number, counted from first_row; codes always are.
    """
    backend = resolve(backend, p, dense)
    hyper = (lr, beta1, beta2, eps, weight_decay, scale, step, lazy)
    options = {"scales": scales, "stochastic_rounding": stochastic_rounding, "first_row": first_row}
    kernel_of(backend, "adam", "adam_")(p, dense, gradients, project, m, v, last, *hyper, **options)
