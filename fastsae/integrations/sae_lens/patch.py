"""`accelerate` and `restore`."""

from __future__ import annotations

from types import TracebackType

from fastsae.integrations.library import check_version
from fastsae.integrations.sae_lens.fused import TRAINER_METHODS
from fastsae.integrations.sae_lens.methods import METHODS, PROVEN, instead_of, replaced


class Acceleration:
    """What `accelerate` returns: as a context manager, it restores at its end what it replaced."""

    def __init__(self, owns: bool) -> None:
        self.owns = owns

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.owns:
            restore()


def accelerate(*, force: bool = False) -> Acceleration:
    """SAELens is faster from here on, and otherwise the same, until `restore`.

    RuntimeError where its version is not one of PROVEN, unless forced. Calling it twice is calling
    it once. With `with accelerate():` the end of the block restores, unless it was on before.
    """
    check_version("sae-lens", PROVEN, force)
    owns = not replaced
    if owns:
        for cls, name, stand_in in (*METHODS, *TRAINER_METHODS):
            original = cls.__dict__[name]
            replaced[cls, name] = original
            setattr(cls, name, instead_of(original, stand_in))
    return Acceleration(owns)


def restore() -> None:
    """SAELens's own methods again; SAEs and trainers need nothing."""
    for (cls, name), original in replaced.items():
        setattr(cls, name, original)
    replaced.clear()
