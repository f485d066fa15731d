"""Which backend runs an operation, and what every operation checks."""

import importlib
import importlib.util
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor

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


def resolve(backend: str | None, *tensors: Tensor | None) -> str:
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


def kernel_of(backend: str, stem: str, name: str) -> Any:
    module: ModuleType
    if backend == "triton":
        try:
            module = importlib.import_module(f"fastsae.kernels.{stem}")
            return getattr(module, name)
        except (ModuleNotFoundError, AttributeError) as error:
            raise NotImplementedError(f"backend 'triton' has no {name}: {error}") from None
    return getattr(reference if backend == "reference" else cpu, name)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def check(t: Tensor | None, name: str, shape: tuple[int | None, ...]) -> None:
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
