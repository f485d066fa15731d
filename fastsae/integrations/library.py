"""What every integration does with its library: check its version, replace parts, put them back."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable
from typing import Any


def check_version(distribution: str, proven: tuple[str, ...], force: bool) -> None:
    """RuntimeError unless the installed version of a distribution is a proven one, or `force`."""
    found = importlib.metadata.version(distribution)
    if not force and found not in proven:
        raise RuntimeError(
            f"{distribution}: expected version {' or '.join(proven)}, which this was proven with, "
            f"got {found}; force=True uses it all the same"
        )


class Accelerated:
    """Attributes of a library that are replaced until `restore`, or the end of a `with`.

    replacements: (a module or class, the name of an attribute of its own, what takes its place).
    RuntimeError, before anything is replaced, where an attribute is fastsae's already.
    """

    def __init__(self, replacements: Iterable[tuple[Any, str, Any]]) -> None:
        replacements = list(replacements)
        self.originals = [(owner, name, vars(owner)[name]) for owner, name, _ in replacements]
        for owner, name, original in self.originals:
            if getattr(original, "__module__", "").startswith("fastsae."):
                raise RuntimeError(
                    f"{owner.__name__}.{name}: expected the library's own, got fastsae's; "
                    "restore() that first"
                )
        for owner, name, replacement in replacements:
            setattr(owner, name, replacement)

    def restore(self) -> None:
        """Puts everything back; a second call does nothing."""
        while self.originals:
            setattr(*self.originals.pop())

    def __enter__(self) -> Accelerated:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()
