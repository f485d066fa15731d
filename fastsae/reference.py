"""The oracle: what every kernel computes, in plain torch, in any floating dtype and on any device.

A token x (D) is encoded, its k best latents are selected, and decoded again::

    h = W_enc x + b_enc      (F)    pre-activations; x is centred already
    S = the k largest h_i > 0       in the order (h descending, latent id ascending)
    x̂ = b_dec + Σ_{i in S} h_i W_dec[i]

Codes of N tokens are ``vals`` and ``idx``, both (N, K), padded with value 0 and id -1; or, where
the number of latents varies from token to token, (nnz) with ``row_ptr`` (N+1), the entries of token
n being row_ptr[n] .. row_ptr[n+1]. ``idx`` is int32. Row i of W_enc (F, D) and of W_dec (F, D)
belongs to latent i.

With S held constant the gradients of a loss L are, for g = ∂L/∂x̂::

    dvals = <g[n], W_dec[idx]>          dW_dec[i] = Σ vals·g[n]     db_dec = Σ_n g[n]
    dW_enc[i] = Σ dvals·x[n]            db_enc[i] = Σ dvals         dx[n] = Σ dvals·W_enc[idx]

the sums for a latent i going over the tokens n that selected it. `encode` and `decode_fwd` are also
differentiable by torch's autograd, and agree with these formulas.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastsae import moments

if TYPE_CHECKING:
    from fastsae.moments import Scales
    from fastsae.ops import RowGradient


class NotFinite(ValueError):
    """Raised by every backend on a CPU for an input or a result that is not finite."""


def _check_finite(t: Tensor | None, name: str) -> None:
    if t is not None and not bool(torch.isfinite(t).all()):
        bad = int((~torch.isfinite(t)).reshape(len(t), -1).any(1).nonzero()[0])
        raise NotFinite(f"{name}: expected finite values, got a non-finite one in row {bad}")


def _check_ids(ids: Tensor, name: str, low: int, high: int) -> None:
    wrong = ((ids < low) | (ids >= high)).reshape(-1)
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        got = int(ids.reshape(-1)[at])
        raise IndexError(f"{name}: expected values in [{low}, {high}), got {got} at position {at}")


def _check_latents(latents: Tensor, n_latents: int) -> None:
    """What csrc/bindings.cpp checks; contents only on a CPU, to wait for no other device."""
    if latents.dtype != torch.int32:
        raise TypeError(f"latents: expected torch.int32, got {latents.dtype}")
    if latents.ndim != 1:
        raise ValueError(f"latents: expected shape (*), got {tuple(latents.shape)}")
    if latents.device.type != "cpu":
        return
    _check_ids(latents, "latents", 0, n_latents)
    falls = latents[1:] <= latents[:-1]
    if bool(falls.any()):
        at = 1 + int(falls.nonzero()[0])
        raise ValueError(
            f"latents: expected strictly ascending ids, got {int(latents[at])} at position {at}"
        )


def _check_pairs(idx: Tensor, n_latents: int, row_ptr: Tensor | None) -> None:
    """What csrc/bindings.cpp checks; contents only on a CPU, to wait for no other device."""
    if row_ptr is not None:
        if row_ptr.dtype != torch.int64:
            raise TypeError(f"row_ptr: expected torch.int64, got {row_ptr.dtype}")
        if row_ptr.ndim != 1 or len(row_ptr) < 1:
            raise ValueError(f"row_ptr: expected shape (N+1), got {tuple(row_ptr.shape)}")
        if row_ptr.device.type == "cpu":
            first, last = int(row_ptr[0]), int(row_ptr[-1])
            falls = int((row_ptr[1:] < row_ptr[:-1]).sum())
            if (first, last, falls) != (0, len(idx), 0):
                raise ValueError(
                    f"row_ptr: expected an ascending sequence from 0 to nnz = {len(idx)}, "
                    f"got {first} to {last} with {falls} falls"
                )
    if idx.device.type == "cpu":
        _check_ids(idx, "idx", -1, n_latents)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    with torch.autocast(a.device.type, enabled=False):  # it would round the product to 16 bits
        return a @ b


class TooManyPairs(RuntimeError):
    """Raised by `encode_threshold` where more pairs than its limit pass."""


def _pre_activations(
    x: Tensor, W: Tensor, b: Tensor | None, precision: str, dtype: torch.dtype
) -> Tensor:
    """h = x Wᵀ + b (N, rows of W). NotFinite where an input or a value of h is not."""
    if precision == "bf16":
        x, W = x.bfloat16(), W.bfloat16()
    x, W = x.to(dtype), W.to(dtype)
    _check_finite(x, "x")
    _check_finite(W, "W_enc")
    _check_finite(b, "b_enc")
    h = _matmul(x, W.T) if b is None else _matmul(x, W.T) + b.to(dtype)
    _check_finite(h, "pre-activations")
    return h


def _scores(
    h: Tensor,
    scale: Tensor | None,
    absolute: bool,
    guide: Tensor | None = None,
    W_dec: Tensor | None = None,
) -> Tensor:
    """What the selection compares: h or |h|, times scale, times 1 + |guide W_decᵀ|."""
    score = h.detach().abs() if absolute else h.detach()
    if scale is not None:
        _check_finite(scale, "scale")
        score = score * scale.to(h.dtype)
    if guide is not None and W_dec is not None:
        _check_finite(guide, "guide")
        score = score * (1 + _matmul(guide.to(h.dtype), W_dec.detach().to(h.dtype).T).abs())
    return score


def _dtype(x: Tensor, W_enc: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, W_enc.dtype), torch.float32)


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
) -> tuple[Tensor, Tensor]:
    """The k pairs of each token with the largest positive score: ``vals``, ``idx``, both (N, k).

    x (N, D) centred tokens, W_enc (F, D), b_enc (F) or None. ``latents`` (int32, ascending) limits
    the choice to some latents. With precision "bf16", x and W_enc are rounded to bf16 first; "fp32"
    and "screened" are the same here. vals are the pre-activations h, float64 for float64 inputs and
    float32 otherwise. The score is h, or |h| with ``absolute``, times ``scale`` (F, float32, at
    least 0; a latent of scale 0 is never selected), times 1 + |<guide[n], W_dec[i]>| with ``guide``
    (N, D_out, float32). Fewer than k are kept where fewer scores are positive. ValueError where an
    input or a pre-activation is not finite.
    """
    dtype = _dtype(x, W_enc)
    if latents is not None:
        _check_latents(latents, len(W_enc))
    ids = torch.arange(len(W_enc), device=x.device) if latents is None else latents.long()
    h = _pre_activations(x, W_enc[ids], None if b_enc is None else b_enc[ids], precision, dtype)
    score = _scores(
        h,
        None if scale is None else scale[ids],
        absolute,
        guide,
        None if W_dec is None else W_dec[ids],
    )
    kept = min(k, len(ids))
    score, order = (t[:, :kept] for t in score.sort(dim=1, descending=True, stable=True))
    positive = score > 0
    vals = h.gather(1, order).where(positive, 0)
    idx = ids[order].where(positive, -1).to(torch.int32)
    pad = (0, k - kept)
    return torch.nn.functional.pad(vals, pad), torch.nn.functional.pad(idx, pad, value=-1)


def _as_rows(h: Tensor, score: Tensor, kept: Tensor, room: int) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs where ``kept`` (N, F) by token, then score descending, then latent; and padding."""
    token, latent = kept.nonzero(as_tuple=True)
    order = score[token, latent].sort(descending=True, stable=True).indices
    order = order[token[order].sort(stable=True).indices]
    token, latent = token[order], latent[order]
    row_ptr = torch.zeros(len(h) + 1, dtype=torch.int64, device=h.device)
    row_ptr[1:] = kept.sum(1).cumsum(0)
    row_ptr[-1] = room
    pad = (0, room - len(token))
    vals = torch.nn.functional.pad(h[token, latent], pad)
    return vals, torch.nn.functional.pad(latent.to(torch.int32), pad, value=-1), row_ptr


