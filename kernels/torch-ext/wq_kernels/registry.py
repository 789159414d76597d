"""Which backend computes on which device, in which layout."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["BACKENDS", "CPU_LAYOUTS", "LAYOUTS", "Backend", "get", "preferred_layout", "select"]

STREAM, TILED = "stream", "tiled"
LAYOUTS = (STREAM, TILED)  # of the backends
CPU_LAYOUTS = ("native", "int4pack", "bags")  # each has a module of its own, called like it; the preferred first
_ANY = "any"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backend:
    """A module, relative because the Hub loads this package under other names; its layout; the devices it runs on."""

    module: str
    layout: str
    devices: tuple[str, ...]


# The preferred first.
BACKENDS: dict[str, Backend] = {
    "fused": Backend(".fused", TILED, ("cuda",)),
    "tiles": Backend(".layout", TILED, (_ANY,)),
    "dequantize": Backend(".dense", STREAM, ("cuda", "xpu")),
    "reference": Backend(".reference", STREAM, (_ANY,)),
}


def get(name: str) -> ModuleType:
    """The backend called `name`, imported on first use."""
    return import_module(BACKENDS[name].module, __package__)


@cache
def select(device_type: str, bits: int, layout: str = STREAM) -> ModuleType:
    """The first backend that takes `bits` in `layout` on `device_type` (`cpu`, `cuda`, ...) and can be imported here.

    Raises LookupError when there is none.
    """
    for name, backend in BACKENDS.items():
        if backend.layout != layout or (device_type not in backend.devices and _ANY not in backend.devices):
            continue
        try:
            module = get(name)
        except ImportError:  # its own dependency is absent on this machine
            continue
        if module.supports(bits):
            return module
    raise LookupError(f"no backend in {list(BACKENDS)} supports {bits} bits in the {layout} layout on {device_type}")


def cpu_module(layout: str) -> ModuleType:
    """What multiplies in a layout for CPUs, imported on first use."""
    return import_module(f".{layout}", __package__)


def preferred_layout(
    device: torch.device, bits: int, out_features: int, in_features: int, groups: int, dtype: torch.dtype | None = None
) -> str:
    """The layout in which a weight is multiplied fastest on a device. dtype: of what it is multiplied by, if known."""
    return reason(device, bits, out_features, in_features, groups, dtype)[0]


def reason(
    device: torch.device, bits: int, out_features: int, in_features: int, groups: int, dtype: torch.dtype | None = None
) -> tuple[str, str]:
    """`preferred_layout`, and why, in a few words."""
    if device.type == "cpu":
        return _reason_on_cpu(bits, out_features, in_features, groups, dtype)
    if device.type not in BACKENDS["fused"].devices:
        return STREAM, f"no fused kernel runs on {device.type}"
    refusal = reason_for_shape(bits, in_features, groups) or unusable(device)
    return (STREAM, refusal) if refusal else (TILED, "fused")


def _reason_on_cpu(
    bits: int, out_features: int, in_features: int, groups: int, dtype: torch.dtype | None
) -> tuple[str, str]:
    """The first layout for CPUs whose module takes such a weight, and what would be faster but for the machine.

    If none takes it, why not: of the module that came nearest, the first.
    """
    refused: list[tuple[int, str]] = []  # by how many questions a module had passed
    for name in CPU_LAYOUTS:
        module = cpu_module(name)
        if not module.supports(bits):
            refused.append((0, f"no fused kernel for {bits} bits runs on cpu"))
        elif not module.computes_in(dtype):
            refused.append((1, f"no fused kernel{'' if dtype is None else f' for {dtype}'} runs on cpu"))
        elif not module.fits(bits, out_features, in_features, groups):
            refused.append((2, f"{out_features} rows in {groups} groups do not fill whole blocks"))
        elif problem := module.unusable(bits):
            refused.append((3, problem))
        else:
            better = [problem for passed, problem in refused if passed == 3]
            return name, f"{module.WHAT} ({better[0]})" if better else module.WHAT
    return STREAM, max(refused, key=lambda one: one[0])[1]


def reason_for_shape(bits: int, in_features: int, groups: int) -> str:
    """Why the fused kernel does not take such a weight, on any device; empty when it does."""
    from . import layout

    if not layout.supports(bits):
        return f"{bits}-bit values straddle words"
    if not layout.fits(bits, in_features, groups):
        return f"groups of {in_features // max(groups, 1)} are not 32 times a power of two"
    return ""


@cache
def unusable(device: torch.device) -> str:
    """Why the fused kernel does not run on an accelerator; empty when it does. Compiles and runs a small one, once."""
    try:
        fused = get("fused")
    except ImportError as error:
        return f"triton is not installed ({error})"
    problem = fused.self_test(device)
    if problem:
        _log.warning("the fused kernel is not used on %s: %s", device, problem)
    return str(problem)
