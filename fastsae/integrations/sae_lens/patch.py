"""`accelerate` and `restore`."""

from __future__ import annotations

from fastsae.integrations.library import Accelerated, check_version
from fastsae.integrations.sae_lens.fused import TRAINER_METHODS
from fastsae.integrations.sae_lens.methods import METHODS, PROVEN, instead_of, replacements


def accelerate(*, force: bool = False) -> Accelerated:
    """SAELens is faster from here on, and otherwise the same, until `restore`.

    So it is until the last of several calls is ended: by its result's `restore`, or the end of a
    `with accelerate():` block. RuntimeError where its version is not one of PROVEN, unless forced.
    """
    check_version("sae-lens", PROVEN, force)
    return replacements.add_owner(
        lambda: [
            (cls, name, instead_of(cls.__dict__[name], stand_in))
            for cls, name, stand_in in (*METHODS, *TRAINER_METHODS)
        ]
    )


def restore() -> None:
    """SAELens's own methods again, however often it was accelerated; SAEs and trainers stay."""
    for owner in tuple(replacements.owners):
        owner.restore()
