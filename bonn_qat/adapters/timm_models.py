"""Make ``timm.create_model("wrn22_16")`` work after ``import bonn_qat``, which imports neither timm nor torch.

timm has no plugins: a network is registered by importing its module, and :mod:`bonn_qat.models` imports timm. So the
networks are registered now if timm is imported already, else right after timm is imported.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.abc import Loader  # which would import tempfile and random at run time


def register_models() -> None:
    """Register the networks of :mod:`bonn_qat.models` with timm, as soon as timm is imported.

    >>> import bonn_qat, timm
    >>> timm.is_model("wrn22_16")
    True
    """
    if sys.modules.get("timm") is not None:
        importlib.import_module("bonn_qat.models")
    elif not any(isinstance(finder, _TimmFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TimmFinder())


class _TimmFinder:
    """Finds timm where the other finders find it, and adds the registration to its import."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "timm":
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _TimmLoader(spec.loader, self)  # type: ignore[assignment]
                return spec
        return None


class _TimmLoader:
    """timm's own loader, followed by the registration. Afterwards timm has its own loader again."""

    def __init__(self, loader: "Loader", finder: _TimmFinder) -> None:
        self._loader, self._finder = loader, finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        importlib.import_module("bonn_qat.models")
