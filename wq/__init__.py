"""wq: 4-bit weights for Hugging Face transformers.

    from wq import WqConfig
    AutoModelForCausalLM.from_pretrained(repo, quantization_config=WqConfig())

Names are imported when first used: `import wq` costs nothing and touches no accelerator. It also lets transformers
load quantized repos whose own loader is not installed (see `wq.autoload`).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from wq import autoload

__version__ = "0.1.0"

_EXPORTS = {
    "Scheme": "wq.scheme",
    "WqConfig": "wq.hf",
    "WqError": "wq.errors",
    "WqLinear": "wq.layers",
    "compile_config": "wq.hf",
    "evaluate": "wq.evaluate",
    "load": "wq.hf",
    "push": "wq.hub",
    "quantize": "wq.presets",
    "speed": "wq.speed",
}

__all__ = [
    "Scheme",
    "WqConfig",
    "WqError",
    "WqLinear",
    "__version__",
    "compile_config",
    "evaluate",
    "load",
    "push",
    "quantize",
    "speed",
]

if TYPE_CHECKING:
    from wq.errors import WqError
    from wq.evaluate import evaluate
    from wq.hf import WqConfig, compile_config, load
    from wq.hub import push
    from wq.layers import WqLinear
    from wq.presets import quantize
    from wq.scheme import Scheme
    from wq.speed import speed


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'wq' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value  # importing the submodule bound it here under its own name; the function takes its place
    return value


def __dir__() -> list[str]:
    return __all__


autoload.install()
