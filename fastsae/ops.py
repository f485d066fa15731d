"""The differentiable operations: thin autograd Functions over the backends.

`encode` and `decode` (and `reconstruction_error`, decode fused with the squared error) accept any
subset of inputs that require gradients. Indices are not differentiable, and neither are gradients:
a second backward raises. Each backend call is a registered custom op with a fake kernel, so
torch.compile traces through.

Backends are "reference" (torch, any device and dtype), "cpu" (C++; float32 and bfloat16 on a CPU)
and "triton" (float32, bfloat16 and float16 on a GPU). `backend=None` takes "cpu" or "triton" where
they can and else "reference".
"""

import importlib
import importlib.util
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fastsae import cpu, reference

BACKENDS = ("reference", "cpu", "triton")
Precision = Literal["screened", "fp32", "bf16"]
PRECISIONS: tuple[str, ...] = get_args(Precision)
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def choose_backend(*tensors: Tensor | None) -> str:
    """The backend whose kernels take all these tensors: "cpu" or "triton"; else "reference"."""
    given = [t for t in tensors if t is not None]

    def fits(device: str, dtypes: tuple[torch.dtype, ...]) -> bool:
        return all(t.device.type == device and t.dtype in dtypes for t in given)

    if cpu.available() and fits("cpu", cpu.DTYPES):
        return "cpu"
    if fits("cuda", TRITON_DTYPES) and importlib.util.find_spec("triton") is not None:
        return "triton"
    return "reference"


def _resolve(backend: str | None, *tensors: Tensor | None) -> str:
    if backend is None:
        return choose_backend(*tensors)
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "cpu" and not cpu.available():
        raise RuntimeError("backend 'cpu': fastsae._C is not built; see `fastsae info`")
    if backend == "cpu" and choose_backend(*tensors) != "cpu":
        got = ", ".join(sorted({f"{t.dtype} on {t.device}" for t in tensors if t is not None}))
        raise TypeError(f"backend 'cpu': expected float32 or bfloat16 tensors on a CPU, got {got}")
    return backend


def _kernel(backend: str, stem: str, name: str) -> Any:
    module: ModuleType
    if backend == "triton":
        try:
            module = importlib.import_module(f"fastsae.kernels.{stem}")
            return getattr(module, name)
        except (ModuleNotFoundError, AttributeError) as error:
            raise NotImplementedError(f"backend 'triton' has no {name}: {error}") from None
    return getattr(reference if backend == "reference" else cpu, name)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


# ---- custom ops: one for each backend function that autograd needs ----


