"""Decode: reconstructions of codes, their squared error, and dot products at stored pairs."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fastsae.ops.backend import check, kernel_of, resolve, wide_dtype
from fastsae.ops.gradients import column_sum_op, row_gradients_op, undense_gradient


@torch.library.custom_op("fastsae::decode", mutates_args=())
def decode_op(
    vals: Tensor,
    idx: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    row_ptr: Tensor | None,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    options: dict[str, Any] = {} if row_ptr is None else {"row_ptr": row_ptr}
    if dtype != W_dec.dtype:
        options["dtype"] = dtype
    return kernel_of(backend, "decode", "decode_fwd")(vals, idx, W_dec, b_dec, **options)


@decode_op.register_fake
def _(vals, idx, W_dec, b_dec, row_ptr, dtype, backend):
    n_tokens = idx.shape[0] if row_ptr is None else row_ptr.shape[0] - 1
    return W_dec.new_empty(n_tokens, W_dec.shape[1], dtype=dtype)


@torch.library.custom_op("fastsae::decode_bwd_vals", mutates_args=())
def decode_bwd_vals_op(
    g: Tensor, idx: Tensor, W_dec: Tensor, row_ptr: Tensor | None, backend: str
) -> Tensor:
    rows = {} if row_ptr is None else {"row_ptr": row_ptr}
    return kernel_of(backend, "decode", "decode_bwd_vals")(g, idx, W_dec, **rows)


@decode_bwd_vals_op.register_fake
def _(g, idx, W_dec, row_ptr, backend):
    return W_dec.new_empty(idx.shape, dtype=wide_dtype(W_dec.dtype))


@torch.library.custom_op("fastsae::decode_error", mutates_args=())
def decode_error_op(
    vals: Tensor,
    idx: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    target: Tensor,
    row_ptr: Tensor | None,
    reconstruct: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernel = kernel_of(backend, "decode_error", "decode_error")
    return kernel(vals, idx, W_dec, b_dec, target, row_ptr, reconstruct)


@decode_error_op.register_fake
def _(vals, idx, W_dec, b_dec, target, row_ptr, reconstruct, backend):
    error = W_dec.new_empty(target.shape, dtype=wide_dtype(W_dec.dtype))
    reconstruction = error.new_empty(target.shape[0] if reconstruct else 0, target.shape[1])
    return error.new_empty(()), error, reconstruction, error.new_empty(idx.shape)


class DecodeFunction(Function):
    @staticmethod
    def forward(ctx, vals, idx, W_dec, b_dec, row_ptr, dtype, backend):
        ctx.save_for_backward(vals, idx, W_dec, row_ptr)
        ctx.dtypes = vals.dtype, None if b_dec is None else b_dec.dtype
        ctx.backend = backend
        return decode_op(vals, idx, W_dec, b_dec, row_ptr, dtype, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        vals, idx, W_dec, row_ptr = ctx.saved_tensors
        return *_decode_gradients(ctx, vals, idx, W_dec, row_ptr, g), None, None, None


def _decode_gradients(ctx, vals, idx, W_dec, row_ptr, g, dvals=None, scale=None):
    """Gradients of vals, idx (none), W_dec and b_dec for scale·g; dvals: those of g, if known.

    The scalar is applied to the small side of every product.
    """
    need_vals, _, need_W, need_b = ctx.needs_input_grad[:4]
    dW = db = None
    g = g.contiguous()
    if need_vals:
        dvals = decode_bwd_vals_op(g, idx, W_dec, row_ptr, ctx.backend) if dvals is None else dvals
        dvals = (dvals if scale is None else dvals * scale).to(ctx.dtypes[0])
    if need_W:
        coef = vals if scale is None else vals * scale
        done, dW = undense_gradient(W_dec, coef, idx, g, row_ptr, ctx.backend)
        if not done:
            dtype = W_dec.dtype
            dW = row_gradients_op(coef, idx, g, len(W_dec), row_ptr, dtype, True, ctx.backend)[0]
    if need_b:
        db = column_sum_op(g, None, ctx.backend)
        db = (db if scale is None else db * scale).to(ctx.dtypes[1])
    return dvals if need_vals else None, None, dW, db


class ErrorFunction(Function):
    @staticmethod
    def forward(ctx, vals, idx, W_dec, b_dec, target, row_ptr, reconstruct, backend):
        sse, error, reconstruction, dvals = decode_error_op(
            vals, idx, W_dec, b_dec, target, row_ptr, reconstruct, backend
        )
        ctx.save_for_backward(vals, idx, W_dec, row_ptr, error, dvals)
        ctx.dtypes = vals.dtype, None if b_dec is None else b_dec.dtype, target.dtype
        ctx.reconstruct, ctx.backend = reconstruct, backend
        ctx.set_materialize_grads(False)
        return sse, error, reconstruction

    @staticmethod
    @once_differentiable
    def backward(ctx, dsse, derror, dreconstruction):
        vals, idx, W_dec, row_ptr, error, dvals = ctx.saved_tensors
        if not ctx.reconstruct:  # torch.compile makes up a gradient even for an empty output
            dreconstruction = None
        need_target = ctx.needs_input_grad[4]
        dtarget = None
        if derror is None and dreconstruction is None:
            if dsse is None:
                return (None,) * 8
            scale = 2 * dsse
            grads = _decode_gradients(ctx, vals, idx, W_dec, row_ptr, error, dvals, scale)
            dtarget = -scale * error if need_target else None
        else:
            g = torch.zeros_like(error) if dsse is None else 2 * dsse * error
            g = g if derror is None else g + derror
            dtarget = -g if need_target else None
            g = g if dreconstruction is None else g + dreconstruction
            grads = _decode_gradients(ctx, vals, idx, W_dec, row_ptr, g)
        dtarget = None if dtarget is None else dtarget.to(ctx.dtypes[2])
        return *grads, dtarget, None, None, None


def _check_codes(
    vals: Tensor, idx: Tensor, row_ptr: Tensor | None, W_dec: Tensor, b_dec: Tensor | None
) -> None:
    check(W_dec, "W_dec", (None, None))
    check(b_dec, "b_dec", (W_dec.shape[1],))
    if idx.dtype != torch.int32:
        raise TypeError(f"idx: expected torch.int32, got {idx.dtype}")
    if idx.ndim != (2 if row_ptr is None else 1):
        raise ValueError(
            "idx: expected (N, K), or (nnz) with row_ptr, got shape " + str(tuple(idx.shape))
        )
    check(vals, "vals", tuple(idx.shape))


def decode(
    vals: Tensor,
    idx: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None = None,
    *,
    row_ptr: Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """x̂ = b_dec + Σ vals·W_dec[idx] a token: (N, D), summed in fp32 or wider.

    The result has W_dec's dtype, or `dtype`: float32 or wider, or W_dec's.

    vals and idx (int32, -1 pads) are (N, K), or (nnz) with row_ptr (N+1, int64). W_dec (F, D),
    b_dec (D). Differentiable in vals (also where a value is 0), W_dec and b_dec. IndexError for ids
    beyond F.
    """
    _check_codes(vals, idx, row_ptr, W_dec, b_dec)
    backend = resolve(backend, W_dec, b_dec)
    vals = vals.to(wide_dtype(W_dec.dtype))
    return DecodeFunction.apply(
        vals.contiguous(), idx.contiguous(), W_dec, b_dec, row_ptr, dtype or W_dec.dtype, backend
    )


def pair_dots(
    g: Tensor,
    idx: Tensor,
    W_dec: Tensor,
    row_ptr: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """<g[n], W_dec[idx]> of each pair, in idx's shape, 0 for padding; g (N, D). A constant."""
    check(W_dec, "W_dec", (None, None))
    n_tokens = len(idx) if row_ptr is None else len(row_ptr) - 1
    check(g, "g", (n_tokens, W_dec.shape[1]))
    backend = resolve(backend, g, W_dec)
    return decode_bwd_vals_op(g.detach(), idx, W_dec.detach(), row_ptr, backend)


def reconstruction_error(
    vals: Tensor,
    idx: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    target: Tensor,
    *,
    row_ptr: Tensor | None = None,
    reconstruct: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Decode and its squared error in one pass: Σ‖x̂ - target‖² (0-d), x̂ - target and x̂ (N, D).

    As `decode`, and target (N, D). The sum is over the batch and the width, in a fixed order.
    Everything returned is differentiable in vals, W_dec, b_dec and target; float32 or float64.
    """
    _check_codes(vals, idx, row_ptr, W_dec, b_dec)
    n_tokens = len(idx) if row_ptr is None else len(row_ptr) - 1
    check(target, "target", (n_tokens, W_dec.shape[1]))
    backend = resolve(backend, W_dec, b_dec, target)
    vals = vals.to(wide_dtype(W_dec.dtype)).contiguous()
    sse, error, reconstruction = ErrorFunction.apply(
        vals, idx.contiguous(), W_dec, b_dec, target, row_ptr, reconstruct, backend
    )
    return sse, error, reconstruction if reconstruct else None
