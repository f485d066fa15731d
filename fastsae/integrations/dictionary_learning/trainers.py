"""The library's trainers with a fused step: no N×F matrix, no F×D gradient.

The schedule, the losses, the thresholds and the bookkeeping are theirs; Adam, the projection of the
decoder's gradient, clipping and unit rows are `fastsae.optim.Adam`'s.
"""

from __future__ import annotations

import functools
import inspect
from collections import namedtuple
from typing import Any, ClassVar

import torch
from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k
from dictionary_learning.trainers.trainer import SAETrainer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from fastsae import ops
from fastsae.blocked import total
from fastsae.codes import Codes
from fastsae.integrations.dictionary_learning.dictionaries import (
    AutoEncoderTopK,
    BatchTopKSAE,
    MatryoshkaBatchTopKSAE,
    Rows,
    Sparse,
)
from fastsae.losses import nested_error
from fastsae.optim import Adam

LossLog = namedtuple("LossLog", ["x", "x_hat", "f", "losses"])


class FusedTrainer(SAETrainer):
    """What the trainers share. Arguments are the library's, and force.

    dict_class: the class of this package (the default) or one that derives from it.
    """

    dictionary: ClassVar[type[Sparse]]
    num_tokens_since_fired: Any
    optimizer: Any
    scheduler: Any
    pre_norm_auxk_loss: Any

    def __init__(self, *args: Any, force: bool = False, **kwargs: Any) -> None:
        call = inspect.signature(super().__init__).bind(*args, **kwargs)
        dict_class = call.arguments.setdefault("dict_class", self.dictionary)
        if force:
            call.arguments["dict_class"] = functools.partial(dict_class, force=True)
        if not (isinstance(dict_class, type) and issubclass(dict_class, self.dictionary)):
            raise TypeError(
                f"dict_class: expected fastsae's {self.dictionary.__name__} or a class derived "
                f"from it, got {dict_class!r}"
            )
        super().__init__(*call.args, **call.kwargs)
        self.num_tokens_since_fired = self.num_tokens_since_fired.to(self.device)
        # Leaves of the layout that the optimiser wants, in the memory of the dictionary.
        self.leaves = [nn.Parameter(p.detach()) for p in self.ae.rows()]
        adam, (schedule,) = self.optimizer.defaults, self.scheduler.lr_lambdas
        self.optimizer = Adam(
            self.leaves, self.lr, adam["betas"], adam["eps"], clip=1.0, unit_rows=[self.leaves[2]]
        )
        self.scheduler = LambdaLR(self.optimizer, schedule)

    def update(self, step: int, x: Tensor) -> float:
        """One step; returns the loss before it.

        FloatingPointError for a gradient that is not finite, ValueError for such activations or
        weights and for weight decay, RuntimeError for hooks that the step would pass by; then no
        weight has changed.
        """
        self._refuse_what_is_passed_by()
        if step == 0:
            median = top_k.geometric_median(x)
            if not bool(median.isfinite().all()):  # also where a token is the median of the others
                raise ValueError("x: expected a finite geometric median in step 0, got another")
            self.ae.b_dec.data.copy_(median)
        for leaf, p in zip(self.leaves, self.ae.rows(), strict=True):
            leaf.data = p.detach()  # the dictionary's memory may be another one since
            leaf.requires_grad_(p.requires_grad)
        self.optimizer.zero_grad()
        loss = self._log(self.leaves, x.to(self.device), step, False).losses["loss"]
        loss.backward()
        self.optimizer.step()
        # Adam leaves the rows alone that nothing has touched yet.
        if step == 0 and self.leaves[2].requires_grad:
            ops.normalize_rows_(self.leaves[2])
        self.scheduler.step()
        return loss.item()

    def loss(self, x: Tensor, step: int | None = None, logging: bool = False) -> Any:
        """The library's: the loss, or with `logging` a LossLog with dense features f (N, F).

        As there, every call counts which latents fired and moves the threshold.
        """
        log = self._log(self.ae.rows(), x, step, logging)
        if not logging:
            return log.losses["loss"]
        return log._replace(losses={name: v.item() for name, v in log.losses.items()})

    def _refuse_what_is_passed_by(self) -> None:
        for name, p in self.ae.named_parameters():
            if p._backward_hooks or p._post_accumulate_grad_hooks:
                raise RuntimeError(
                    f"ae.{name}: expected no gradient hooks, got some, and a fused step makes no "
                    "such gradient; the library's trainer does"
                )
        decay = max(group["weight_decay"] for group in self.optimizer.param_groups)
        if decay:
            raise ValueError(
                f"weight_decay: expected 0, got {decay}, which would be decoupled here and part of "
                "the gradient in the library's Adam"
            )

    def _log(self, rows: Rows, x: Tensor, step: Any, dense: bool) -> LossLog:
        for name in ("encode", "decode", "encoder", "decoder"):
            if not self.ae.is_plain(name):
                raise RuntimeError(
                    f"ae.{name}: expected fastsae's own without hooks, got another, which a fused "
                    "step would pass by; the library's trainer calls it"
                )
        W_dec, b_dec = rows[2:]
        x = x.to(torch.promote_types(b_dec.dtype, torch.float32))
        codes = self.ae.choose(x, rows)
        if step > self.threshold_start_step:
            self.update_threshold(codes.vals)
        self.effective_l0 = self.k

        squares = []

        def error_of(*part: Any) -> tuple[Tensor, Tensor, Tensor | None]:
            found = _error(W_dec, *part)
            squares.append(found[0].detach())
            return found

        parts = self.parts(codes)
        square, _, error = nested_error(error_of, parts, b_dec, x)
        self.num_tokens_since_fired += len(x)
        self.num_tokens_since_fired[codes.idx[codes.vals > 0].long()] = 0

        l2_loss = square / len(x)
        auxk_loss = self._auxk(rows, x, -error.detach())
        losses = {
            "l2_loss": l2_loss,
            "auxk_loss": auxk_loss,
            "loss": l2_loss + self.auxk_alpha * auxk_loss,
        }
        if len(parts) > 1:
            weighted = [
                weight * sse * len(parts) / len(x)
                for (weight, _), sse in zip(parts, squares, strict=True)
            ]
            losses |= {"min_l2_loss": min(weighted), "max_l2_loss": max(weighted)}
        if not dense:
            return LossLog(x, None, None, losses)
        return LossLog(x, error.detach() + x, codes.to_dense(), losses)

    def parts(self, codes: Codes) -> list[tuple[float, Codes]]:
        """The codes that the squared error of each prefix adds, and its weight."""
        return [(1.0, codes)]

    def _auxk(self, rows: Rows, x: Tensor, residual: Tensor) -> Tensor:
        """How badly latents that have long not fired reconstruct the residual, by its variance.

        With auxk_alpha 0 they are only counted.
        """
        W_enc, b_enc, W_dec, b_dec = rows
        dead = self.num_tokens_since_fired >= self.dead_feature_threshold
        self.dead_features, self.pre_norm_auxk_loss = int(dead.sum()), -1
        if not (self.dead_features and self.auxk_alpha):
            return residual.new_zeros(())
        k = min(self.top_k_aux, self.dead_features)
        latents = dead.nonzero()[:, 0].to(torch.int32)
        vals, idx = ops.encode(x, W_enc, b_enc, b_dec, k=k, latents=latents)
        square = _error(W_dec, Codes(vals, idx, len(W_enc)), None, residual)[0]
        self.pre_norm_auxk_loss = square.detach() / len(x)
        deviation = residual - ops.column_sum(residual) / len(x)
        return (square / total(deviation.square())).nan_to_num(0.0)


def _error(
    W_dec: Tensor, codes: Codes, bias: Tensor | None, target: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    return ops.reconstruction_error(
        codes.vals, codes.idx, W_dec, bias, target, row_ptr=codes.row_ptr, reconstruct=False
    )


class FastTopKTrainer(FusedTrainer, top_k.TopKTrainer):
    """The library's TopKTrainer with a fused step."""

    dictionary = AutoEncoderTopK


class FastBatchTopKTrainer(FusedTrainer, batch_top_k.BatchTopKTrainer):
    """The library's BatchTopKTrainer with a fused step."""

    dictionary = BatchTopKSAE


class FastMatryoshkaBatchTopKTrainer(
    FusedTrainer, matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer
):
    """The library's MatryoshkaBatchTopKTrainer with a fused step."""

    dictionary = MatryoshkaBatchTopKSAE

    def parts(self, codes: Codes) -> list[tuple[float, Codes]]:
        ae = self.ae
        ends = [int(end) for end in ae.group_indices[: ae.active_groups + 1]]
        parts = []
        for weight, start, end in zip(self.group_weights, ends, ends[1:], strict=False):
            kept = (codes.idx >= start) & (codes.idx < end)
            parts.append((weight / ae.active_groups, codes.only(kept)))
        return parts
