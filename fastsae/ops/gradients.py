"""Gradients of selected rows: sums over pairs, and the forms an optimiser can take them in."""

import weakref
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fastsae.ops.backend import check, kernel_of, resolve, wide_dtype


@torch.library.custom_op("fastsae::row_gradients", mutates_args=())
def row_gradients_op(
    coef: Tensor,
    idx: Tensor,
    src: Tensor,
    n_latents: int,
    row_ptr: Tensor | None,
    dtype: torch.dtype,
    need_rows: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    kernel = kernel_of(backend, "rows", "row_gradients")
    return kernel(coef, idx, src, n_latents, row_ptr, dtype, need_rows)


@row_gradients_op.register_fake
def _(coef, idx, src, n_latents, row_ptr, dtype, need_rows, backend):
    rows = src.new_empty(n_latents if need_rows else 0, src.shape[1], dtype=dtype)
    return rows, src.new_empty(n_latents, dtype=wide_dtype(src.dtype))


@torch.library.custom_op("fastsae::column_sum", mutates_args=())
def column_sum_op(m: Tensor, coef: Tensor | None, backend: str) -> Tensor:
    return kernel_of(backend, "column_sum", "column_sum")(m, coef)


@column_sum_op.register_fake
def _(m, coef, backend):
    return m.new_empty(m.shape[1], dtype=wide_dtype(m.dtype))


# ---- row gradients in other forms than a dense matrix ----


class RowGradient(NamedTuple):
    """A share of a parameter's gradient: Σ coef·src[n] over the tokens n of each of its rows."""

    coef: Tensor
    """As idx."""
    idx: Tensor
    """(N, K), or (nnz) with row_ptr; int32, -1 pads."""
    src: Tensor
    """(N, D)."""
    row_ptr: Tensor | None
    inverse: tuple[Tensor, Tensor, Tensor] | None = None
    """`inverse_index` of idx, where it is known."""


class BlockGradient(NamedTuple):
    """A share of the gradients of parameters (F, ·), made block by block where it is asked for."""

    parameters: tuple[Tensor, ...]
    rows: Callable[[int, int], tuple[Tensor, ...]]
    """(start, stop) → rows start .. stop of each parameter's gradient, from the same rows of all
    parameters as they are then."""
    block: int
    """How many rows to ask for at once."""


class RowGradientReceiver(Protocol):
    """What takes row gradients while `receiving`: `fastsae.optim.Adam`."""

    receiving: bool

    def receive(self, p: Tensor, gradient: RowGradient) -> None: ...

    def receive_blocks(self, gradient: BlockGradient) -> None: ...


class _Receiver:
    """A weak reference on a parameter, which is not copied or saved with it."""

    def __init__(self, receiver: RowGradientReceiver | None = None) -> None:
        self.reference = None if receiver is None else weakref.ref(receiver)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Receiver, ()

    def get(self) -> RowGradientReceiver | None:
        receiver = None if self.reference is None else self.reference()
        return receiver if receiver is not None and receiver.receiving else None


_RECEIVER, _SPARSE = "_fastsae_receiver", "_fastsae_sparse"


def collect_row_gradients(p: Tensor, receiver: RowGradientReceiver) -> None:
    """Backward hands p's row gradients to `receiver` while that is receiving, and not to p.grad."""
    setattr(p, _RECEIVER, _Receiver(receiver))


def set_sparse_gradient(p: Tensor, sparse: bool = True) -> None:
    """From now on p.grad is a torch.sparse_coo tensor of the touched rows, as nn.Embedding's is."""
    setattr(p, _SPARSE, sparse)


def _receiver(p: Tensor) -> RowGradientReceiver | None:
    holder: _Receiver | None = getattr(p, _RECEIVER, None)
    return None if holder is None else holder.get()


def hand_over(gradient: BlockGradient) -> bool:
    """Whether one receiver of all the parameters took the gradient; else nothing did."""
    receivers = [_receiver(p) for p in gradient.parameters]
    if not receivers or receivers[0] is None or any(r is not receivers[0] for r in receivers):
        return False
    receivers[0].receive_blocks(gradient)
    return True


def undense_gradient(
    W: Tensor, coef: Tensor, idx: Tensor, src: Tensor, row_ptr: Tensor | None, backend: str
) -> tuple[bool, Tensor | None]:
    """Whether W's gradient is wanted in another form than dense, and what to return for it then."""
    receiver = _receiver(W)
    if receiver is not None:
        receiver.receive(W, RowGradient(coef, idx, src, row_ptr))
        return True, None
    if not getattr(W, _SPARSE, False):
        return False, None
    ids = idx[idx >= 0].unique()
    place = torch.searchsorted(ids, idx).to(torch.int32).where(idx >= 0, -1)
    rows, _ = row_gradients_op(coef, place, src, len(ids), row_ptr, W.dtype, True, backend)
    return True, torch.sparse_coo_tensor(
        ids[None].long(), rows, W.shape, is_coalesced=True, check_invariants=False
    )


class LatentFunction(Function):
    """values[idx] of each pair, 0 for padding; backward sums in a fixed order."""

    @staticmethod
    def forward(ctx, values, idx, row_ptr, backend):
        ctx.save_for_backward(idx, row_ptr)
        ctx.like, ctx.backend = (len(values), values.dtype), backend
        return values[idx.clamp(min=0).long()].where(idx >= 0, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        idx, row_ptr = ctx.saved_tensors
        n_latents, dtype = ctx.like
        sums = latent_sums(g.to(dtype), idx, n_latents, row_ptr, backend=ctx.backend)
        return sums, None, None, None


def of_latents(
    values: Tensor, idx: Tensor, row_ptr: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """values[idx] (F → the shape of idx), 0 where idx is -1; differentiable in values.

    The gradient is summed over the pairs of a latent in a fixed order.
    """
    check(values, "values", (None,))
    return LatentFunction.apply(values, idx, row_ptr, resolve(backend, values))


def latent_sums(
    coef: Tensor,
    idx: Tensor,
    n_latents: int,
    row_ptr: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Σ of coef, of idx's shape, over each latent's pairs (n_latents), in a fixed order."""
    check(coef, "coef", tuple(idx.shape))
    n_tokens = len(idx) if row_ptr is None else len(row_ptr) - 1
    wide = wide_dtype(coef.dtype)
    src = coef.new_empty(n_tokens, 1, dtype=wide)
    terms, of = coef.detach().to(wide).contiguous(), resolve(backend, src)
    _, sums = row_gradients_op(terms, idx, src, n_latents, row_ptr, wide, False, of)
    return sums.to(coef.dtype)


def column_sum(m: Tensor, *, backend: str | None = None) -> Tensor:
    """Σ of the rows of m (R, D): (D), float32 or float64, summed in one order for any threads."""
    check(m, "m", (None, None))
    return column_sum_op(m.detach(), None, resolve(backend, m))
