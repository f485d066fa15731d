"""Steering: what a module returns, changed along an SAE's directions while a model runs.

    add      x + Σ c_i d_i
    ablate   x − Σ z_i d_i
    clamp    x + Σ (v_i − z_i) d_i
    toward   x + λ s

z are the SAE's activations at x, as at inference, and d_i = W_dec[i] / s_in is what one unit of
latent i adds to x̂ (s_in: the input scale). What the SAE leaves unexplained of x stays: ablate and
clamp are x + (x̂' − x̂) with x̂' reconstructed after the change, so a latent that is clamped to the
value it has changes no bit of x. Sums are in float32 or wider; dtype and device stay those of x.

`steered` makes such changes where `fastsae.sites` takes activations. The direction s of a concept
comes from states x_C at the same site, where the model reads text about the concept:

    concept, "relu"       Σ ReLU(h_i) d_i over all F latents: Concept Steerers, eq. 5
    concept, "selection"  Σ z_i d_i over the latents that the SAE's own rule selects
    contrast              the m latents whose mean activation differs most from that in other text

Kim and Ghadiyaram (2025, arXiv 2501.19066) write TopK for their SAE, but steer with a plain ReLU,
and add no bias: that is "relu". They add a shift for each position, which their texts, padded to
one length, allow; its mean over positions, for texts of any length, is ours, as is contrast.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fastsae import ops
from fastsae.blocked import Pairs, blocked
from fastsae.ops.backend import wide_dtype
from fastsae.sae import SAE
from fastsae.sites import edited
from fastsae.sums import row_norms

Change = Callable[[Tensor], Tensor]
"""x (…, D) → what takes its place."""
Form = Literal["relu", "selection"]
Latents = Sequence[int] | Tensor
Values = float | Sequence[float] | Tensor


@contextlib.contextmanager
def steered(
    module: nn.Module, *changes: Change, positions: slice | Sequence[int] | Tensor | None = None
) -> Iterator[None]:
    """Within it, what the module returns goes through the changes, one after another.

    The module returns x (…, D), or a tuple that begins with it. positions: which of the L in
    (…, L, D), counted in each call of the module by itself: a slice, indices, or bool (L); None:
    all. ValueError, when the model runs: positions or a width that x does not have.
    """
    chosen: slice | Tensor | None
    if positions is None or isinstance(positions, slice):
        chosen = positions
    else:
        chosen = torch.as_tensor(positions)

    def change(x: Tensor) -> Tensor:
        try:
            part = x if chosen is None else x[..., chosen, :]
        except IndexError:
            shape = tuple(x.shape)
            raise ValueError(
                f"positions: expected some along dimension -2 of {shape}, got {positions}"
            ) from None
        for made in changes:
            part = made(part)
        if chosen is None:
            return part
        out = x.clone()
        out[..., chosen, :] = part
        return out

    with edited(module, change):
        yield


def toward(direction: Tensor, strength: float = 1.0) -> Change:
    """x + strength · direction; direction (D), or (L, D) where x is (…, L, D)."""
    if not direction.is_floating_point():
        raise TypeError(f"direction: expected a floating dtype, got {direction.dtype}")
    if direction.ndim not in (1, 2):
        raise ValueError(f"direction: expected (D) or (L, D), got {tuple(direction.shape)}")
    if not math.isfinite(strength):
        raise ValueError(f"strength: expected a finite number, got {strength}")
    if not bool(direction.isfinite().all()):
        raise ValueError("direction: expected finite values")
    shift = strength * direction.detach().to(wide_dtype(direction.dtype))

    def change(x: Tensor) -> Tensor:
        if x.shape[-shift.ndim :] != shift.shape:
            expected = ", ".join(map(str, shift.shape))
            raise ValueError(f"x: expected shape (…, {expected}), got {tuple(x.shape)}")
        return _moved(x, shift)

    return change


def add(sae: SAE, latents: Latents, strengths: Values) -> Change:
    """x + Σ strengths_i d_i; a strength for all latents or one for each, in units of activation."""
    units = directions(sae, latents)
    wanted = _values("strengths", strengths, len(units)).to(units)
    if wanted.ndim > 1:
        raise ValueError(f"strengths: expected one or {len(units)}, got {tuple(wanted.shape)}")
    return toward(_sum(wanted.expand(len(units)), units))


def clamp(sae: SAE, latents: Latents, values: Values) -> Change:
    """x + Σ (values_i − z_i) d_i: each latent acts as if it had that value.

    values: one for all latents, one for each, or (…, m) for the positions of x (…, D).
    """
    ids = _ids(sae, latents)
    wanted, units = _values("values", values, len(ids)), directions(sae, ids)

    def change(x: Tensor) -> Tensor:
        z = _activations(sae, x, ids)
        if wanted.ndim > 1 and wanted.shape != z.shape[-wanted.ndim :]:
            expected, got = tuple(z.shape), tuple(wanted.shape)
            raise ValueError(f"values: expected the last dimensions of {expected}, got {got}")
        return _moved(x, _sum(wanted.to(z) - z, units))

    return change


def ablate(sae: SAE, latents: Latents) -> Change:
    """x − Σ z_i d_i: what the latents contribute is taken out."""
    return clamp(sae, latents, 0.0)


@torch.no_grad()
def directions(sae: SAE, latents: Latents) -> Tensor:
    """What one unit of each latent adds to the reconstruction: (m, D), float32 or wider."""
    rows = sae.W_dec[_ids(sae, latents)]
    return rows.to(wide_dtype(rows.dtype)) / sae.input_scale


def activations(sae: SAE, x: Tensor, latents: Latents) -> Tensor:
    """Activations of chosen latents at x (…, D), as at inference: (…, m), 0 where not active."""
    return _activations(sae, x, _ids(sae, latents))


@torch.no_grad()
def concept(sae: SAE, x: Tensor, form: Form = "relu") -> Tensor:
    """What the SAE sees in a concept's states x (…, D), as a shift for each: Σ z_i d_i, (…, D).

    form "relu": z = ReLU(W_enc (s_in x − b_dec) + b_enc) of all F latents, in blocks of latents, so
    that no N×F matrix exists; thresholds, gates and budgets of the SAE's rule have no part in it.
    "selection": z of the SAE's own rule at inference. No bias is added. float32 or wider.
    """
    _check(sae)
    if form not in get_args(Form):
        raise ValueError(f"form: expected one of {', '.join(get_args(Form))}, got {form!r}")
    if form == "relu":
        call = sae._call(sae._scaled(x), None)
        found = blocked(
            lambda h: Pairs(torch.relu(h), ()), *call.encoder, sae.W_dec, None, **call.options
        ).x_hat
    else:
        codes = sae.encode(x, training=False)
        wide = wide_dtype(sae.W_dec.dtype)
        found = ops.decode(
            codes.vals, codes.idx, sae.W_dec, row_ptr=codes.row_ptr, dtype=wide, backend=sae.backend
        )
    return (found / sae.input_scale).reshape(x.shape)


@torch.no_grad()
def contrast(sae: SAE, positive: Tensor, negative: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """The latents that tell states (…, D) from others: ids (m), and differences of means (m).

    The m with the largest ‖d_i‖·|mean z_i of positive − mean z_i of negative|, descending, then by
    id; fewer where fewer differ. `add(sae, *contrast(…))` shifts along what they decode to.
    """
    _check(sae)
    if not 1 <= m <= sae.config.d_sae:
        raise ValueError(f"m: expected 1 to {sae.config.d_sae}, got {m}")
    means = []
    for name, x in (("positive", positive), ("negative", negative)):
        codes = sae.encode(x, training=False)
        if not len(codes):
            raise ValueError(f"{name}: expected at least one state, got none")
        of = codes.vals, codes.idx, codes.n_latents, codes.row_ptr
        means.append(ops.latent_sums(*of, backend=sae.backend) / len(codes))
    difference = means[0] - means[1]
    weight = difference.abs() * row_norms(sae.W_dec)
    ids = weight.argsort(descending=True, stable=True)[:m]
    ids = ids[weight[ids] > 0]
    return ids, difference[ids]


def _sum(coefficients: Tensor, units: Tensor) -> Tensor:
    """Σ coefficients_i units_i: (…, m) and (m, D) → (…, D), each sum in one order."""
    rows = coefficients.reshape(-1, len(units))
    ids = torch.arange(len(units), dtype=torch.int32, device=units.device).expand_as(rows)
    return ops.decode(rows, ids, units).reshape(*coefficients.shape[:-1], units.shape[1])


def _moved(x: Tensor, shift: Tensor) -> Tensor:
    return (x.to(wide_dtype(x.dtype)) + shift.to(x.device)).to(x.dtype)


def _activations(sae: SAE, x: Tensor, ids: Tensor) -> Tensor:
    codes, m = sae.encode(x, training=False), len(ids)
    column = torch.full((codes.n_latents + 1,), m, device=codes.device)
    column[ids] = torch.arange(m, device=codes.device)
    place = codes.token_ids(), column[codes.idx.reshape(-1).long()]  # -1, padding: the last of them
    z = codes.vals.new_zeros(codes.n_tokens, m + 1).index_put(place, codes.vals.reshape(-1))
    return z[:, :m].reshape(*x.shape[:-1], m)


def _check(sae: SAE) -> None:
    if sae.config.is_transcoder:
        raise ValueError("sae: expected an autoencoder, got a transcoder")
    if sae.shards is not None:
        raise ValueError("sae: expected all latents in this process, got a shard of them")


def _ids(sae: SAE, latents: Latents) -> Tensor:
    """As int64 (m) on the SAE's device."""
    _check(sae)
    ids, n = torch.as_tensor(latents, device=sae.W_dec.device), sae.config.d_sae
    whole = ids.dtype in (torch.int32, torch.int64) and ids.ndim == 1 and len(ids)
    if not (whole and 0 <= int(ids.min()) <= int(ids.max()) < n):
        raise ValueError(f"latents: expected a list of ids in [0, {n}), got {_shown(latents)}")
    if len(ids.unique()) != len(ids):
        raise ValueError(f"latents: expected each id once, got {_shown(latents)}")
    return ids.long()


def _values(name: str, values: Values, m: int) -> Tensor:
    """As floating numbers, one or (…, m)."""
    found = values if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.float64)
    if found.ndim and found.shape[-1] != m:
        raise ValueError(f"{name}: expected one or {m}, got {_shown(values)}")
    if not bool(found.isfinite().all()):
        raise ValueError(f"{name}: expected finite numbers, got {_shown(values)}")
    return found.detach()


def _shown(given: Latents | Values) -> str:
    return f"{given.tolist() if isinstance(given, Tensor) else given!r:.80}"
