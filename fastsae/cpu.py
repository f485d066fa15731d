"""The C++ backend: one launcher for each function of ``csrc/``; check, allocate, call.

Same names, arguments and results as :mod:`fastsae.reference`, for float32 and bfloat16 weights on a
CPU. Values, errors and dvals are float32. No bit of a result depends on the number of threads,
which is ``torch.get_num_threads()``, on the blocks or on the instruction set.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastsae.reference import TooManyPairs, as_rows

missing: str | None = None
"""Why the extension is not there; None where it is."""
try:
    from fastsae import _C
except ImportError as error:  # fastsae/__init__.py says so
    _C = None  # type: ignore[assignment]
    missing = "it was not built, for want of a C++ compiler"
    if "_C" not in str(error) or "cannot import name" not in str(error):
        missing = f"it does not load: {error}"

if TYPE_CHECKING:
    from fastsae.moments import Scales
    from fastsae.ops import RowGradient

DTYPES = (torch.float32, torch.bfloat16)


def available() -> bool:
    """Whether the extension was built."""
    return _C is not None


def isas() -> list[str]:
    """The instruction sets built in that this CPU can run, best first; the first is used."""
    return _C.isas()


def screen() -> str:
    """The product that screens pre-activations: "bf16" if this CPU multiplies bf16, else "fp32".

    Both give the same bits: a screen only decides which pairs are scored.
    """
    return "bf16" if isas()[0] == "avx512bf16" else "fp32"


def _rows(t: Tensor) -> Tensor:
    """t with unit stride inside a row, as the kernels need it."""
    return t if t.ndim != 2 or t.shape[1] <= 1 or t.stride(1) == 1 else t.contiguous()


def _float(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach().float().contiguous()


def _encoding(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, precision: str, forced: dict[str, Any] | None
) -> dict[str, Any]:
    """What the encoders have in common.

    forced: any of screen, block_tokens, threads and isa, which never change a bit of the result.
    """
    rounded = precision == "bf16"
    x = _rows((x.detach().bfloat16() if rounded else x.detach()).float())
    return {
        **{"x": x, "W_enc": W_enc, "b_enc": _float(b_enc), "rounded": rounded},
        "screen": "fp32" if precision == "fp32" else screen(),
        "threads": torch.get_num_threads(),
        **(forced or {}),
    }


def _empty_pairs(*shape: int) -> tuple[Tensor, Tensor]:
    """vals and idx."""
    return torch.empty(shape, dtype=torch.float32), torch.empty(shape, dtype=torch.int32)


def encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    k: int,
    latents: Tensor | None = None,
    precision: str = "screened",
    *,
    scale: Tensor | None = None,
    absolute: bool = False,
    guide: Tensor | None = None,
    W_dec: Tensor | None = None,
    forced: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`fastsae.reference.encode`."""
    vals, idx = _empty_pairs(len(x), k)
    _C.encode(
        latents=latents,
        scale=scale,
        absolute=absolute,
        guide=None if guide is None else _rows(guide.detach()),
        W_dec=W_dec,
        vals=vals,
        idx=idx,
        **_encoding(x, W_enc, b_enc, precision, forced),
    )
    return vals, idx


