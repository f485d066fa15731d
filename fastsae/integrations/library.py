"""What every integration does with its library: check its version, replace parts, put them back."""

from __future__ import annotations

import importlib.metadata
import threading
from collections.abc import Callable, Iterable
from typing import Any

Replacement = tuple[Any, str, Any]
"""A module or class, the name of an attribute of its own, and what takes its place."""


def check_version(distribution: str, proven: tuple[str, ...], force: bool) -> None:
    """RuntimeError unless the installed version of a distribution is a proven one, or `force`."""
    found = importlib.metadata.version(distribution)
    if not force and found not in proven:
        raise RuntimeError(
            f"{distribution}: expected version {' or '.join(proven)}, which this was proven with, "
            f"got {found}; force=True uses it all the same"
        )


class Replacements:
    """Attributes of one library that stay replaced while somebody wants it, from any thread."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.owners: set[Accelerated] = set()
        self.settings: dict[str, Any] = {}
        self.originals: dict[tuple[Any, str], Any] = {}
        self.ours: dict[tuple[Any, str], Any] = {}

    def add_owner(self, make: Callable[[], Iterable[Replacement]], **settings: Any) -> Accelerated:
        """Replaces what `make` returns if nothing is replaced yet.

        settings: what `make` depends on; RuntimeError where others are in force.
        """
        with self.lock:
            if self.owners and settings != self.settings:
                raise RuntimeError(
                    f"accelerate: expected {_listed(self.settings)}, which is in force until its "
                    f"restore(), got {_listed(settings)}"
                )
            if not self.owners:
                self.ours = {(where, name): ours for where, name, ours in make()}
                self.originals = {(where, name): vars(where)[name] for where, name in self.ours}
                self.settings = settings
                for (where, name), ours in self.ours.items():
                    setattr(where, name, ours)
            owner = Accelerated(self)
            self.owners.add(owner)
            return owner

    def remove_owner(self, owner: Accelerated) -> None:
        """The last one puts back what nobody else has replaced since."""
        with self.lock:
            self.owners.discard(owner)
            if self.owners:
                return
            for (where, name), original in self.originals.items():
                if vars(where).get(name) is self.ours[where, name]:
                    setattr(where, name, original)
            self.originals, self.ours = {}, {}


class Accelerated:
    """Keeps a library accelerated until `restore`, or the end of a `with`.

    Where several do, the last one's restore puts everything back.
    """

    def __init__(self, replacements: Replacements) -> None:
        self.replacements = replacements

    def restore(self) -> None:
        """A second call does nothing."""
        self.replacements.remove_owner(self)

    def __enter__(self) -> Accelerated:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()


def _listed(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items())
