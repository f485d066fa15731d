"""Adam on the rows of a parameter, a row's gradient summed from its pairs in the same visit.

    g ← gradients.row_gradient                  dense and pairs, projected off p with project
    g ← g · scale
    m ← β₁ m + (1-β₁) g     v ← β₂ v + (1-β₂) g²
    p ← p (1 - lr·decay) - m·lr/(1-β₁^step) / (√v / √(1-β₂^step) + ε)
    p ← p / ‖p‖                                 with project, where p is not all zeros

Shapes   p, m, v and dense (F, D) or (D), a vector being one row; last (F); scales (F, ⌈D / 256⌉);
         pairs as in rows.py. F may be 0. With project, D ≤ 16384.
Dtypes   p, dense and pairs fp32, bf16 or fp16; m, v fp32 or bf16, each on its own, or int8 and
         uint8 codes with fp32 scales (fastsae/moments.py); last int32; lr, scale and step Python
         numbers or 0-d tensors on p's device, so that a step can be captured in a graph and clipped
         without waiting. Arithmetic is fp32, but bias corrections, once for all rows, are fp64.
Strides  p, m, v, scales, last contiguous; dense any.
Rounding bf16 is rounded to nearest, ties to even; with stochastic_rounding, and codes always, up or
         down, by how near both are, by Philox4x32-7 with key step and counter (⌊d/2⌋, first_row +
         f). Done on bits: the interpreter's cast cuts off. fp16: to nearest, from 65520 on to inf.
Skips    A row without a gradient is not read where `lazy`, where m is None (β₁ = 0: it does not
         move, so its v is caught up by β₂^(step - 1 - last) when it is next touched), and where it
         was never touched, last = 0; but weight_decay moves every row. Where scale is not finite
         nothing is written.

Order    The gradient's, a row's square norm and their sums: gradients.py. Every other operation is
         rounded on its own, so that bits do not depend on the grid or warps, nor on the target but
         for its exp. No atomics: one program writes an element, once.

Bytes    A moved row: p, m, v read and written once (24·D bytes in fp32, 8·D for p and v in bf16,
         12.1·D with codes),
         and its pairs' rows of src. With project p is read twice, but once from memory. No (F, D)
         gradient exists. Above D = 8192, with codes 4096, a projected row spills from registers.
"""

import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from fastsae.kernels import gradients as _gradients
from fastsae.kernels.checks import ANY_FLOAT, OPTIONS, Cost, Variant, expect
from fastsae.kernels.gradients import is_touched, row_gradient, scaled_row
from fastsae.kernels.moments import (
    check_moments,
    load_moment,
    random_words,
    store_moment,
    store_rounded,
)

if TYPE_CHECKING:
    from fastsae.moments import Scales
    from fastsae.ops import RowGradient


@triton.jit
def _constants_kernel(
    lr_ptr,  # (1) any float, as the next two any number
    scale_ptr,
    step_ptr,
    log_beta1,
    log_beta2,
    weight_decay,
    constants_ptr,  # (out) (5) fp64
):
    lr, step = tl.load(lr_ptr).to(tl.float64), tl.load(step_ptr).to(tl.float64)
    tl.store(constants_ptr, tl.load(scale_ptr).to(tl.float64))
    tl.store(constants_ptr + 1, step)
    tl.store(constants_ptr + 2, lr / (1 - tl.exp(step * log_beta1)))
    tl.store(constants_ptr + 3, tl.sqrt(1 - tl.exp(step * log_beta2)))
    tl.store(constants_ptr + 4, 1 - lr * weight_decay)


