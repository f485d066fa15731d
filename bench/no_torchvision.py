"""Empty modules in place of torchvision, whose builds for CUDA do not load on a CPU."""

from __future__ import annotations

from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class NoTorchvision(MetaPathFinder, Loader):
    """Finds them: overcomplete imports models of images, which a step does not use."""

    class Module(ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        is_it = name.partition(".")[0] == "torchvision"
        return ModuleSpec(name, self, is_package=True) if is_it else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass
