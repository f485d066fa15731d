"""The library's default optimiser, in one pass over the memory instead of about twenty."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sparsify.sign_sgd import SignSGD
from torch import Tensor

BLOCK = 1 << 15
"""Elements at a time: they stay in the cache, and torch does not wake its threads for so few."""

PROVEN = ("1.4.1",)
"""The versions of schedulefree that the tests ran with."""


def faster(original: Callable[..., Any]) -> Callable[..., Any]:
    """ScheduleFreeWrapper.step for SignSGD on a CPU; every other case is left to the original.

    Schedule-free learning (Defazio et al. 2024, 2405.15682): x is the average of the points z, y a
    point between x and z at which gradients are taken; in training the parameter holds y.
    """

    @torch.no_grad()
    def step(self: Any, closure: Callable[[], Any] | None = None) -> Any:
        given = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        ours = type(self.base) is SignSGD and self.train_mode and not self.weight_decay_at_y
        if closure is not None or not ours or not all(_fits(t) for p in given for t in (p, p.grad)):
            return original(self, closure)
        for group in self.param_groups:
            lr, k = group["lr"], group.get("k", 0)
            highest = group["lr_max"] = max(lr * group.get("d", 1.0), group.get("lr_max", 0))
            weight = (k + 1) ** self.r * highest**self.weight_lr_power
            group["weight_sum"] = group.get("weight_sum", 0.0) + weight
            for p in group["params"]:
                if p.grad is not None:
                    _update(self, p, p.grad, lr, weight / group["weight_sum"])
            group["k"] = k + 1
        return None

    return step


def _fits(t: Tensor) -> bool:
    return t.device.type == "cpu" and t.is_contiguous()


def _update(wrapper: Any, p: Tensor, gradient: Tensor, lr: float, share: float) -> None:
    state = wrapper.state[p]
    if "z" not in state:
        state["z"] = p.detach().clone()
    blocks = (t.view(-1).split(BLOCK) for t in (p.detach(), state["z"], gradient))
    for y, z, g in zip(*blocks, strict=True):
        y.lerp_(z, 1 - 1 / wrapper.momentum)  # now x
        z.add_(g.sign(), alpha=-lr)
        y.lerp_(z, share)
        y.lerp_(z, 1 - wrapper.momentum)
