"""SAELens, faster: the same code, the same results, no matrix (N, F) and no dense product of one.

    from fastsae.integrations.sae_lens import accelerate
    accelerate()

For the whole step to be fused, train a `Fast…TrainingSAE`; docs/sae_lens.md says what each gives.
"""

from fastsae.integrations.sae_lens.fused import (
    FastBatchTopKTrainingSAE,
    FastJumpReLUTrainingSAE,
    FastMatryoshkaBatchTopKTrainingSAE,
    FastSAETrainer,
    FastTopKTrainingSAE,
)
from fastsae.integrations.sae_lens.methods import PROVEN
from fastsae.integrations.sae_lens.patch import accelerate, restore

__all__ = [
    "PROVEN",
    "FastBatchTopKTrainingSAE",
    "FastJumpReLUTrainingSAE",
    "FastMatryoshkaBatchTopKTrainingSAE",
    "FastSAETrainer",
    "FastTopKTrainingSAE",
    "accelerate",
    "restore",
]
