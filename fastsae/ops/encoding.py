"""Encode: the selected values of each token, under a budget for tokens, batch, latents, or none."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fastsae.ops.backend import PRECISIONS, Precision, check, kernel_of, resolve, wide_dtype
from fastsae.ops.decoding import decode_op
from fastsae.ops.gradients import column_sum_op, row_gradients_op, undense_gradient


@torch.library.custom_op("fastsae::encode", mutates_args=())
def encode_op(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    k: int,
    latents: Tensor | None,
    scale: Tensor | None,
    absolute: bool,
    guide: Tensor | None,
    W_dec: Tensor | None,
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    given = {"scale": scale, "absolute": absolute or None, "guide": guide, "W_dec": W_dec}
    options = {name: value for name, value in given.items() if value is not None}
    return kernel_of(backend, "encode", "encode")(x, W_enc, b_enc, k, latents, precision, **options)


def _empty_vals(x: Tensor, W_enc: Tensor, *shape: Any) -> Tensor:
    return x.new_empty(*shape, dtype=wide_dtype(torch.promote_types(x.dtype, W_enc.dtype)))


@encode_op.register_fake
def _(x, W_enc, b_enc, k, latents, scale, absolute, guide, W_dec, precision, backend):
    vals = _empty_vals(x, W_enc, x.shape[0], k)
    return vals, vals.new_empty(x.shape[0], k, dtype=torch.int32)


@torch.library.custom_op("fastsae::encode_groups", mutates_args=())
def encode_groups_op(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, groups: int, precision: str, backend: str
) -> tuple[Tensor, Tensor]:
    encode, width = kernel_of(backend, "encode", "encode"), len(W_enc) // groups
    found = []
    for first in range(0, len(W_enc), width):
        some = slice(first, first + width)
        b = None if b_enc is None else b_enc[some]
        vals, idx = encode(x, W_enc[some], b, 1, None, precision)
        found.append((vals, torch.where(idx < 0, idx, idx + first)))
    vals, order = torch.cat([v for v, _ in found], 1).sort(dim=1, descending=True, stable=True)
    return vals, torch.cat([i for _, i in found], 1).gather(1, order)


@encode_groups_op.register_fake
def _(x, W_enc, b_enc, groups, precision, backend):
    vals = _empty_vals(x, W_enc, x.shape[0], groups)
    return vals, vals.new_empty(x.shape[0], groups, dtype=torch.int32)


def _empty_rows(x: Tensor, W_enc: Tensor, room: Any) -> tuple[Tensor, Tensor, Tensor]:
    vals = _empty_vals(x, W_enc, room)
    row_ptr = vals.new_empty(x.shape[0] + 1, dtype=torch.int64)
    return vals, vals.new_empty(room, dtype=torch.int32), row_ptr


@torch.library.custom_op("fastsae::encode_batch", mutates_args=())
def encode_batch_op(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    budget: int,
    scale: Tensor | None,
    absolute: bool,
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = kernel_of(backend, "encode_batch", "encode_batch")
    return kernel(x, W_enc, b_enc, budget, precision, scale=scale, absolute=absolute)


@encode_batch_op.register_fake
def _(x, W_enc, b_enc, budget, scale, absolute, precision, backend):
    return _empty_rows(x, W_enc, min(budget, x.shape[0] * W_enc.shape[0]))


@torch.library.custom_op("fastsae::encode_columns", mutates_args=())
def encode_columns_op(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    budgets: Tensor,
    room: int,
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = kernel_of(backend, "encode_columns", "encode_columns")
    return kernel(x, W_enc, b_enc, budgets, room, precision)


@encode_columns_op.register_fake
def _(x, W_enc, b_enc, budgets, room, precision, backend):
    return _empty_rows(x, W_enc, room)


@torch.library.custom_op("fastsae::encode_threshold", mutates_args=())
def encode_threshold_op(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    thresholds: Tensor,
    limit: int | None,
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = kernel_of(backend, "encode_threshold", "encode_threshold")
    return kernel(x, W_enc, b_enc, thresholds, limit, precision)


@encode_threshold_op.register_fake
def _(x, W_enc, b_enc, thresholds, limit, precision, backend):
    return _empty_rows(x, W_enc, torch.library.get_ctx().new_dynamic_size())


Agree = Callable[..., tuple[Tensor, ...]]
"""What was selected → the same with padding for pairs that are not kept (`fastsae.sharding`)."""


class EncodeFunction(Function):
    """The values of the pairs that `select`, a custom op with its arguments, chooses.

    agree: makes padding of some of them, or None.
    """

    @staticmethod
    def forward(ctx, x, W_enc, b_enc, pre_bias, backend, agree, select, *arguments):
        xc = x.to(wide_dtype(x.dtype))
        xc = xc if pre_bias is None else xc - pre_bias
        vals, idx, *row_ptr = select(xc, W_enc, b_enc, *arguments, backend)
        if agree is not None:
            vals, idx, *row_ptr = agree(vals, idx, *row_ptr)
        ctx.save_for_backward(xc, W_enc, idx, *row_ptr)
        ctx.dtypes = x.dtype, *(None if t is None else t.dtype for t in (b_enc, pre_bias))
        ctx.backend, ctx.n_constants = backend, 3 + len(arguments)
        ctx.mark_non_differentiable(idx, *row_ptr)
        ctx.set_materialize_grads(False)
        return vals, idx, *row_ptr

    @staticmethod
    @once_differentiable
    def backward(ctx, dvals, *_):
        xc, W_enc, idx, *rest = ctx.saved_tensors
        row_ptr = rest[0] if rest else None
        need_x, need_W, need_b, need_pre = ctx.needs_input_grad[:4]
        dx = dW = db = dpre = None
        constants = (None,) * ctx.n_constants
        if dvals is None:
            return dx, dW, db, dpre, *constants
        dvals = dvals.contiguous()
        if need_x:
            dx = decode_op(dvals, idx, W_enc, None, row_ptr, ctx.dtypes[0], ctx.backend)
        dense_W = need_W
        if need_W:
            done, dW = undense_gradient(W_enc, dvals, idx, xc, row_ptr, ctx.backend)
            dense_W = not done
        if dense_W or need_b or need_pre:
            rows, sums = row_gradients_op(
                dvals, idx, xc, len(W_enc), row_ptr, W_enc.dtype, dense_W, ctx.backend
            )
            dW = rows if dense_W else dW
            db = sums.to(ctx.dtypes[1]) if need_b else None
            dpre = -column_sum_op(W_enc, sums, ctx.backend).to(ctx.dtypes[2]) if need_pre else None
        return dx, dW, db, dpre, *constants


def _check_encoder(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    pre_bias: Tensor | None,
    precision: str,
    scale: Tensor | None = None,
) -> None:
    check(x, "x", (None, None))
    check(W_enc, "W_enc", (None, x.shape[1]))
    check(b_enc, "b_enc", (len(W_enc),))
    check(pre_bias, "pre_bias", (x.shape[1],))
    check(scale, "scale", (len(W_enc),))
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")


def _float32(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach().float().contiguous()


def encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None = None,
    pre_bias: Tensor | None = None,
    *,
    k: int,
    latents: Tensor | None = None,
    scale: Tensor | None = None,
    absolute: bool = False,
    guide: Tensor | None = None,
    W_dec: Tensor | None = None,
    agree: Agree | None = None,
    precision: Precision = "screened",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The values h = (x - pre_bias) W_encᵀ + b_enc of each token's k largest positive scores.

    x (N, D), W_enc (F, D), b_enc (F), pre_bias (D), latents (int32, ascending ids to choose from).
    The score of a pair is h, or |h| with absolute, times scale (F, at least 0) where given, times
    1 + |<guide[n], W_dec[i]>| with guide (N, D_out) and W_dec (F, D_out); all three are constants.
    Returns vals (N, k), float32 or float64, by score descending then latent ascending, and idx (N,
    k) int32; -1 and 0 pad where fewer than k are positive. ValueError for wrong shapes and, where
    something is to be selected, for non-finite numbers.

    Exact: the values come from one fixed-order fp32 dot product, which also decides. precision says
    how the pairs worth it are found: "screened", by the fastest product whose error is bounded
    (bf16 where the CPU multiplies that, else fp32); "fp32", by an fp32 product. The results are the
    same to the bit. "bf16" is another result, that of x - pre_bias and W_enc rounded to bf16 (as
    under autocast); gradients are as without the rounding.

    agree: is given vals and idx, and returns them with padding in the place of pairs to leave out.
    """
    _check_encoder(x, W_enc, b_enc, pre_bias, precision, scale)
    if k < 0:
        raise ValueError(f"k: expected at least 0, got {k}")
    if (guide is None) != (W_dec is None):
        raise ValueError("guide: expected W_dec with it and only with it")
    if guide is not None and W_dec is not None:
        check(W_dec, "W_dec", (len(W_enc), None))
        check(guide, "guide", (len(x), W_dec.shape[1]))
    backend = resolve(backend, x, W_enc, b_enc, pre_bias, W_dec)
    scale, guide = _float32(scale), _float32(guide)
    W_dec = None if W_dec is None else W_dec.detach()
    options = (k, latents, scale, absolute, guide, W_dec, precision)
    return EncodeFunction.apply(x, W_enc, b_enc, pre_bias, backend, agree, encode_op, *options)


