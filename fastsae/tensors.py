"""Safetensors files, written and read without a second copy of what they hold."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

NAMES = {  # of dtypes, in the header
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors of any device, one after the other, and syncs the file to the disk.

    The library's own save_file first makes bytes of all tensors, which doubles the memory. The
    format: 8 bytes with the length of a JSON header, the header (padded so that data begin at a
    multiple of 8), then the tensors' bytes, widest dtypes first so that all are aligned.
    """
    for name, t in tensors.items():
        if t.dtype not in NAMES:
            known = ", ".join(str(dtype) for dtype in NAMES)
            raise TypeError(f"{name}: expected one of {known}, got {t.dtype}")
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header, end = {}, 0
    for name in order:
        t = tensors[name]
        start, end = end, end + t.numel() * t.element_size()
        header[name] = {
            "dtype": NAMES[t.dtype],
            "shape": list(t.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            flat = tensors[name].detach().cpu().contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, each mapped from it: nothing is read before it is used.

    ValueError: no such file, or not a readable one. They stay valid when the file is removed or
    replaced, but not when it is cut short.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file, or not a regular file")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, KeyError) as error:
        raise ValueError(f"{path}: {error}") from None