def encode_batch(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    budget: int,
    precision: str = "screened",
    *,
    scale: Tensor | None = None,
    absolute: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The ``budget`` pairs of the whole batch with the largest positive score, as rows of tokens.

    vals, idx (room) and row_ptr (N+1), room = min(budget, N·F). Arguments and score as in
    :func:`encode`; equal scores by token, then by latent, ascending. Where fewer are positive, the
    last token's row ends in padding, value 0 and id -1.
    """
    h = _pre_activations(x, W_enc, b_enc, precision, _dtype(x, W_enc))
    score = _scores(h, scale, absolute)
    room = min(budget, h.numel())
    order = score.reshape(-1).sort(descending=True, stable=True).indices[:room]
    kept = torch.zeros(h.numel(), dtype=torch.bool, device=h.device)
    kept[order] = True
    return _as_rows(h, score, kept.view(h.shape) & (score > 0), room)


def encode_columns(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    budgets: Tensor,
    room: int,
    precision: str = "screened",
) -> tuple[Tensor, Tensor, Tensor]:
    """For each latent i its budgets[i] largest positive pre-activations in the batch.

    vals, idx (room) and row_ptr (N+1), as rows of tokens, padded as in :func:`encode_batch`.
    budgets (F, int32, at least 0); room at least Σ min(budgets, N), ValueError if not. Equal values
    of a latent by token ascending.
    """
    h = _pre_activations(x, W_enc, b_enc, precision, _dtype(x, W_enc))
    _check_budgets(budgets, len(x), room)
    values = h.detach()
    rank = values.sort(dim=0, descending=True, stable=True).indices.argsort(dim=0)
    return _as_rows(h, values, (rank < budgets) & (values > 0), room if len(x) else 0)


def _check_budgets(budgets: Tensor, n_tokens: int, room: int) -> None:
    """Contents only on a CPU, to wait for no other device."""
    if budgets.dtype != torch.int32:
        raise TypeError(f"budgets: expected torch.int32, got {budgets.dtype}")
    if budgets.device.type == "cpu":
        if len(budgets) and int(budgets.min()) < 0:
            raise ValueError(f"budgets: expected at least 0, got {int(budgets.min())}")
        needed = int(budgets.clamp(max=n_tokens).sum())
        if needed > room:
            raise ValueError(f"room: expected at least Σ min(budgets, N) = {needed}, got {room}")


def encode_threshold(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    thresholds: Tensor,
    limit: int | None = None,
    precision: str = "screened",
) -> tuple[Tensor, Tensor, Tensor]:
    """All pairs with h > thresholds[latent]: vals, idx (nnz) and row_ptr (N+1).

    thresholds (F, float32): any but NaN; inf shuts a latent out. Within a token by value
    descending, then latent ascending; values may be negative where a threshold is. TooManyPairs
    where more than ``limit`` pairs pass.
    """
    h = _pre_activations(x, W_enc, b_enc, precision, _dtype(x, W_enc))
    if bool(thresholds.isnan().any()):
        raise ValueError("thresholds: expected numbers, got a NaN")
    kept = h.detach() > thresholds.to(h.dtype)
    nnz = int(kept.sum())
    if limit is not None and nnz > limit:
        raise TooManyPairs(f"more than {limit} pairs pass their thresholds")
    return _as_rows(h, h.detach(), kept, nnz)


def padded(t: Tensor, row_ptr: Tensor | None, fill: float) -> Tensor:
    """Entries (nnz) by row_ptr as a (N, longest row) matrix; an (N, K) matrix as it is."""
    if row_ptr is None:
        return t
    lengths = row_ptr.diff()
    width = int(lengths.max()) if len(lengths) else 0
    at = torch.arange(width, device=t.device)
    there = at < lengths[:, None]
    out = t.new_full((len(lengths), width), fill)
    return out.masked_scatter(there, t)


def decode_fwd(
    vals: Tensor,
    idx: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None = None,
    row_ptr: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x̂ (N, D) = b_dec + Σ vals·W_dec[idx], the terms in storage order; in `dtype`, or W_dec's."""
    _check_pairs(idx, len(W_dec), row_ptr)
    vals, idx = padded(vals, row_ptr, 0), padded(idx, row_ptr, -1).long()
    out = vals.new_zeros(len(idx), W_dec.shape[1])
    if b_dec is not None:
        out = out + b_dec.to(out.dtype)
    for j in range(idx.shape[1]):
        there = idx[:, j : j + 1] >= 0
        term = vals[:, j : j + 1] * W_dec[idx[:, j].clamp(min=0)].to(out.dtype)
        out = out + term.where(there, 0)
    return out.to(dtype or W_dec.dtype)


def decode_bwd_vals(g: Tensor, idx: Tensor, W_dec: Tensor, row_ptr: Tensor | None = None) -> Tensor:
    """dvals = <g[n], W_dec[idx]>, in idx's shape; 0 for padding. g (N, D)."""
    _check_pairs(idx, len(W_dec), row_ptr)
    dtype = torch.promote_types(W_dec.dtype, torch.float32)
    rows = padded(idx, row_ptr, -1).long()
    columns = []
    for j in range(rows.shape[1]):
        dots = (g.to(dtype) * W_dec[rows[:, j].clamp(min=0)].to(dtype)).sum(1)
        columns.append(dots.where(rows[:, j] >= 0, 0))
    dvals = torch.stack(columns, 1) if columns else g.new_zeros(len(rows), 0, dtype=dtype)
    if row_ptr is None:
        return dvals
    there = torch.arange(rows.shape[1], device=g.device) < row_ptr.diff()[:, None]
    return dvals[there]


def decode_error(
    vals: Tensor,
    idx: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    target: Tensor,
    row_ptr: Tensor | None = None,
    reconstruct: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """sse = Σ‖error‖² (0-d), error = x̂ - target and x̂ (N, D), and dvals = <error, W_dec[idx]>.

    Without `reconstruct`, x̂ is returned empty, (0, D).
    """
    wide = W_dec.to(torch.promote_types(W_dec.dtype, torch.float32))
    reconstruction = decode_fwd(vals, idx, wide, b_dec, row_ptr)
    error = reconstruction - target.to(wide.dtype)
    dvals = decode_bwd_vals(error, idx, wide, row_ptr)
    return error.square().sum(), error, reconstruction[: None if reconstruct else 0], dvals


def inverse_index(
    idx: Tensor, n_latents: int, row_ptr: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """For each latent its tokens: latent_ptr (n_latents+1) int64, token and entry (pairs) int32.

    Latent f was selected by token[latent_ptr[f] : latent_ptr[f+1]], ascending; `entry` says where
    the pair stands in the flattened vals.
    """
    _check_pairs(idx, n_latents, row_ptr)
    if row_ptr is None:
        n, k = idx.shape
        token = torch.arange(n, device=idx.device).repeat_interleave(k)
    else:
        lengths = row_ptr.diff()
        token = torch.arange(len(lengths), device=idx.device).repeat_interleave(lengths)
    flat = idx.reshape(-1).long()
    entry = flat.argsort(stable=True)
    entry = entry[(flat[entry] >= 0)]
    latent_ptr = torch.zeros(n_latents + 1, dtype=torch.int64, device=idx.device)
    latent_ptr[1:] = flat[entry].bincount(minlength=n_latents).cumsum(0)
    return latent_ptr, token[entry].to(torch.int32), entry.to(torch.int32)


def row_gradients(
    coef: Tensor,
    idx: Tensor,
    src: Tensor,
    n_latents: int,
    row_ptr: Tensor | None = None,
    dtype: torch.dtype | None = None,
    need_rows: bool = True,
) -> tuple[Tensor, Tensor]:
    """Σ coef·src[n] over each latent's tokens n (n_latents, D), in `dtype`, and Σ coef (n_latents).

    With coef = vals and src = g it is dW_dec; with coef = dvals and src = x, dW_enc and db_enc.
    Without need_rows the first is returned empty, (0, D).
    """
    _, token, entry = inverse_index(idx, n_latents, row_ptr)
    wide = torch.promote_types(src.dtype, torch.float32)
    flat, latent = coef.reshape(-1)[entry.long()].to(wide), idx.reshape(-1)[entry.long()].long()
    rows = src.new_zeros(n_latents if need_rows else 0, src.shape[1], dtype=wide)
    if need_rows:
        rows.index_add_(0, latent, flat[:, None] * src[token.long()].to(wide))
    sums = flat.new_zeros(n_latents).index_add_(0, latent, flat)
    return rows.to(dtype or wide), sums


def column_sum(m: Tensor, coef: Tensor | None = None) -> Tensor:
    """Σ_r coef[r]·m[r] (D), coef = 1 where it is None. m (R, D)."""
    wide = m.to(torch.promote_types(m.dtype, torch.float32))
    return wide.sum(0) if coef is None else _matmul(coef.to(wide.dtype), wide)


def project_rows_(grad: Tensor, W_dec: Tensor) -> None:
    """grad[i] -= <grad[i], d> d, d = W_dec[i] / ‖W_dec[i]‖: what would only change a row's norm."""
    wide = torch.promote_types(W_dec.dtype, torch.float32)
    W, g = W_dec.detach().to(wide), grad.to(wide)
    square = W.square().sum(1, keepdim=True)
    coef = ((g * W).sum(1, keepdim=True) / square).where(square > 0, 0)
    grad.copy_(g - coef * W)


def normalize_rows_(W_dec: Tensor) -> None:
    """Scales every row of W_dec to norm 1; a row of zeros stays."""
    W = W_dec.detach()
    norm = W.to(torch.promote_types(W.dtype, torch.float32)).norm(dim=1, keepdim=True)
    W.copy_((W / norm).where(norm > 0, W))


def as_rows(p: Tensor) -> Tensor:
    """A parameter of any shape as a matrix (rows, width), same memory; a vector is one row."""
    return p.view(-1, p.shape[-1]) if p.ndim >= 2 else p.view(1, -1)


def gradient_rows(
    p: Tensor, dense: Tensor | None, gradients: list[RowGradient], project: bool
) -> tuple[Tensor, Tensor]:
    """The gradient that `adam_` scales and applies (rows, D), and which rows have one (rows)."""
    matrix = as_rows(p.detach())
    grad = matrix.new_zeros(matrix.shape, dtype=torch.promote_types(p.dtype, torch.float32))
    touched = torch.full((len(matrix),), dense is not None, device=p.device)
    if dense is not None:
        grad += dense.reshape(matrix.shape)
    for g in gradients:
        rows, _ = row_gradients(g.coef, g.idx, g.src, len(matrix), g.row_ptr, grad.dtype)
        grad += rows
        touched[g.idx[g.idx >= 0].long()] = True
    if project:
        project_rows_(grad, matrix)
    return grad, touched


def gradient_square_norm(
    p: Tensor, dense: Tensor | None, gradients: list[RowGradient], project: bool
) -> float:
    """‖g‖² of that gradient."""
    return float(gradient_rows(p, dense, gradients, project)[0].double().square().sum())


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
    """:func:`fastsae.ops.adam_`: m ← β₁m + (1-β₁)g, v ← β₂v + (1-β₂)g², p ← p - lr m̂ / (√v̂ + ε).

    m̂ = m / (1 - β₁^step) and v̂ = v / (1 - β₂^step) (Kingma & Ba 2015, algorithm 1).
    """
    grad, touched = gradient_rows(p, dense, gradients, project)
    if not lazy and m is not None:
        touched = touched | (last > 0)
    if weight_decay:
        touched = torch.ones_like(touched)
    if not bool(touched.any()):
        return
    matrix = as_rows(p.detach())
    g = grad[touched] * scale
    w = matrix[touched].to(grad.dtype)
    kept = [(t.view(matrix.shape), s) for t, s in zip((m, v), scales, strict=True) if t is not None]
    old = [moments.read(t[touched], None if s is None else s[touched]) for t, s in kept]
    second = old[-1]
    if m is None:
        second = second * (beta2 ** (step - 1 - last[touched].to(second.dtype)))[:, None]
        first = g
    else:
        first = old[0] * beta1 + g * (1 - beta1)
    second = second * beta2 + g * g * (1 - beta2)
    last[touched] = step
    denominator = moments.root(second) / (1 - beta2**step) ** 0.5 + eps
    w = w * (1 - lr * weight_decay) - first * (lr / (1 - beta1**step)) / denominator
    if project:
        normalize_rows_(w)
    words = of_parameter = None
    if stochastic_rounding or scales[1] is not None:
        rows = touched.nonzero()[:, 0] + first_row
        words, of_parameter = moments.random_words(step, rows, matrix.shape[1])
    new = [] if m is None else [(first, words)]
    new.append((second, None if words is None else words >> 16))
    for (t, s), (value, bits) in zip(kept, new, strict=True):
        t[touched], found = moments.write(value, t, bits)
        if s is not None and found is not None:
            s[touched] = found
    matrix[touched] = moments.round_to(w, p.dtype, of_parameter if stochastic_rounding else None)


def auction(values: Tensor, columns: Tensor, n_columns: int, step: float) -> tuple[Tensor, Tensor]:
    """Rows matched with columns for a sum of values within n·step of the largest (Bertsekas 1988).

    values (n, c) float64, at most 4, and columns (n, c) int32: what each row may have; -inf pads.
    The rows without a column bid in order, in rounds: each for the column that gains it most, value
    - price (the first of equals), by as much as it would rather have it than the second best (or
    nothing, which gains 0), and step more, 1e-6 to 1; who had it bids in the next round. A row that
    nothing gains anything stays alone. Returns partners (n) int64, -1 for those, and prices
    (n_columns) float64, at least 0, and 0 where nobody bid.
    """
    worth, ids = values.tolist(), columns.tolist()
    prices, owner = [0.0] * n_columns, [-1] * n_columns
    partners = [-1] * len(worth)
    bidders = list(range(len(worth)))
    while bidders:
        losers = []
        for row in bidders:
            gains = [value - prices[j] for value, j in zip(worth[row], ids[row], strict=True)]
            gain = max(gains, default=0.0)
            if gain <= 0:
                continue
            wanted = ids[row][gains.index(gain)]
            others = (g for g, j in zip(gains, ids[row], strict=True) if j != wanted)
            second = max(0.0, *others, 0.0)
            if owner[wanted] >= 0:
                partners[owner[wanted]] = -1
                losers.append(owner[wanted])
            owner[wanted], partners[row] = row, wanted
            prices[wanted] += gain - second + step
        bidders = losers
    return torch.tensor(partners, dtype=torch.int64), torch.tensor(prices, dtype=torch.float64)
