"""Tell transformers of the `quantry` format without importing it: now if it is there, else when it comes."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_REGISTRY = (
    "transformers.modeling_utils"  # once it is there, so are the tables of quantizers and of attentions
)
_HOOK = "quantry.hf"  # importing it adds ours to those tables


class _RegisterAfter(Loader):
    """Runs the module as its own loader would, then adds the `quantry` format to its tables."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        importlib.import_module(_HOOK)


class _Finder(MetaPathFinder):
    """Finds one module only, once, and steps aside for everything else."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisterAfter(spec.loader)
        return spec


def register_with_transformers() -> None:
    """Idempotent; imports nothing unless transformers can already load models."""
    if _REGISTRY in sys.modules:
        importlib.import_module(_HOOK)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
