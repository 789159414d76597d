"""`import wq` is enough for quantized repos that transformers itself cannot load here, and still imports nothing.

When transformers' `quantizers.auto` is imported, its `merge_quantization_configs` gets a stand-in that imports `wq.hf`
on the first call, which wraps the real one (see `wq.hf.takeover`), and hands the call on. WQ_TAKEOVER=never leaves
transformers alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module, util
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_TARGET = "transformers.quantizers.auto"


def install() -> None:
    """Put the stand-in in place, now or when transformers is imported."""
    if os.environ.get("WQ_TAKEOVER") == "never" or any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    if _TARGET in sys.modules:
        _stand_in(sys.modules[_TARGET])
    else:
        sys.meta_path.insert(0, _Finder())


def _stand_in(module: ModuleType) -> None:
    owner = getattr(module, "AutoHfQuantizer", None)
    if owner is None or "wq.hf" in sys.modules:
        return
    real = owner.merge_quantization_configs.__func__

    def merge(cls: Any, *args: Any, **kwargs: Any) -> Any:
        owner.merge_quantization_configs = classmethod(real)
        import_module("wq.hf")  # wraps it
        return cls.merge_quantization_configs(*args, **kwargs)

    merge.__wrapped__ = real  # type: ignore[attr-defined]  # what `wq.hf.takeover` wraps, if it is imported first
    owner.merge_quantization_configs = classmethod(merge)


class _Finder(MetaPathFinder):
    """Finds one module, once, as everybody else does, and looks at it when it has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _TARGET:
            return None
        sys.meta_path.remove(self)
        spec = util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    def __init__(self, loader: Any):
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _stand_in(module)
