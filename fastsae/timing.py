"""The unit of every ratio. Needs torch alone: bench/ loads this file without the package."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor


def product_seconds(x: Tensor, W_enc: Tensor, repeats: int = 5) -> float:
    """Seconds of one dense encoder product, torch.mm(x, W_encᵀ) in fp32: the unit of every ratio.

    The fastest of `repeats` runs, whole or in blocks of 4096 latents (whole only where the (N, F)
    result stays under 2 GiB), into memory already touched.
    """
    x, W = x.float(), W_enc.detach().float()
    widths = {min(4096, len(W))}
    if len(x) * len(W) * 4 < 2**31:
        widths.add(len(W))
    best = math.inf
    for width in widths:
        out = torch.zeros(len(x), width)
        for _ in range(repeats):
            start = time.perf_counter()
            for i in range(0, len(W), width):
                block = W[i : i + width]
                torch.mm(x, block.T, out=out[:, : len(block)] if len(block) < width else out)
            best = min(best, time.perf_counter() - start)
    return best
