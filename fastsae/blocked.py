"""A step that keeps no pairs: latents in blocks, recomputed in backward.

    h = (x - pre_bias) W_encᵀ + b_enc         (N, block), then gone
    z, penalties, frozen = pairs(h, latents)    elementwise, the rule's own
    x̂ = b_dec + Σ z W_dec     totals = Σ penalties     x̂_frozen = b_dec + Σ frozen W_dec

For rules whose pairs are too many to be stored. backward makes each block's h again, takes the
gradients of `pairs` by autograd, so one definition serves this form and the sparse one, and applies
those of the products. x̂_frozen gives none to W_dec and b_dec.

Shapes   x (N, D), W_enc (F, D), b_enc (F), W_dec (F, D_out), b_dec (D_out), latents (F) each.
Dtypes   any floating; products and sums in float32, or float64 where x or W_enc is, without
         autocast. precision "bf16" rounds x and W_enc for h as `ops.encode` does.
Memory   a dozen (N, block) matrices of `BLOCK` elements. Where `optim.Adam` receives, W_enc and
         W_dec get a BlockGradient and no (F, D) gradient exists; else they get dense ones.
Work     multiples of 2·N·F·D, D_out being D: forward 2; backward 2, 2 more for dense gradients (or
         4 in the update, and 4 for a gradient norm), 1 for x, 1 more each way for x̂_frozen.
Order    The products are torch's matmul: bits are those of the library. All other sums are in the
         fixed order of `ops.column_sum`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fastsae import ops
from fastsae.ops.backend import resolve, wide_dtype
from fastsae.ops.gradients import column_sum_op
from fastsae.reference import _dtype, _matmul
from fastsae.sums import plain_total, row_norms, total

__all__ = ["BLOCK", "Blocked", "PairFunction", "Pairs", "blocked", "row_norms", "total"]

BLOCK = 2**20


class Pairs(NamedTuple):
    """What a rule makes of pairs; every tensor has h's shape."""

    values: Tensor
    penalties: tuple[Tensor, ...]
    """Each is summed over all pairs."""
    frozen: Tensor | None = None
    """Other values, to be decoded by constant W_dec and b_dec."""


class Blocked(NamedTuple):
    """What `blocked` returns."""

    x_hat: Tensor
    """(N, D_out), with b_dec."""
    frozen: Tensor | None
    """(N, D_out): x̂_frozen."""
    totals: tuple[Tensor, ...]
    """0-d each."""
    n_active: Tensor
    """0-d int64: the values that are not 0."""
    fired: Tensor
    """(F) bool."""


PairFunction = Callable[..., Pairs]
"""(h, *latents), all of one shape → Pairs, differentiable; looks at each pair by itself."""