@triton.jit
def _adam_kernel(
    p_ptr,  # (in, out) (F, D) fp32, bf16 or fp16
    m_ptr,  # (in, out) (F, D) fp32, bf16 or int8, or None
    v_ptr,  # (in, out) (F, D) fp32, bf16 or uint8
    m_scale_ptr,  # (in, out) (F, ⌈D / 256⌉) fp32 with int8, or None
    v_scale_ptr,  # (in, out) with uint8, or None
    last_ptr,  # (out) (F) int32
    before_ptr,  # (F) int32: what last was
    constants_ptr,  # (5) fp64: scale, step, lr / (1 - β₁^step), √(1 - β₂^step), 1 - lr·decay
    dense_ptr,  # (F, D) any of FLOATS, or None
    latent_ptr_ptr,  # (F+1) int64; this and the next five are Segments, or all None
    token_ptr,
    entry_ptr,
    coef_ptr,
    src_ptr,
    partial_ptr,
    D,
    stride_dense_f,
    stride_dense_d,
    stride_src_n,
    stride_src_d,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    log_beta2,
    eps,
    first_row,
    MOVES_ALL: tl.constexpr,
    LAZY: tl.constexpr,
    PROJECT: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    LOG2_D: tl.constexpr,
    CHUNK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    f = tl.program_id(0).to(tl.int64)
    scale = tl.load(constants_ptr).to(tl.float32)
    if not (tl.abs(scale) < float("inf")):
        return
    before = tl.load(before_ptr + f)
    moves = is_touched(f, dense_ptr, latent_ptr_ptr)
    if MOVES_ALL:
        moves = f >= 0
    elif not LAZY and m_ptr is not None:
        moves = moves | (before > 0)
    if not moves:
        return
    d = tl.program_id(1) * (1 << LOG2_D) + tl.arange(0, 1 << LOG2_D)
    in_row = d < D
    at = f * D + d
    pairs = latent_ptr_ptr, token_ptr, entry_ptr, coef_ptr, src_ptr, partial_ptr
    strides = stride_src_n, stride_src_d
    dense = dense_ptr, stride_dense_f, stride_dense_d
    g = scale * row_gradient(
        f, d, D, p_ptr, *dense, pairs, *strides, PROJECT, LOG2_D, CHUNK, UNROLL
    )

    step = tl.load(constants_ptr + 1).to(tl.int32)
    random_p, random_mv = d, d
    if STOCHASTIC or v_scale_ptr is not None:
        half = tl.program_id(1) * (1 << LOG2_D - 1) + tl.arange(0, 1 << LOG2_D - 1)
        row = (half * 0 + f + first_row).to(tl.int32)
        random_mv, random_p = random_words(step, half, row, 1 << LOG2_D)
    if m_ptr is None:
        m = g
    else:
        m = load_moment(m_ptr + at, m_scale_ptr, f, d, D, in_row)
        m = m * beta1 + g * one_minus_beta1
        store_moment(m_ptr + at, m_scale_ptr, m, f, d, D, in_row, random_mv, STOCHASTIC, LOG2_D)
    v = load_moment(v_ptr + at, v_scale_ptr, f, d, D, in_row)
    if m_ptr is None:
        missed = step - 1 - before
        v *= tl.where(missed > 0, tl.exp(missed.to(tl.float32) * log_beta2), 1.0)
    v = v * beta2 + g * g * one_minus_beta2
    random_v = random_mv >> 16
    store_moment(v_ptr + at, v_scale_ptr, v, f, d, D, in_row, random_v, STOCHASTIC, LOG2_D)
    step_size = tl.load(constants_ptr + 2).to(tl.float32)
    root = tl.load(constants_ptr + 3).to(tl.float32)
    keep = tl.load(constants_ptr + 4).to(tl.float32)
    # Again, with PROJECT: from a cache, and fewer registers are needed until here.
    p = tl.load(p_ptr + at, mask=in_row, other=0.0).to(tl.float32)
    p = p * keep - tl.div_rn(m * step_size, tl.div_rn(tl.sqrt_rn(v), root) + eps)
    if PROJECT:
        unit, square = scaled_row(p, LOG2_D)
        p = tl.div_rn(unit, tl.where(square > 0, tl.sqrt_rn(square), 1.0))
    store_rounded(p_ptr + at, p, in_row, random_p, STOCHASTIC)
    if tl.program_id(1) == 0:
        tl.store(last_ptr + f, step)


def adam_(
    p: Tensor,
    dense: Tensor | None,
    gradients: "list[RowGradient]",
    project: bool,
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
    *,
    scales: "Scales" = (None, None),
    stochastic_rounding: bool = False,
    first_row: int = 0,
) -> None:
    """One step of Adam on p, m, v and last, in place, as `reference.adam_`."""
    rows, inputs, config = _gradients.row_inputs(p, dense, gradients, project)
    if m is None and beta1:
        raise ValueError(f"m: expected a tensor, as beta1 is {beta1}, got None")
    check_moments(p, m, v, scales)
    expect("last", last, (len(rows),), (torch.int32,), p)
    scalars = [_on_device(n, x, p) for n, x in (("lr", lr), ("scale", scale), ("step", step))]
    if not p.numel():
        return
    n_slices = triton.cdiv(rows.shape[1], 1 << config["LOG2_D"])
    constants = torch.empty(5, dtype=torch.float64, device=p.device)
    logs = _log(beta1), _log(beta2)
    before = last.clone()  # a warp, or a slice, would write what another has still to read
    with torch.cuda.device_of(p):
        _constants_kernel[1,](*scalars, *logs, float(weight_decay), constants, **OPTIONS)
        _adam_kernel[len(rows), n_slices](
            *(rows, m, v, *scales, last, before, constants, *inputs),
            *(float(beta1), 1.0 - beta1, float(beta2), 1.0 - beta2, logs[1], float(eps), first_row),
            MOVES_ALL=weight_decay != 0,
            LAZY=lazy,
            STOCHASTIC=stochastic_rounding,
            **config,
        )
    increment_version([t for t in (p, m, v, *scales, last) if t is not None])


def _on_device(name: str, number: float | Tensor, p: Tensor) -> Tensor:
    if not isinstance(number, Tensor):
        return torch.full((), number, dtype=torch.float64, device=p.device)
    expect(name, number, (), (*ANY_FLOAT, torch.int32, torch.int64), p)
    return number


def _log(beta: float) -> float:
    """In fp32, as a kernel takes it, also an interpreted one."""
    return torch.tensor(math.log(beta) if beta else -math.inf, dtype=torch.float32).item()


def variants() -> dict[str, Variant]:
    """What the launchers ship, by name; ragged: no size or stride is a multiple of 16, or 1."""
    numbers = "*fp64:16, *fp64:16, *fp64:16, fp32, fp32, fp32, *fp64:16"
    found = {"constants": Variant(_constants_kernel, numbers, OPTIONS)}
    numbers = ", ".join(["fp32"] * 6) + ", i32"
    forms = ("fp32", "fp32"), ("fp32", None), ("bf16", "bf16"), ("fp16", "fp32"), ("fp32", "i8")
    for p, m in forms:
        every = 4 if p == "fp16" else 1
        for name, dense, src, ragged, d, project in _gradients.FORMS[::every]:
            moves = {"MOVES_ALL": False, "LAZY": False, "STOCHASTIC": p == "bf16"}
            v, scale = ("u8", "*fp32:16") if m == "i8" else (m or p, None)
            found[f"{p}-{name}{'-i8' if m == 'i8' else '' if m else '-no-m'}"] = Variant(
                _adam_kernel,
                f"*{p}:16, {m and f'*{m}:16'}, *{v}:16, {scale}, {scale}, "
                "*i32:16, *i32:16, *fp64:16, "
                f"{_gradients.inputs_signature(dense, src, ragged)}, {numbers}",
                {**moves, **_gradients.row_config(d, project)},
            )
    return found


def adam_cost(n_elements: int, state_bytes: int) -> Cost:  # of p, m and v; without the gradient
    return Cost(14 * n_elements, 2 * state_bytes * n_elements, 2 * state_bytes * n_elements)
