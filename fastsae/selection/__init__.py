"""Selection rules: which (token, latent) pairs survive.

    per_token.py      TopK, AbsTopK, GroupTopK, GradientTopK
    per_batch.py      BatchTopK, MutualChoice, Matryoshka
    per_latent.py     FeatureChoice
    per_pair.py       no budget: what JumpReLU, Gated and ReLU share, each in a file of its name
    temporal_mask.py  TemporalMask, over another rule

A rule is a small frozen dataclass. It turns tokens and encoder parameters into codes through the
streaming ops, so no rule sees an N×F matrix. To add one, subclass `Selection`, give it a `name`,
and it can be used wherever a rule is: in SAEConfig, on disk and on the command line;
docs/selection.md has a worked example.

Where a paper leaves a rule's definition open and no code is public, the rule says "our reading".
"""

from fastsae.selection.base import Call, Reconstruction, Selected, Selection, State
from fastsae.selection.gated import Gated
from fastsae.selection.jumprelu import JumpReLU
from fastsae.selection.per_batch import BatchTopK, Matryoshka, MutualChoice
from fastsae.selection.per_latent import FeatureChoice, zipf_budgets
from fastsae.selection.per_token import AbsTopK, GradientTopK, GroupTopK, TopK
from fastsae.selection.relu import ReLU
from fastsae.selection.temporal_mask import TemporalMask

__all__ = [
    "AbsTopK",
    "BatchTopK",
    "Call",
    "FeatureChoice",
    "Gated",
    "GradientTopK",
    "GroupTopK",
    "JumpReLU",
    "Matryoshka",
    "MutualChoice",
    "ReLU",
    "Reconstruction",
    "Selected",
    "Selection",
    "State",
    "TemporalMask",
    "TopK",
    "zipf_budgets",
]
