"""What the Triton kernels are compiled for. Nothing here is asked before a tensor is on a device."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

from .configs import Device

__all__ = ["capturing", "describe", "on", "stream", "target"]


def interpreting() -> bool:
    """Whether Triton only imitates a device, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def target(device: torch.device) -> str:
    """`ptx` for NVIDIA, `generic` elsewhere: PTX on another compiler makes a kernel that is silently wrong."""
    if interpreting():
        return "interpreter"
    return "ptx" if device.type == "cuda" and torch.version.hip is None else "generic"


@cache
def describe(device: torch.device) -> Device:
    """The device's name, architecture and number of processors."""
    if device.type == "cpu":
        return Device("interpreter", "cpu", 4)
    properties = torch.get_device_module(device).get_device_properties(device)
    if device.type != "cuda":
        return Device(properties.name, device.type, properties.max_compute_units)
    if torch.version.hip is not None:
        return Device(properties.name, properties.gcnArchName.partition(":")[0], properties.multi_processor_count)
    architecture = f"sm_{properties.major}{properties.minor}"
    return Device(properties.name, architecture, properties.multi_processor_count)


def on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, whatever device the tensors are on: make it theirs."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def stream(device: torch.device) -> int:
    """The current stream of a device, as a number."""
    if device.type == "cpu":
        return 0
    current = torch.get_device_module(device).current_stream(device)
    return current.cuda_stream if device.type == "cuda" else current.sycl_queue


def capturing(device: torch.device) -> bool:
    """Whether launches on the current stream go into a graph instead of running."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
