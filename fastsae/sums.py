"""Sums and norms that do not depend on the number of threads, with their gradients."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fastsae import ops
from fastsae.ops.backend import resolve
from fastsae.ops.gradients import undense_gradient


def plain_total(v: Tensor, backend: str | None) -> Tensor:
    """`total`, a constant."""
    flat = v.detach().reshape(-1)
    if len(flat) % 64:
        flat = torch.nn.functional.pad(flat, (0, -len(flat) % 64))
    return ops.column_sum(flat.view(-1, 64), backend=backend).sum()


class TotalFunction(Function):
    @staticmethod
    def forward(ctx, v, backend):
        ctx.shape = v.shape
        return plain_total(v, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return g.expand(ctx.shape), None


def total(v: Tensor, *, backend: str | None = None) -> Tensor:
    """Σ of all elements of v (0-d), in one order for any threads; differentiable."""
    return TotalFunction.apply(v, backend)


class RowNormFunction(Function):
    @staticmethod
    def forward(ctx, W, backend):
        norms = torch.linalg.vector_norm(W, dim=1, dtype=torch.promote_types(W.dtype, torch.float))
        ctx.save_for_backward(W, norms)
        ctx.backend = backend
        return norms

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        W, norms = ctx.saved_tensors
        coef = (g / norms).where(norms > 0, 0)[:, None]
        ids = torch.arange(len(W), dtype=torch.int32, device=W.device)[:, None]
        ids = ids.where(coef != 0, -1)
        done, dense = undense_gradient(W, coef, ids, W.detach(), None, ctx.backend)
        return dense if done else (coef * W).to(W.dtype), None


def row_norms(W: Tensor, *, backend: str | None = None) -> Tensor:
    """‖W[i]‖ (F), float32 or wider; its gradient goes to an optimiser as a RowGradient."""
    return RowNormFunction.apply(W, resolve(backend, W))


def unit_rows(rows: Tensor, name: str = "rows", dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows (n, D) at norm 1, zeros where they are 0; a constant. ValueError: not finite."""
    rows = rows.detach().to(dtype)
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    if not bool(norms.isfinite().all()):
        raise ValueError(f"{name}: expected finite numbers")
    return rows / norms.where(norms > 0, 1)