@torch.library.custom_op("fastsae::encode", mutates_args=())
def _encode(
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
    return _kernel(backend, "encode", "encode")(x, W_enc, b_enc, k, latents, precision, **options)


def _empty_vals(x: Tensor, W_enc: Tensor, *shape: Any) -> Tensor:
    return x.new_empty(*shape, dtype=_wide(torch.promote_types(x.dtype, W_enc.dtype)))


@_encode.register_fake
def _(x, W_enc, b_enc, k, latents, scale, absolute, guide, W_dec, precision, backend):
    vals = _empty_vals(x, W_enc, x.shape[0], k)
    return vals, vals.new_empty(x.shape[0], k, dtype=torch.int32)


@torch.library.custom_op("fastsae::encode_groups", mutates_args=())
def _encode_groups(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, groups: int, precision: str, backend: str
) -> tuple[Tensor, Tensor]:
    encode, width = _kernel(backend, "encode", "encode"), len(W_enc) // groups
    found = []
    for first in range(0, len(W_enc), width):
        some = slice(first, first + width)
        b = None if b_enc is None else b_enc[some]
        vals, idx = encode(x, W_enc[some], b, 1, None, precision)
        found.append((vals, torch.where(idx < 0, idx, idx + first)))
    vals, order = torch.cat([v for v, _ in found], 1).sort(dim=1, descending=True, stable=True)
    return vals, torch.cat([i for _, i in found], 1).gather(1, order)


@_encode_groups.register_fake
def _(x, W_enc, b_enc, groups, precision, backend):
    vals = _empty_vals(x, W_enc, x.shape[0], groups)
    return vals, vals.new_empty(x.shape[0], groups, dtype=torch.int32)


def _empty_rows(x: Tensor, W_enc: Tensor, room: Any) -> tuple[Tensor, Tensor, Tensor]:
    vals = _empty_vals(x, W_enc, room)
    row_ptr = vals.new_empty(x.shape[0] + 1, dtype=torch.int64)
    return vals, vals.new_empty(room, dtype=torch.int32), row_ptr


@torch.library.custom_op("fastsae::encode_batch", mutates_args=())
def _encode_batch(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    budget: int,
    scale: Tensor | None,
    absolute: bool,
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = _kernel(backend, "encode_batch", "encode_batch")
    return kernel(x, W_enc, b_enc, budget, precision, scale=scale, absolute=absolute)


@_encode_batch.register_fake
def _(x, W_enc, b_enc, budget, scale, absolute, precision, backend):
    return _empty_rows(x, W_enc, min(budget, x.shape[0] * W_enc.shape[0]))


@torch.library.custom_op("fastsae::encode_columns", mutates_args=())
def _encode_columns(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    budgets: Tensor,
    room: int,
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = _kernel(backend, "encode_columns", "encode_columns")
    return kernel(x, W_enc, b_enc, budgets, room, precision)


@_encode_columns.register_fake
def _(x, W_enc, b_enc, budgets, room, precision, backend):
    return _empty_rows(x, W_enc, room)


@torch.library.custom_op("fastsae::encode_threshold", mutates_args=())
def _encode_threshold(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    thresholds: Tensor,
    limit: int | None,
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = _kernel(backend, "encode_threshold", "encode_threshold")
    return kernel(x, W_enc, b_enc, thresholds, limit, precision)


@_encode_threshold.register_fake
def _(x, W_enc, b_enc, thresholds, limit, precision, backend):
    return _empty_rows(x, W_enc, torch.library.get_ctx().new_dynamic_size())


@torch.library.custom_op("fastsae::decode", mutates_args=())
def _decode(
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
    return _kernel(backend, "decode", "decode_fwd")(vals, idx, W_dec, b_dec, **options)


@_decode.register_fake
def _(vals, idx, W_dec, b_dec, row_ptr, dtype, backend):
    n_tokens = idx.shape[0] if row_ptr is None else row_ptr.shape[0] - 1
    return W_dec.new_empty(n_tokens, W_dec.shape[1], dtype=dtype)


@torch.library.custom_op("fastsae::decode_bwd_vals", mutates_args=())
def _decode_bwd_vals(
    g: Tensor, idx: Tensor, W_dec: Tensor, row_ptr: Tensor | None, backend: str
) -> Tensor:
    rows = {} if row_ptr is None else {"row_ptr": row_ptr}
    return _kernel(backend, "decode", "decode_bwd_vals")(g, idx, W_dec, **rows)


@_decode_bwd_vals.register_fake
def _(g, idx, W_dec, row_ptr, backend):
    return W_dec.new_empty(idx.shape, dtype=_wide(W_dec.dtype))


@torch.library.custom_op("fastsae::decode_error", mutates_args=())
def _decode_error(
    vals: Tensor,
    idx: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    target: Tensor,
    row_ptr: Tensor | None,
    reconstruct: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernel = _kernel(backend, "decode_error", "decode_error")
    return kernel(vals, idx, W_dec, b_dec, target, row_ptr, reconstruct)


@_decode_error.register_fake
def _(vals, idx, W_dec, b_dec, target, row_ptr, reconstruct, backend):
    error = W_dec.new_empty(target.shape, dtype=_wide(W_dec.dtype))
    reconstruction = error.new_empty(target.shape[0] if reconstruct else 0, target.shape[1])
    return error.new_empty(()), error, reconstruction, error.new_empty(idx.shape)


@torch.library.custom_op("fastsae::row_gradients", mutates_args=())
def _row_gradients(
    coef: Tensor,
    idx: Tensor,
    src: Tensor,
    n_latents: int,
    row_ptr: Tensor | None,
    dtype: torch.dtype,
    need_rows: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    kernel = _kernel(backend, "rows", "row_gradients")
    return kernel(coef, idx, src, n_latents, row_ptr, dtype, need_rows)


@_row_gradients.register_fake
def _(coef, idx, src, n_latents, row_ptr, dtype, need_rows, backend):
    rows = src.new_empty(n_latents if need_rows else 0, src.shape[1], dtype=dtype)
    return rows, src.new_empty(n_latents, dtype=_wide(src.dtype))


@torch.library.custom_op("fastsae::column_sum", mutates_args=())
def _column_sum(m: Tensor, coef: Tensor | None, backend: str) -> Tensor:
    return _kernel(backend, "column_sum", "column_sum")(m, coef)


@_column_sum.register_fake
def _(m, coef, backend):
    return m.new_empty(m.shape[1], dtype=_wide(m.dtype))


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


def _undense_gradient(
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
    rows, _ = _row_gradients(coef, place, src, len(ids), row_ptr, W.dtype, True, backend)
    return True, torch.sparse_coo_tensor(
        ids[None].long(), rows, W.shape, is_coalesced=True, check_invariants=False
    )


# ---- autograd ----


class EncodeFunction(Function):
    """The values of the pairs that `select`, a custom op with its arguments, chooses."""

    @staticmethod
    def forward(ctx, x, W_enc, b_enc, pre_bias, backend, select, *arguments):
        xc = x.to(_wide(x.dtype))
        xc = xc if pre_bias is None else xc - pre_bias
        vals, idx, *row_ptr = select(xc, W_enc, b_enc, *arguments, backend)
        ctx.save_for_backward(xc, W_enc, idx, *row_ptr)
        ctx.dtypes = x.dtype, *(None if t is None else t.dtype for t in (b_enc, pre_bias))
        ctx.backend, ctx.n_constants = backend, 2 + len(arguments)
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
            dx = _decode(dvals, idx, W_enc, None, row_ptr, ctx.dtypes[0], ctx.backend)
        dense_W = need_W
        if need_W:
            done, dW = _undense_gradient(W_enc, dvals, idx, xc, row_ptr, ctx.backend)
            dense_W = not done
        if dense_W or need_b or need_pre:
            rows, sums = _row_gradients(
                dvals, idx, xc, len(W_enc), row_ptr, W_enc.dtype, dense_W, ctx.backend
            )
            dW = rows if dense_W else dW
            db = sums.to(ctx.dtypes[1]) if need_b else None
            dpre = -_column_sum(W_enc, sums, ctx.backend).to(ctx.dtypes[2]) if need_pre else None
        return dx, dW, db, dpre, *constants


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
        n_tokens = len(idx) if row_ptr is None else len(row_ptr) - 1
        wide = _wide(dtype)
        src = g.new_empty(n_tokens, 1, dtype=wide)
        g = g.to(wide).contiguous()
        sums = _row_gradients(g, idx, src, n_latents, row_ptr, wide, False, ctx.backend)[1]
        return sums.to(dtype), None, None, None


class DecodeFunction(Function):
    @staticmethod
    def forward(ctx, vals, idx, W_dec, b_dec, row_ptr, dtype, backend):
        ctx.save_for_backward(vals, idx, W_dec, row_ptr)
        ctx.dtypes = vals.dtype, None if b_dec is None else b_dec.dtype
        ctx.backend = backend
        return _decode(vals, idx, W_dec, b_dec, row_ptr, dtype, backend)

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
        dvals = _decode_bwd_vals(g, idx, W_dec, row_ptr, ctx.backend) if dvals is None else dvals
        dvals = (dvals if scale is None else dvals * scale).to(ctx.dtypes[0])
    if need_W:
        coef = vals if scale is None else vals * scale
        done, dW = _undense_gradient(W_dec, coef, idx, g, row_ptr, ctx.backend)
        if not done:
            dtype = W_dec.dtype
            dW = _row_gradients(coef, idx, g, len(W_dec), row_ptr, dtype, True, ctx.backend)[0]
    if need_b:
        db = _column_sum(g, None, ctx.backend)
        db = (db if scale is None else db * scale).to(ctx.dtypes[1])
    return dvals if need_vals else None, None, dW, db


class ErrorFunction(Function):
    @staticmethod
    def forward(ctx, vals, idx, W_dec, b_dec, target, row_ptr, reconstruct, backend):
        sse, error, reconstruction, dvals = _decode_error(
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


# ---- public ----


def _check(t: Tensor | None, name: str, shape: tuple[int | None, ...]) -> None:
    if t is None:
        return
    fits = t.ndim == len(shape) and all(
        s is None or s == n for s, n in zip(shape, t.shape, strict=True)
    )
    if not fits:
        expected = ", ".join("*" if s is None else str(s) for s in shape)
        raise ValueError(f"{name}: expected shape ({expected}), got {tuple(t.shape)}")
    if not t.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype, got {t.dtype}")


def _check_encoder(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    pre_bias: Tensor | None,
    precision: str,
    scale: Tensor | None = None,
) -> None:
    _check(x, "x", (None, None))
    _check(W_enc, "W_enc", (None, x.shape[1]))
    _check(b_enc, "b_enc", (len(W_enc),))
    _check(pre_bias, "pre_bias", (x.shape[1],))
    _check(scale, "scale", (len(W_enc),))
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
    precision: Precision = "screened",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The values h = (x - pre_bias) W_encᵀ + b_enc of each token's k largest positive scores.

    x (N, D), W_enc (F, D), b_enc (F), pre_bias (D), latents (int32, ascending ids to choose from).
    The score of a pair is h, or |h| with absolute, times scale (F, at least 0) where given, times
    1 + |<guide[n], W_dec[i]>| with guide (N, D_out) and W_dec (F, D_out); all three are constants.
    Returns vals (N, k), float32 or float64, by score descending then latent ascending, and idx (N,
    k) int32; -1 and 0 pad where fewer than k are positive. ValueError for wrong shapes and
    non-finite numbers.

    Exact: the values come from one fixed-order fp32 dot product, which also decides. precision says
    how the pairs worth it are found: "screened", by the fastest product whose error is bounded
    (bf16 where the CPU multiplies that, else fp32); "fp32", by an fp32 product. The results are the
    same to the bit. "bf16" is another result, that of x - pre_bias and W_enc rounded to bf16 (as
    under autocast); gradients are as without the rounding.
    """
    _check_encoder(x, W_enc, b_enc, pre_bias, precision, scale)
    if k < 0:
        raise ValueError(f"k: expected at least 0, got {k}")
    if (guide is None) != (W_dec is None):
        raise ValueError("guide: expected W_dec with it and only with it")
    if guide is not None and W_dec is not None:
        _check(W_dec, "W_dec", (len(W_enc), None))
        _check(guide, "guide", (len(x), W_dec.shape[1]))
    backend = _resolve(backend, x, W_enc, b_enc, pre_bias, W_dec)
    scale, guide = _float32(scale), _float32(guide)
    W_dec = None if W_dec is None else W_dec.detach()
    options = (k, latents, scale, absolute, guide, W_dec, precision)
    return EncodeFunction.apply(x, W_enc, b_enc, pre_bias, backend, _encode, *options)


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
    backend = _resolve(backend, x, W_enc, b_enc, pre_bias)
    options = (groups, precision)
    return EncodeFunction.apply(x, W_enc, b_enc, pre_bias, backend, _encode_groups, *options)


def encode_batch(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None = None,
    pre_bias: Tensor | None = None,
    *,
    budget: int,
    scale: Tensor | None = None,
    absolute: bool = False,
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
    backend = _resolve(backend, x, W_enc, b_enc, pre_bias)
    options = (budget, _float32(scale), absolute, precision)
    return EncodeFunction.apply(x, W_enc, b_enc, pre_bias, backend, _encode_batch, *options)


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
    backend = _resolve(backend, x, W_enc, b_enc, pre_bias)
    options = (budgets, room if len(x) else 0, precision)
    return EncodeFunction.apply(x, W_enc, b_enc, pre_bias, backend, _encode_columns, *options)


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
    is. inf shuts a latent out. TooManyPairs (fastsae.reference) where more than limit pairs pass.
    Waits for a GPU: nnz decides shapes.
    """
    _check_encoder(x, W_enc, b_enc, pre_bias, precision)
    thresholds = thresholds.detach().float().expand(len(W_enc)).contiguous()
    backend = _resolve(backend, x, W_enc, b_enc, pre_bias)
    options = (thresholds, limit, precision)
    return EncodeFunction.apply(x, W_enc, b_enc, pre_bias, backend, _encode_threshold, *options)


def of_latents(
    values: Tensor, idx: Tensor, row_ptr: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """values[idx] (F → the shape of idx), 0 where idx is -1; differentiable in values.

    The gradient is summed over the pairs of a latent in a fixed order.
    """
    _check(values, "values", (None,))
    return LatentFunction.apply(values, idx, row_ptr, _resolve(backend, values))


def _check_codes(
    vals: Tensor, idx: Tensor, row_ptr: Tensor | None, W_dec: Tensor, b_dec: Tensor | None
) -> None:
    _check(W_dec, "W_dec", (None, None))
    _check(b_dec, "b_dec", (W_dec.shape[1],))
    if idx.dtype != torch.int32:
        raise TypeError(f"idx: expected torch.int32, got {idx.dtype}")
    if idx.ndim != (2 if row_ptr is None else 1):
        raise ValueError(
            "idx: expected (N, K), or (nnz) with row_ptr, got shape " + str(tuple(idx.shape))
        )
    _check(vals, "vals", tuple(idx.shape))


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
    backend = _resolve(backend, W_dec, b_dec)
    vals = vals.to(_wide(W_dec.dtype))
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
    _check(W_dec, "W_dec", (None, None))
    n_tokens = len(idx) if row_ptr is None else len(row_ptr) - 1
    _check(g, "g", (n_tokens, W_dec.shape[1]))
    backend = _resolve(backend, g, W_dec)
    return _decode_bwd_vals(g.detach(), idx, W_dec.detach(), row_ptr, backend)


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
    _check(target, "target", (n_tokens, W_dec.shape[1]))
    backend = _resolve(backend, W_dec, b_dec, target)
    vals = vals.to(_wide(W_dec.dtype)).contiguous()
    sse, error, reconstruction = ErrorFunction.apply(
        vals, idx.contiguous(), W_dec, b_dec, target, row_ptr, reconstruct, backend
    )
    return sse, error, reconstruction if reconstruct else None


def column_sum(m: Tensor, *, backend: str | None = None) -> Tensor:
    """Σ of the rows of m (R, D): (D), float32 or float64, summed in one order for any threads."""
    _check(m, "m", (None, None))
    return _column_sum(m.detach(), None, _resolve(backend, m))


def project_rows_(grad: Tensor, W_dec: Tensor, *, backend: str | None = None) -> None:
    """Removes from each row of grad (F, D) its part along the same row of W_dec, in place."""
    _check(W_dec, "W_dec", (None, None))
    _check(grad, "grad", tuple(W_dec.shape))
    _kernel(_resolve(backend, grad, W_dec), "unit_rows", "project_rows_")(grad, W_dec)


def normalize_rows_(W_dec: Tensor, *, backend: str | None = None) -> None:
    """Scales each row of W_dec (F, D) to norm 1, in place; a row of zeros stays."""
    _check(W_dec, "W_dec", (None, None))
    _kernel(_resolve(backend, W_dec), "unit_rows", "normalize_rows_")(W_dec)


def inverse_index(
    idx: Tensor, n_latents: int, row_ptr: Tensor | None = None, *, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """For each latent its pairs, as :func:`fastsae.reference.inverse_index`.

    idx is that of `decode`, int32. On backends "cpu" and "triton", token and entry may end in room
    that is not used.
    """
    return _kernel(backend, "index", "inverse_index")(idx, n_latents, row_ptr)


def gradient_square_norm(
    p: Tensor,
    dense: Tensor | None,
    gradients: list[RowGradient],
    project: bool,
    *,
    backend: str | None = None,
) -> float | Tensor:
    """‖g‖² of the gradient that `adam_` would apply to p; on backend "triton" a 0-d tensor."""
    backend = _resolve(backend, p, dense)
    return _kernel(backend, "gradients", "gradient_square_norm")(p, dense, gradients, project)


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
    backend = _resolve(backend, p, dense)
    hyper = (lr, beta1, beta2, eps, weight_decay, scale, step, lazy)
    if stochastic_rounding and backend != "triton":
        raise ValueError(f"stochastic_rounding: expected backend 'triton', got {backend!r}")
    options = {"stochastic_rounding": True} if stochastic_rounding else {}
    _kernel(backend, "adam", "adam_")(p, dense, gradients, project, m, v, last, *hyper, **options)