@dataclass(eq=False)
class _Step:
    """A batch, and what is made of it block by block."""

    pairs: PairFunction
    rounded: bool
    backend: str | None
    xc: Tensor
    W_enc: Tensor
    b_enc: Tensor | None
    W_dec: Tensor
    latents: tuple[Tensor, ...]

    @property
    def block(self) -> int:
        return max(1, BLOCK // max(1, len(self.xc)))

    def blocks(self) -> Iterator[slice]:
        n_latents = len(self.W_enc)
        for start in range(0, n_latents, self.block):
            yield slice(start, min(start + self.block, n_latents))

    def wide(self, t: Tensor) -> Tensor:
        return t.to(self.xc.dtype)

    def inputs(self, some: slice) -> list[Tensor]:
        """h, and the latents' vectors spread to its shape."""
        x, W = self.xc, self.W_enc[some]
        if self.rounded:
            x, W = self.wide(x.bfloat16()), W.bfloat16()
        h = _matmul(x, self.wide(W).T)
        if self.b_enc is not None:
            h += self.wide(self.b_enc[some])
        return [h, *(v[some].to(wide_dtype(v.dtype)).expand_as(h) for v in self.latents)]

    def results(self, some: slice) -> tuple[Tensor, Tensor | None, list[Tensor], Tensor]:
        """A block's shares of x̂, x̂_frozen and the totals, and how often its latents fired."""
        values, penalties, frozen = self.pairs(*self.inputs(some))
        W = self.wide(self.W_dec[some])
        totals = [plain_total(p, self.backend) for p in penalties]
        x_frozen = None if frozen is None else _matmul(frozen, W)
        return _matmul(values, W), x_frozen, totals, (values != 0).sum(0)


@dataclass(eq=False)
class _Gradients:
    """Those of a step, given those of its results."""

    step: _Step
    dx_hat: Tensor | None
    dfrozen: Tensor | None
    dtotals: tuple[Tensor | None, ...]
    wanted: tuple[bool, bool]
    """Of W_enc and W_dec."""

    def of_pairs(self, some: slice) -> tuple[Tensor, Tensor, list[Tensor]]:
        """A block's values, and the gradients (N, block) of its h and of each of the latents."""
        step = self.step
        leaves = [t.detach().requires_grad_() for t in step.inputs(some)]
        with torch.enable_grad():
            values, penalties, frozen = step.pairs(*leaves)
        W = step.wide(step.W_dec[some])
        given = [
            (output, _matmul(g, W.T))
            for output, g in ((values, self.dx_hat), (frozen, self.dfrozen))
            if output is not None and g is not None
        ]
        given += [
            (output, g.to(output.dtype).expand_as(output))
            for output, g in zip(penalties, self.dtotals, strict=True)
            if g is not None and output.requires_grad
        ]
        if not given:
            dh, *dlatents = (torch.zeros_like(t) for t in leaves)
            return values.detach(), dh, dlatents
        outputs, grads = zip(*given, strict=True)
        dh, *dlatents = torch.autograd.grad(outputs, leaves, grads, materialize_grads=True)
        return values.detach(), dh, dlatents

    def of_weights(self, some: slice, values: Tensor, dh: Tensor) -> tuple[Tensor, ...]:
        """Rows `some` of the gradients of W_enc and W_dec, those that are wanted."""
        g = self.dx_hat
        rows = []
        if self.wanted[0]:
            rows.append(_matmul(dh.T, self.step.xc))
        if self.wanted[1]:
            W = self.step.W_dec[some]
            rows.append(dh.new_zeros(W.shape) if g is None else _matmul(values.T, g))
        return tuple(rows)

    def rows(self, start: int, stop: int) -> tuple[Tensor, ...]:
        some = slice(start, stop)
        values, dh, _ = self.of_pairs(some)
        return self.of_weights(some, values, dh)

    def handed_over(self) -> bool:
        """Whether an optimiser took them as a BlockGradient."""
        step = self.step
        weights = zip((step.W_enc, step.W_dec), self.wanted, strict=True)
        parameters = tuple(W for W, wanted in weights if wanted)
        # An update may write the vectors first, but each block of the weights after it was read.
        kept = replace(
            step,
            b_enc=None if step.b_enc is None else step.b_enc.clone(),
            latents=tuple(v.clone() for v in step.latents),
        )
        rows = replace(self, step=kept).rows
        return ops.hand_over(ops.BlockGradient(parameters, rows, step.block))


class BlockedFunction(Function):
    @staticmethod
    def forward(ctx, pairs, precision, backend, x, W_enc, b_enc, pre_bias, W_dec, b_dec, *latents):
        xc = x.to(_dtype(x, W_enc))
        xc = xc if pre_bias is None else xc - pre_bias
        rounded = precision == "bf16"
        step = _Step(pairs, rounded, backend, xc, W_enc, b_enc, W_dec, latents)
        x_hat = xc.new_zeros(len(x), W_dec.shape[1])
        x_hat = x_hat if b_dec is None else x_hat + b_dec
        x_frozen = x_hat.clone()
        totals: list[Tensor] = []
        fired = torch.zeros(len(W_enc), dtype=torch.int64, device=x.device)
        for some in step.blocks():
            share, frozen, sums, fired[some] = step.results(some)
            x_hat += share
            x_frozen = None if frozen is None else x_frozen.add_(frozen)
            totals = [a + b for a, b in zip(totals, sums, strict=True)] if totals else sums
        ctx.save_for_backward(xc, W_enc, b_enc, W_dec, *latents)
        ctx.how = pairs, rounded, backend
        ctx.dtypes = x.dtype, *(None if t is None else t.dtype for t in (b_enc, pre_bias, b_dec))
        n_active, fired = fired.sum(), fired > 0
        ctx.mark_non_differentiable(n_active, fired)
        ctx.set_materialize_grads(False)
        return n_active, fired, x_hat, x_frozen, *totals

    @staticmethod
    @once_differentiable
    def backward(ctx, _n_active, _fired, dx_hat, dfrozen, *dtotals):
        xc, W_enc, b_enc, W_dec, *latents = ctx.saved_tensors
        need_x, need_W, need_b, need_pre, need_W_dec, need_b_dec, *_ = ctx.needs_input_grad[3:]
        pairs, rounded, backend = ctx.how
        step = _Step(pairs, rounded, backend, xc, W_enc, b_enc, W_dec, tuple(latents))
        gradients = _Gradients(step, dx_hat, dfrozen, dtotals, (need_W, need_W_dec))
        dense = (need_W or need_W_dec) and not gradients.handed_over()
        dW = torch.empty_like(W_enc) if dense and need_W else None
        dW_dec = torch.empty_like(W_dec) if dense and need_W_dec else None
        dx = torch.zeros_like(xc) if need_x else None
        sums = [xc.new_empty(len(W_enc)) for _ in (W_enc, *latents)]
        for some in step.blocks():
            values, dh, dlatents = gradients.of_pairs(some)
            for sums_of, d in zip(sums, (dh, *dlatents), strict=True):
                sums_of[some] = ops.column_sum(d, backend=backend)
            if dx is not None:
                dx += _matmul(dh, step.wide(W_enc[some]))
            if dense:
                rows = gradients.of_weights(some, values, dh)
                for W, row in zip((W for W in (dW, dW_dec) if W is not None), rows, strict=True):
                    W[some] = row
            del values, dh, dlatents  # before the next block is made
        x_dtype, b_dtype, pre_dtype, b_dec_dtype = ctx.dtypes
        db = sums[0].to(b_dtype) if need_b else None
        dpre = db_dec = None
        if need_pre:
            of = resolve(backend, W_enc, sums[0])
            dpre = -column_sum_op(W_enc, sums[0], of).to(pre_dtype)
        if need_b_dec and dx_hat is not None:
            db_dec = ops.column_sum(dx_hat, backend=backend).to(b_dec_dtype)
        dx = None if dx is None else dx.to(x_dtype)
        latent_grads = (d.to(v.dtype) for d, v in zip(sums[1:], latents, strict=True))
        return None, None, None, dx, dW, db, dpre, dW_dec, db_dec, *latent_grads


def blocked(
    pairs: PairFunction,
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    pre_bias: Tensor | None,
    W_dec: Tensor,
    b_dec: Tensor | None,
    latents: tuple[Tensor, ...] = (),
    *,
    precision: ops.Precision = "screened",
    backend: str | None = None,
) -> Blocked:
    """Encode, `pairs` and decode, differentiable in all tensors; see above.

    backend is that of the sums.
    """
    n_active, fired, x_hat, frozen, *totals = BlockedFunction.apply(
        pairs, precision, backend, x, W_enc, b_enc, pre_bias, W_dec, b_dec, *latents
    )
    return Blocked(x_hat, frozen, tuple(totals), n_active, fired)