def encode_groups(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None = None,
    pre_bias: Tensor | None = None,
    *,
    groups: int,
    precision: Precision = "screened",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """As `encode`, of each token's largest positive value in each of `groups` runs of F / groups.

    vals and idx (N, groups), by value descending, then latent ascending; padding where no value of
    a group is positive.
    """
    _check_encoder(x, W_enc, b_enc, pre_bias, precision)
    if groups < 1 or len(W_enc) % groups:
        raise ValueError(f"groups: expected a divisor of F = {len(W_enc)}, got {groups}")
    backend = resolve(backend, x, W_enc, b_enc, pre_bias)
    options = (groups, precision)
    return EncodeFunction.apply(
        x, W_enc, b_enc, pre_bias, backend, None, encode_groups_op, *options
    )


def encode_batch(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None = None,
    pre_bias: Tensor | None = None,
    *,
    budget: int,
    scale: Tensor | None = None,
    absolute: bool = False,
    agree: Agree | None = None,
    precision: Precision = "screened",
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `encode`, of the `budget` pairs of the whole batch with the largest positive scores.

    Returns vals and idx (min(budget, N·F)) and row_ptr (N+1): token n has the entries row_ptr[n] ..
    row_ptr[n+1], by score descending then latent ascending. Equal scores are chosen by token, then
    latent, ascending. Where fewer are positive the last row ends in padding (0 and -1).
    """
    _check_encoder(x, W_enc, b_enc, pre_bias, precision, scale)
    if budget < 0:
        raise ValueError(f"budget: expected at least 0, got {budget}")
    backend = resolve(backend, x, W_enc, b_enc, pre_bias)
    options = (budget, _float32(scale), absolute, precision)
    return EncodeFunction.apply(
        x, W_enc, b_enc, pre_bias, backend, agree, encode_batch_op, *options
    )


def encode_columns(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None = None,
    pre_bias: Tensor | None = None,
    *,
    budgets: Tensor,
    room: int,
    precision: Precision = "screened",
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `encode`, of each latent's budgets[i] (F, int32) largest positive values in the batch.

    Returns vals and idx (room), and row_ptr as `encode_batch`; room is at least Σ min(budgets, N).
    Equal values of a latent are chosen by token ascending.
    """
    _check_encoder(x, W_enc, b_enc, pre_bias, precision)
    if budgets.shape != (len(W_enc),):
        raise ValueError(f"budgets: expected shape ({len(W_enc)}), got {tuple(budgets.shape)}")
    backend = resolve(backend, x, W_enc, b_enc, pre_bias)
    options = (budgets, room if len(x) else 0, precision)
    return EncodeFunction.apply(
        x, W_enc, b_enc, pre_bias, backend, None, encode_columns_op, *options
    )


def encode_threshold(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None = None,
    pre_bias: Tensor | None = None,
    *,
    thresholds: Tensor,
    limit: int | None = None,
    precision: Precision = "screened",
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `encode`, of all pairs with h > thresholds[i] (F, or 0-d for all), a constant.

    Returns vals and idx (nnz) and row_ptr as `encode_batch`; values are negative where a threshold
    is. inf shuts a latent out. TooManyPairs (fastsae.reference) where more than limit pairs pass,
    and then perhaps no ValueError for numbers that are not finite. Waits for a GPU: nnz decides
    shapes.
    """
    _check_encoder(x, W_enc, b_enc, pre_bias, precision)
    thresholds = thresholds.detach().float().expand(len(W_enc)).contiguous()
    backend = resolve(backend, x, W_enc, b_enc, pre_bias)
    options = (thresholds, limit, precision)
    return EncodeFunction.apply(
        x, W_enc, b_enc, pre_bias, backend, None, encode_threshold_op, *options
    )
