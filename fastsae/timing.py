"""The unit of every ratio. Needs torch alone: bench/ loads this file without the package."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor


def product_seconds(x: Tensor, W_enc: Tensor, repeats: int = 5, most_bytes: int = 2**31) -> float:
    """Seconds of one dense encoder product, torch.mm(x, W_encᵀ) in fp32: the unit of every ratio.

    On W_enc's device. The fastest of `repeats` runs, whole or in blocks of 4096 latents (whole only
    where the (N, F) result stays under most_bytes), into memory already touched. Of weights that
    are not fp32 each block is a copy, made before it is timed.
    """
    x, W = x.to(W_enc.device, torch.float32), W_enc.detach()
    widths = {min(4096, len(W))}
    if len(x) * len(W) * 4 < most_bytes:
        widths.add(len(W))
    best = math.inf
    for width in widths:
        out = torch.zeros(len(x), width, device=x.device)
        for _ in range(repeats):
            seconds = 0.0
            for i in range(0, len(W), width):
                block = W[i : i + width].float()
                _wait(x)
                start = time.perf_counter()
                torch.mm(x, block.T, out=out[:, : len(block)] if len(block) < width else out)
                _wait(x)
                seconds += time.perf_counter() - start
            best = min(best, seconds)
    return best


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
