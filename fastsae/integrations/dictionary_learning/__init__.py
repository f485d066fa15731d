"""A backend for dictionary_learning: its trainers with a fused step, its dictionaries by codes.

    from fastsae.integrations.dictionary_learning import FastTopKTrainer
    trainSAE(data, trainer_configs=[{"trainer": FastTopKTrainer, ...}], ...)

    from fastsae.integrations.dictionary_learning import accelerated
    dictionary = accelerated(dictionary)

Arguments, state dicts, files, configs and logged figures are the library's; only the layout of the
weights in memory differs (a latent's row is contiguous). docs/dictionary_learning.md has the
limits.
"""

from fastsae.integrations.dictionary_learning.dictionaries import (
    PROVEN,
    AutoEncoderTopK,
    BatchTopKSAE,
    JumpReluAutoEncoder,
    MatryoshkaBatchTopKSAE,
    accelerated,
)
from fastsae.integrations.dictionary_learning.trainers import (
    FastBatchTopKTrainer,
    FastMatryoshkaBatchTopKTrainer,
    FastTopKTrainer,
)

__all__ = [
    "PROVEN",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "FastBatchTopKTrainer",
    "FastMatryoshkaBatchTopKTrainer",
    "FastTopKTrainer",
    "JumpReluAutoEncoder",
    "MatryoshkaBatchTopKSAE",
    "accelerated",
]
