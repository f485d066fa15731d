"""What a training will need of memory and disk, before anything is allocated.

Exact are the weights, the optimiser's moments and the average; the work of a step is the bound that
tests/test_memory.py holds it to. The rest is what Python and torch take.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from fastsae.config import DTYPES, SAEConfig, TrainConfig
from fastsae.moments import n_bytes
from fastsae.sharding import exchanged

PROCESS = 440 << 20
"""Bytes that Python, torch and the package take without any data."""


@dataclass(frozen=True)
class Plan:
    """Bytes by what they are for."""

    weights: int
    """W_enc, W_dec, W_skip and biases."""
    moments: int
    """Adam's, with scales, and a counter for each row."""
    gradients: int
    """Matrices of gradients; 0 where rows are summed in the update."""
    average: int
    """Of the weights, where asked for."""
    counters: int
    """Tokens since each latent fired, and what a rule keeps of each."""
    step: int
    """Codes, buffers and tokens of a step, two batches ahead, at most; a rule that recomputes has
    its own blocks."""
    shuffled: int = 0
    """Rows that wait in memory to be shuffled: of an iterable, a live model, or files in blocks."""
    process: int = PROCESS
    checkpoints: int = 0
    """On the disk: those that are kept, one that is being written, the weights at the end."""
    exchanged: int = 0
    """What a process receives from others in a step (`fastsae.sharding.exchanged`)."""

    @property
    def memory(self) -> int:
        """All that lies in memory."""
        lasting = self.weights + self.moments + self.gradients + self.average + self.counters
        return lasting + self.shuffled + self.step + self.process


def plan(
    config: SAEConfig,
    train: TrainConfig,
    *,
    latents: int = 1,
    data: int = 1,
) -> Plan:
    """The plan of a training.

    latents, data: of one process of `fastsae.sharding.Shards`, but for the checkpoints, which all
    write together.
    """
    d_in, d_sae, n = config.d_in, -(-config.d_sae // latents), -(-train.batch_size // data)
    d_out = config.d_out or d_in
    matrices = [(d_sae, d_in), (d_sae, d_out)] + ([(d_out, d_in)] if config.skip else [])
    biases = (d_sae if config.encoder_bias else 0) + d_out
    elements = biases + sum(rows * width for rows, width in matrices)
    weights = elements * DTYPES[config.dtype].itemsize
    exact = train.optimizer == "torch-adam"  # whose moments have the weights' dtype
    wide = torch.promote_types(DTYPES[config.dtype], torch.float32).itemsize
    item = DTYPES[config.dtype].itemsize if exact else wide
    kept = 2 if train.beta1 or exact else 1
    counted = sum(rows for rows, _ in matrices) + (2 if config.encoder_bias else 1)
    pairs = n * (_pairs_a_token(config) + (config.k_aux or d_in // 2 if config.auxk_coef else 0))
    state = config.selection.state(1, 1)
    of_matrices = sum(n_bytes(train.state, *shape, item) for shape in matrices)
    moments = kept * (of_matrices + biases * item) + (0 if exact else 4 * counted)
    average = 0 if train.ema is None else elements * wide
    counters = d_sae * (8 + 4 * len(state))
    lasting = weights + moments + average + counters
    return Plan(
        weights=weights,
        moments=moments,
        gradients=weights if exact else 0,
        average=average,
        counters=counters,
        step=(32 << 20) + 16 * n * (d_in + d_out) + 32 * d_sae + 64 * pairs,
        checkpoints=latents * ((train.keep + 1) * lasting + weights),
        exchanged=round(sum(exchanged(config, train, latents, data).values())),
    )


def total(plans: Sequence[Plan]) -> Plan:
    """What trainings take that one process has side by side; their steps take turns."""
    sums = {f.name: sum(getattr(p, f.name) for p in plans) for f in fields(Plan)}
    sums["step"] = max((p.step for p in plans), default=0)
    return Plan(**{**sums, "process": PROCESS})


def _pairs_a_token(config: SAEConfig) -> int:
    rule = config.selection
    k = getattr(rule, rule.k_name, None) if rule.k_name else None
    k = 32 if k is None else k
    if config.multi_topk_coef:
        k *= 5
    return int(min(k * (3 if rule.k_name == "l0" else 1), config.d_sae))


def available() -> int:
    """Bytes of memory that this process may still take: the machine's, and its control group's."""
    free = []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free.append(int(lines["MemAvailable"].split()[0]) * 1024)
    else:
        free.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ):
        try:
            text = Path(limit).read_text().strip()
            if text != "max":
                free.append(int(text) - int(Path(used).read_text()))
        except OSError:
            pass
    return max(0, min(free))


def table(found: Plan, memory: int) -> str:
    """The plan in lines, and whether it fits so many bytes."""
    lines = [
        ("weights", found.weights, ""),
        ("Adam's moments", found.moments, ""),
        ("gradient matrices", found.gradients, "" if found.gradients else "rows, in the update"),
        ("moving average", found.average, ""),
        ("counters", found.counters, ""),
        ("shuffled rows", found.shuffled, ""),
        ("a step, at most", found.step, "codes, tokens, buffers"),
        ("Python and torch", found.process, ""),
        ("memory", found.memory, f"{memory / 1e9:,.2f} GB are there"),
        ("disk", found.checkpoints, "checkpoints and the SAE at the end"),
    ]
    if found.exchanged:
        lines.append(("network", found.exchanged, "received in a step"))
    rows = [f"{name:18} {size / 1e9:9.3f} GB  {remark}".rstrip() for name, size, remark in lines]
    return "\n".join([*rows, "fits" if found.memory <= memory else "does not fit"])


def check(found: Plan, memory: int) -> None:
    """MemoryError with the table: what lasts does not fit, whatever a step takes."""
    if found.memory - found.step > memory:
        raise MemoryError(f"expected a training that fits the memory, got\n{table(found, memory)}")
