"""Kernels for packed integer weights. They see tensors and numbers, never models, and never import `wq`.

A backend is a module with

    def supports(bits) -> bool
    def dequantize(packed, scale, zero, bits, in_features, dtype) -> Tensor
    def linear(x, packed, scale, zero, bias, bits, in_features) -> Tensor

in the compressed-tensors layout (see `reference`). A new one adds its file and one line to `BACKENDS`, before
`reference`, which takes everything and is the oracle for the others. Importing this package imports no backend,
never touches an accelerator, and does not need triton.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType

ANY = "any"

# name: (module, device types it runs on), the preferred first. Relative: the Hub loads this package under other names.
BACKENDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "triton": (".triton_dequantize", ("cuda", "xpu")),
    "reference": (".reference", (ANY,)),
}

__all__ = ["BACKENDS", "get", "select"]


def get(name: str) -> ModuleType:
    """The backend called `name`, imported on first use."""
    return import_module(BACKENDS[name][0], __name__)


@cache
def select(device_type: str, bits: int) -> ModuleType:
    """The first backend that takes `bits` on `device_type` (`cpu`, `cuda`, ...) and can be imported here."""
    for name, (_, devices) in BACKENDS.items():
        if device_type not in devices and ANY not in devices:
            continue
        try:
            backend = get(name)
        except ImportError:  # its own dependency is absent on this machine
            continue
        if backend.supports(bits):
            return backend
    raise LookupError(f"no backend in {list(BACKENDS)} supports {bits} bits on {device_type}")