def encode_batch(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    budget: int,
    precision: str = "screened",
    *,
    scale: Tensor | None = None,
    absolute: bool = False,
    forced: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`fastsae.reference.encode_batch`."""
    if budget < 0:
        raise ValueError(f"budget: expected at least 0, got {budget}")
    vals, idx = _empty_pairs(min(budget, len(x) * len(W_enc)))
    row_ptr = torch.empty(len(x) + 1, dtype=torch.int64)
    _C.encode_batch(
        scale=scale,
        absolute=absolute,
        vals=vals,
        idx=idx,
        row_ptr=row_ptr,
        **_encoding(x, W_enc, b_enc, precision, forced),
    )
    return vals, idx, row_ptr


def encode_columns(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    budgets: Tensor,
    room: int,
    precision: str = "screened",
    *,
    forced: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`fastsae.reference.encode_columns`."""
    if room < 0:
        raise ValueError(f"room: expected at least 0, got {room}")
    vals, idx = _empty_pairs(room if len(x) else 0)
    row_ptr = torch.empty(len(x) + 1, dtype=torch.int64)
    _C.encode_columns(
        budgets=budgets,
        vals=vals,
        idx=idx,
        row_ptr=row_ptr,
        **_encoding(x, W_enc, b_enc, precision, forced),
    )
    return vals, idx, row_ptr


def encode_threshold(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    thresholds: Tensor,
    limit: int | None = None,
    precision: str = "screened",
    *,
    forced: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`fastsae.reference.encode_threshold`."""
    row_ptr = torch.empty(len(x) + 1, dtype=torch.int64)
    found = _C.encode_threshold(
        thresholds=thresholds,
        limit=limit,
        allocate=_empty_pairs,
        row_ptr=row_ptr,
        **_encoding(x, W_enc, b_enc, precision, forced),
    )
    if found is None:
        raise TooManyPairs(f"more than {limit} pairs pass their thresholds")
    return *found, row_ptr


def decode_fwd(
    vals: Tensor,
    idx: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None = None,
    row_ptr: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """:func:`fastsae.reference.decode_fwd`."""
    n_tokens = len(idx) if row_ptr is None else len(row_ptr) - 1
    out = torch.empty(n_tokens, W_dec.shape[1], dtype=dtype or W_dec.dtype)
    threads = torch.get_num_threads()
    _C.decode_fwd(vals, idx, row_ptr, W_dec, _float(b_dec), out, threads=threads)
    return out


def decode_bwd_vals(g: Tensor, idx: Tensor, W_dec: Tensor, row_ptr: Tensor | None = None) -> Tensor:
    """:func:`fastsae.reference.decode_bwd_vals`."""
    dvals = torch.empty(idx.shape, dtype=torch.float32)
    _C.decode_bwd_vals(_rows(g), idx, row_ptr, W_dec, dvals, threads=torch.get_num_threads())
    return dvals


def decode_error(
    vals: Tensor,
    idx: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    target: Tensor,
    row_ptr: Tensor | None = None,
    reconstruct: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`fastsae.reference.decode_error`."""
    error = torch.empty(target.shape, dtype=torch.float32)
    reconstruction = torch.empty(len(error) if reconstruct else 0, error.shape[1])
    dvals = torch.empty(idx.shape, dtype=torch.float32)
    sse = _C.decode_error(
        vals,
        idx,
        row_ptr,
        W_dec,
        _float(b_dec),
        _rows(target.detach()),
        error,
        reconstruction if reconstruct else None,
        dvals,
        threads=torch.get_num_threads(),
    )
    return torch.tensor(sse, dtype=torch.float32), error, reconstruction, dvals


def auction(values: Tensor, columns: Tensor, n_columns: int, step: float) -> tuple[Tensor, Tensor]:
    """:func:`fastsae.reference.auction`."""
    partners = torch.empty(len(values), dtype=torch.int64)
    prices = torch.empty(n_columns, dtype=torch.float64)
    _C.auction(values, columns, step, partners, prices)
    return partners, prices


def inverse_index(
    idx: Tensor, n_latents: int, row_ptr: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`fastsae.reference.inverse_index`; token and entry end in room for the padding."""
    n_tokens = len(idx) if row_ptr is None else len(row_ptr) - 1
    latent_ptr = torch.empty(n_latents + 1, dtype=torch.int64)
    token = torch.empty(idx.numel(), dtype=torch.int32)
    entry = torch.empty_like(token)
    threads = torch.get_num_threads()
    _C.build_index(idx, row_ptr, n_tokens, latent_ptr, token, entry, threads=threads)
    return latent_ptr, token, entry


def row_gradients(
    coef: Tensor,
    idx: Tensor,
    src: Tensor,
    n_latents: int,
    row_ptr: Tensor | None = None,
    dtype: torch.dtype | None = None,
    need_rows: bool = True,
) -> tuple[Tensor, Tensor]:
    """:func:`fastsae.reference.row_gradients`."""
    index = inverse_index(idx, n_latents, row_ptr)
    rows = torch.empty(n_latents if need_rows else 0, src.shape[1], dtype=dtype or torch.float32)
    sums = torch.empty(n_latents, dtype=torch.float32)
    wanted = rows if need_rows else None
    threads = torch.get_num_threads()
    _C.row_gradients(*index, coef.view(-1), _rows(src), wanted, sums, threads=threads)
    return rows, sums


def column_sum(m: Tensor, coef: Tensor | None = None) -> Tensor:
    """:func:`fastsae.reference.column_sum`."""
    out = torch.empty(m.shape[1], dtype=torch.float32)
    _C.column_sum(_rows(m.detach()), _float(coef), out, threads=torch.get_num_threads())
    return out


def project_rows_(grad: Tensor, W_dec: Tensor) -> None:
    """:func:`fastsae.reference.project_rows_`."""
    _C.project_rows(grad, W_dec.detach(), threads=torch.get_num_threads())
    increment_version(grad)


def normalize_rows_(W_dec: Tensor) -> None:
    """:func:`fastsae.reference.normalize_rows_`."""
    _C.normalize_rows(W_dec.detach(), threads=torch.get_num_threads())
    increment_version(W_dec)


def _adam_inputs(
    p: Tensor, dense: Tensor | None, gradients: list[RowGradient]
) -> tuple[Tensor, Tensor | None, list[tuple[Tensor, ...]]]:
    matrix = as_rows(p.detach())
    segments: list[tuple[Tensor, ...]] = []
    for g in gradients:
        index = g.inverse or inverse_index(g.idx, len(matrix), g.row_ptr)
        segments.append((*index, g.coef.contiguous().view(-1), _rows(g.src)))
    return matrix, None if dense is None else dense.contiguous().view(matrix.shape), segments


def gradient_square_norm(
    p: Tensor, dense: Tensor | None, gradients: list[RowGradient], project: bool
) -> float:
    """:func:`fastsae.reference.gradient_square_norm`."""
    inputs = _adam_inputs(p, dense, gradients)
    return _C.gradient_square_norm(*inputs, project, threads=torch.get_num_threads())


def adam_(
    p: Tensor,
    dense: Tensor | None,
    gradients: list[RowGradient],
    project: bool,
    m: Tensor | None,
    v: Tensor,
    last: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    scale: float,
    step: int,
    lazy: bool,
    *,
    scales: Scales = (None, None),
    stochastic_rounding: bool = False,
    first_row: int = 0,
) -> None:
    """:func:`fastsae.reference.adam_`."""
    matrix, grad, segments = _adam_inputs(p, dense, gradients)
    _C.adam(
        matrix,
        None if m is None else m.view(matrix.shape),
        v.view(matrix.shape),
        *scales,
        last,
        grad,
        segments,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        scale=scale,
        step=step,
        first_row=first_row,
        lazy=lazy,
        project=project,
        normalize=project,
        stochastic_rounding=stochastic_rounding,
        threads=torch.get_num_threads(),
    )
    increment_version([t for t in (p, m, v, *scales, last) if t is not None])
