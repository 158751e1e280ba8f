"""Tell transformers of the `quantry` format without importing it: now if it is there, else when it comes."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_HOOKS = {  # once the first is there, importing the second adds what is ours to its tables
    "transformers.modeling_utils": "quantry.hf",  # quantizers and attentions
    "transformers.models.auto.modeling_auto": "quantry.cifar_resnet",  # a model type
}


class _RegisterAfter(Loader):
    """Runs the module as its own loader would, then adds what is ours to its tables."""

    def __init__(self, loader: Loader, hook: str) -> None:
        self._loader, self._hook = loader, hook

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        if importlib.util.find_spec("torch") is not None:
            importlib.import_module(self._hook)


class _Finder(MetaPathFinder):
    """Finds a few modules, each once, and steps aside for everything else."""

    def __init__(self, hooks: dict[str, str]) -> None:
        self._hooks = hooks

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        hook = self._hooks.pop(fullname, None)
        if hook is None:
            return None
        if not self._hooks:
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisterAfter(spec.loader, hook)
        return spec


def register_with_transformers() -> None:
    """Idempotent; imports nothing unless transformers can already load models."""
    present = [hook for registry, hook in _HOOKS.items() if registry in sys.modules]
    waiting = {registry: hook for registry, hook in _HOOKS.items() if registry not in sys.modules}
    if waiting and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(waiting))
    for hook in present:  # may itself import what is waited for
        importlib.import_module(hook)
