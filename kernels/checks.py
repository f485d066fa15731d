"""What the launchers of every kernel share: checks of arguments, options, lists of variants."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ANY_FLOAT = (*FLOATS, torch.float64)

# Kernels spell out their fma. With none left to contract, saying so also keeps Triton's changing
# default out of it.
OPTIONS = {"num_warps": 1, "enable_fp_fusion": False}


class Variant(NamedTuple):
    """One compiled form of a kernel."""

    kernel: Any
    signature: str  # its parameters, as triton.tools.compile has them: "*bf16:16, i32, 1, None"
    config: dict[str, Any]  # what the launcher passes by keyword


class Cost(NamedTuple):
    flops: int
    bytes_gathered: int  # through L2: a row as often as it is asked for
    bytes_once: int  # from memory: a row once, where the kernel's slices stay in L2


def expect(
    name: str,
    tensor: Tensor,
    shape: tuple[int | str, ...],  # a word stands for any size
    dtypes: tuple[torch.dtype, ...],
    beside: Tensor,
    any_stride: bool = False,
) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: expected {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    sizes = zip(shape, tensor.shape, strict=False)
    if tensor.ndim != len(shape) or any(isinstance(a, int) and a != b for a, b in sizes):
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{name}: expected shape ({wanted}), got {tuple(tensor.shape)}")
    if tensor.device != beside.device:
        raise ValueError(f"{name}: expected a tensor on {beside.device}, got {tensor.device}")
    if not any_stride and tensor.ndim and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name}: expected unit inner stride, got strides {tensor.stride()}")


def expect_codes(idx: Tensor, row_ptr: Tensor | None, beside: Tensor) -> tuple[int, int]:
    """Checks idx and row_ptr. Returns N, and K; where K varies, its mean rounded up."""
    if row_ptr is None:
        expect("idx", idx, ("N", "K"), (torch.int32,), beside)
        return idx.shape[0], idx.shape[1]
    expect("idx", idx, ("nnz",), (torch.int32,), beside)
    expect("row_ptr", row_ptr, ("N + 1",), (torch.int64,), beside)
    n_tokens = len(row_ptr) - 1
    least = 2 if len(idx) else 1
    if len(row_ptr) < least:
        raise ValueError(f"row_ptr: expected at least {least} numbers, got {len(row_ptr)}")
    return n_tokens, -(-len(idx) // max(n_tokens, 1))


def expect_decoder(
    vals: Tensor, idx: Tensor, W_dec: Tensor, b_dec: Tensor | None, row_ptr: Tensor | None
) -> tuple[int, int]:
    """Checks what a decode reads. Returns N and K, as `expect_codes`."""
    expect("W_dec", W_dec, ("F", "D"), FLOATS, W_dec)
    found = expect_codes(idx, row_ptr, W_dec)
    expect("vals", vals, tuple(idx.shape), FLOATS, W_dec)
    if b_dec is not None:
        expect("b_dec", b_dec, (W_dec.shape[1],), FLOATS, W_dec)
    return found


def has_tf32(x: Tensor) -> bool:
    """Whether Triton multiplies in tf32 on x's device: of AMD's, on an MI300 alone."""
    if torch.version.hip is None or not x.is_cuda:
        return True
    return "gfx942" in torch.cuda.get_device_properties(x.device).gcnArchName
