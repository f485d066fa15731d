"""From a stranger's tensors to an SAE: shapes and numbers checked, each tensor copied once."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastsae.config import DTYPES, SAEConfig
from fastsae.convert import log_thresholds
from fastsae.sae import SAE
from fastsae.selection import Selection, State
from fastsae.selection.base import Score
from fastsae.sums import row_norms

_ROWS = 4096


@torch.no_grad()
def build(
    selection: Selection,
    W_enc: Tensor,
    W_dec: Tensor,
    *,
    b_enc: Tensor | None = None,
    b_dec: Tensor | None = None,
    W_skip: Tensor | None = None,
    transcoder: bool = False,
    centred: bool = True,
    input_scale: float = 1.0,
    output_scale: float = 1.0,
    state: dict[str, Tensor] | None = None,
) -> SAE:
    """The SAE with these tensors, in evaluation mode. ValueError: what does not fit, a NaN, an inf.

    W_enc (F, D), W_dec (F, D_out), b_enc (F), b_dec (D_out), W_skip (D_out, D), of any strides and
    floating dtype; the result has the widest of their dtypes. centred: b_dec is subtracted from the
    (scaled) input; a transcoder's encoder bias takes that in. state: tensors of the rule's state,
    (F) or 0-d; "threshold" is JumpReLU's θ itself, of any sign, where inf shuts a latent out, and
    "weighted_threshold" one of h·‖W_dec[i]‖.
    """
    given = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec, "W_skip": W_skip}
    tensors = {name: t for name, t in given.items() if t is not None}
    d_sae, d_in = W_enc.shape
    d_out = W_dec.shape[1] if transcoder else d_in
    shapes = {
        "W_enc": (d_sae, d_in),
        "W_dec": (d_sae, d_out),
        "b_enc": (d_sae,),
        "b_dec": (d_out,),
        "W_skip": (d_out, d_in),
    }
    for name, t in tensors.items():
        _check_shape(name, t, shapes[name])
        if t.dtype not in DTYPES.values():
            raise ValueError(f"{name}: expected one of {', '.join(DTYPES)}, got {t.dtype}")
    dtypes = [t.dtype for t in tensors.values()]
    dtype = dtypes[0]
    for other in dtypes[1:]:
        dtype = torch.promote_types(dtype, other)
    tensors = {name: _owned(name, t, dtype) for name, t in tensors.items()}
    tensors.setdefault("b_dec", torch.zeros(d_out, dtype=dtype))
    if transcoder and centred:
        _check_shape("b_dec", tensors["b_dec"], (d_in,))
        bias = encoder_bias(tensors["W_enc"], tensors.get("b_enc"), -tensors["b_dec"])
        tensors["b_enc"] = bias.to(dtype)
    norms = decoder_norms(tensors["W_dec"])
    config = SAEConfig(
        d_in,
        d_sae,
        selection,
        d_out=d_out if transcoder else None,
        skip=W_skip is not None,
        apply_b_dec_to_input=centred and not transcoder,
        encoder_bias="b_enc" in tensors,
        decoder_norm="unit" if bool(((norms - 1).abs() <= 0.01).all()) else "free",
        dtype=name_of(dtype),  # type: ignore[arg-type]
    )
    sae = SAE(config, device="meta")
    for name, t in tensors.items():
        setattr(sae, name, nn.Parameter(t))
    sae.input_scale = torch.tensor(float(input_scale))
    sae.output_scale = torch.tensor(float(output_scale))
    sae.tokens_since_fired = torch.zeros(d_sae, dtype=torch.int64)
    sae.selection_state = State(selection.state(d_in, d_sae))
    own = sae.selection_state.state_dict()
    for name, t in (state or {}).items():
        if not t.is_floating_point() or t.shape not in ((), (d_sae,)):
            found = f"{t.dtype} of shape {tuple(t.shape)}"
            raise ValueError(f"{name}: expected {d_sae} floats, got {found}")
        check_numbers(name, t, infinities="threshold" in name)
        if name == "weighted_threshold":
            name, t = "threshold", (t.double() / norms).nan_to_num(nan=math.inf)  # 0 is not above 0
        if name == "threshold":
            name, t = "log_threshold", log_thresholds(t, d_sae)
        own[name].copy_(t)
    return sae.eval()


def encoder_bias(W_enc: Tensor, b_enc: Tensor | None, shift: Tensor) -> Tensor:
    """b_enc + W_enc·shift (F), for shift (D): the bias where `shift` was added to the input.

    float64, in blocks of rows.
    """
    moved = torch.cat([rows.double() @ shift.double() for rows in W_enc.split(_ROWS)])
    return moved if b_enc is None else moved + b_enc


def decoder_norms(W_dec: Tensor) -> Tensor:
    """‖W_dec[i]‖ (F), float32 at least; no wider copy of all rows is made."""
    return torch.cat([row_norms(rows) for rows in W_dec.split(_ROWS)])


def _check_shape(name: str, t: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(t.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(t.shape)}")


def _owned(name: str, t: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous copy, which no file backs."""
    copy = torch.empty(t.shape, dtype=dtype).copy_(t)
    check_numbers(name, copy)
    return copy


def check_numbers(name: str, t: Tensor, infinities: bool = False) -> None:
    """ValueError for a NaN or, unless they may be, an infinity."""
    for value in map(float, torch.aminmax(t)) if t.numel() else ():
        if math.isnan(value) or (math.isinf(value) and not infinities):
            raise ValueError(f"{name}: expected finite numbers, got {value}")


def name_of(dtype: torch.dtype) -> str:
    """The name of one of `fastsae.config.DTYPES`."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def score_of(weighted: bool) -> Score:
    """The score of a rule that weighs h with the decoder's norms, or does not."""
    return "activation·decoder_norm" if weighted else "activation"


def check_sizes(data: dict[str, Any], sae: SAE, **names: str) -> None:
    """ValueError where a configuration's d_in, d_sae or d_out contradicts the tensors."""
    sizes = {"d_in": sae.config.d_in, "d_sae": sae.config.d_sae, "d_out": sae.b_dec.numel()}
    for own, name in names.items():
        if data.get(name) is not None and data[name] != sizes[own]:
            raise ValueError(
                f"{name}: expected {sizes[own]}, as the tensors have, got {data[name]!r}"
            )


def refuse_normalization(what: str, normalized: bool) -> None:
    """ValueError: an SAE of activations that no factor normalises, unless the caller does that."""
    if not normalized:
        raise ValueError(
            f"{what}: no SAE here does that; with normalized (--normalized) the SAE "
            "of already normalised activations is read"
        )
