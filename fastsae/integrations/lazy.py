"""A dense matrix that another library expects and nobody may ever read.

`lazy(make, shape, *inputs)` stands for make(*inputs): it has that shape, dtype and gradient, takes
every operation, and is made at the first one. One that is known by its sparse codes is not even
made for `.bool()`, `.float()`, `.detach()` and sums over tokens or latents, which is what trainers
count with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map_only

from fastsae.codes import Codes

Make = Callable[..., Tensor]

# What reads memory without an operation that __torch_dispatch__ would see.
READERS = {
    getattr(Tensor, name)
    for name in (
        "numpy",
        "tolist",
        "data_ptr",
        "untyped_storage",
        "__array__",
        "__deepcopy__",
        "__dlpack__",
        "__reduce_ex__",
        "__repr__",
    )
}
WATCHERS = {Tensor.retain_grad, Tensor.register_hook}


@dataclass(eq=False)
class _State:
    """What a matrix and its detached forms share."""

    make: Callable[[], Tensor]
    codes: Codes | None
    made: Tensor | None = None


class Lazy(Tensor):
    """Made by `lazy`. Gradients reach its inputs, and not itself, unless an operation made it."""

    state: _State
    origin: Any
    """What its maker knows of it; None for what operations return."""

    @staticmethod
    def __new__(cls, state: _State, shape: torch.Size, like: Tensor, dtype: torch.dtype) -> Lazy:
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=like.device)
        self.state, self.origin = state, None
        return self

    @property
    def codes(self) -> Codes | None:
        """The nonzeros, constant (leading dimensions flattened), unless they may have changed."""
        return self.state.codes

    def matrix(self) -> Tensor:
        """The matrix as a constant. From here on it may be written to."""
        state = self.state
        if state.made is None:
            state.made = state.make()
        state.codes = None
        return state.made

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in WATCHERS:
            raise RuntimeError(
                f"{func.__name__}: expected a tensor that the loss is computed from, got one that "
                "fastsae leaves out; with a hook on hook_sae_acts_post (or _pre) it is computed"
            )
        if func in READERS:
            if func is Tensor.numpy and args[0].requires_grad and not kwargs.get("force"):
                raise RuntimeError("numpy: expected a tensor without gradient; call detach() first")
            args = tree_map_only(Lazy, Lazy.matrix, args)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        kwargs = kwargs or {}
        short_cut = SHORT_CUTS.get(func)
        if short_cut is not None and isinstance(args[0], Lazy):
            result = short_cut(*args, **kwargs)
            if result is not None:
                return result
        args, kwargs = tree_map_only(Lazy, Lazy.matrix, (args, kwargs))
        return func(*args, **kwargs)


def _version(t: Tensor) -> int | None:
    return None if t.is_inference() else t._version


class LazyFunction(Function):
    """Its backward, for whoever used the matrix itself, makes it once more."""

    @staticmethod
    def forward(ctx, make, shape, codes, *inputs):
        ctx.save_for_backward(*inputs)
        ctx.make, ctx.shape = make, shape
        constants = [t.detach() for t in inputs]  # which count writes together with the inputs
        versions = [_version(t) for t in constants]

        def unchanged() -> Tensor:
            if [_version(t) for t in constants] != versions:
                raise RuntimeError(
                    "a matrix that fastsae left out: expected its first use before activations or "
                    "weights that it is made of are written to, got a later one"
                )
            return make(*constants).view(shape)

        return Lazy(_State(unchanged, codes), shape, inputs[0], inputs[0].dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        inputs = [
            t.detach().requires_grad_(needed)
            for t, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[3:], strict=True)
        ]
        wanted = [t for t in inputs if t.requires_grad]
        with torch.enable_grad():
            made = ctx.make(*inputs).view(ctx.shape)
        grads = iter(torch.autograd.grad(made, wanted, g))
        return None, None, None, *(next(grads) if t.requires_grad else None for t in inputs)


def lazy(make: Make, shape: torch.Size, *inputs: Tensor, codes: Codes | None = None) -> Lazy:
    """A matrix of this shape that is make(*inputs), of dtype and device of the first input.

    RuntimeError at its first use if inputs were written to before; writes that torch does not
    count, through `.data` or to inference tensors, are not seen.
    """
    constant = None
    if codes is not None:
        constant = Codes(codes.vals.detach(), codes.idx, codes.n_latents, codes.row_ptr)
    return LazyFunction.apply(make, shape, constant, *inputs)


def lazy_codes(codes: Codes, shape: torch.Size) -> Lazy:
    """The matrix (…, F) with these nonzeros."""

    def make(vals: Tensor) -> Tensor:
        return Codes(vals, codes.idx, codes.n_latents, codes.row_ptr).to_dense()

    return lazy(make, shape, codes.vals, codes=codes)


# ---- operations on the nonzeros alone; None: on the matrix ----


def _converted(of: Lazy, *, dtype: torch.dtype | None = None, **others: Any) -> Lazy | None:
    codes = of.codes
    dtype = dtype or of.dtype
    known = dtype == torch.bool or dtype.is_floating_point
    if codes is None or not known or (others.get("device") or of.device) != of.device:
        return None
    vals = (codes.vals != 0).to(codes.vals.dtype) if dtype == torch.bool else codes.vals.to(dtype)
    new = Codes(vals, codes.idx, codes.n_latents, codes.row_ptr)
    state = _State(lambda: new.to_dense().to(dtype).view(of.shape), new)
    return Lazy(state, of.shape, of, dtype)


def _detached(of: Lazy) -> Lazy:
    return Lazy(of.state, of.shape, of, of.dtype)


def _sum(
    of: Lazy, dim: list[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Tensor | None:
    codes = of.codes
    if codes is None or keepdim or not dim or len(dim) != 1 or of.dtype == torch.bool:
        return None
    axis, dtype = dim[0] % of.ndim, dtype or of.dtype
    if axis != of.ndim - 1 and of.ndim != 2:
        return None
    vals = codes.vals.reshape(-1).to(dtype)
    if dtype in (torch.bfloat16, torch.float16):
        vals = vals.float()  # torch, too, rounds only the sum
    if axis == of.ndim - 1:
        sums = vals.new_zeros(codes.n_tokens).index_add_(0, codes.token_ids(), vals)
        return sums.to(dtype).view(of.shape[:-1])
    latents = codes.idx.reshape(-1).clamp(min=0).long()  # padding adds 0
    return vals.new_zeros(codes.n_latents).index_add_(0, latents, vals).to(dtype)


SHORT_CUTS: dict[Any, Callable[..., Tensor | None]] = {
    torch.ops.aten._to_copy.default: _converted,
    torch.ops.aten.detach.default: _detached,
    torch.ops.aten.sum.dim_IntList: _sum,
}
