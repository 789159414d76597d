"""What would run here: the versions, the devices, and for a checkpoint the kernel that each of its layers would use.

Reads the headers of a checkpoint, and of its values only the few that say how weights are stored; asks the kernels'
own tables, so that what it says is what runs.
"""

from __future__ import annotations

import os
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import wq_kernels
from wq import quantized
from wq.checkpoint import read_headers
from wq.errors import CheckpointError, ModelError
from wq.machine import default_device
from wq.scheme import Scheme
from wq_kernels import configs, layout, registry

PACKAGES = ("torch", "triton", "transformers", "accelerate", "safetensors", "compressed-tensors", "kernels")
ROWS = (1, 16, 64, 256, 512)  # of the input, for which a kernel is shown

# Processors of well-known devices, to split the work as they would where they are not at hand.
_PROCESSORS = {"sm_80": 108, "sm_86": 84, "sm_89": 128, "sm_90": 132, "sm_120": 170, "gfx942": 304}
_LAYER = re.compile(r"\.\d+\.")


def doctor(checkpoint: str | os.PathLike[str] | None = None, architecture: str | None = None) -> dict[str, Any]:
    """A JSON-ready report. architecture (`sm_90`): explain for a device that is not here, instead of the first GPU.

    Raises ModelError for an architecture wq knows nothing of, CheckpointError for a folder that is no quantized
    checkpoint.
    """
    if architecture is not None and architecture not in _PROCESSORS:
        raise ModelError(f"architecture is {architecture!r}; wq knows {', '.join(_PROCESSORS)}.")
    report: dict[str, Any] = {
        "versions": {name: _version(name) for name in PACKAGES},
        "devices": _devices(),
        "backends": {name: _importable(name) for name in wq_kernels.BACKENDS},
        "tiles": os.environ.get(configs.ENVIRONMENT),
    }
    if checkpoint is not None:
        report["checkpoint"] = str(checkpoint)
        report["for"] = architecture or str(_first_device())
        report["layers"] = explain(Path(checkpoint), architecture)
    return report


def explain(folder: Path, architecture: str | None = None) -> list[dict[str, Any]]:
    """One entry for the layers of one shape: their names and number, what multiplies them, and why."""
    alike: dict[tuple[Scheme, tuple[int, int]], list[str]] = {}
    layers, _ = quantized.split(read_headers(folder))
    if not layers:
        raise CheckpointError(f"{folder} holds no packed weights. `wq quantize` makes a checkpoint that does.")
    whole = quantized.read_config(folder)
    config, dtype = whole["quantization_config"], _dtype(whole)
    for path, leaves in layers.items():
        stored = quantized.describe(path, leaves, config)
        alike.setdefault((stored.scheme, stored.shape), []).append(_LAYER.sub(".*.", path))
    return [_entry(scheme, shape, names, dtype, architecture) for (scheme, shape), names in alike.items()]


def _dtype(config: dict[str, Any]) -> torch.dtype:
    """What transformers runs the model in, unless it is told otherwise."""
    text = config.get("text_config")
    parts = [part for part in (config, text) if isinstance(part, dict)]
    said = next((part[key] for part in parts for key in ("dtype", "torch_dtype") if part.get(key)), "float32")
    found = getattr(torch, str(said), None)
    return found if isinstance(found, torch.dtype) else torch.float32


def _entry(
    scheme: Scheme, shape: tuple[int, int], names: list[str], dtype: torch.dtype, architecture: str | None
) -> dict[str, Any]:
    (out_features, in_features), bits = shape, scheme.bits
    groups = scheme.groups(in_features)
    where, why = _layout((bits, out_features, in_features, groups), dtype, architecture)
    return {
        "layers": sorted(set(names)),
        "count": len(names),
        "bits": bits,
        "out_features": out_features,
        "in_features": in_features,
        "group_size": in_features // groups,
        "symmetric": scheme.symmetric,
        "layout": where,
        "why": why,
        "kernels": {rows: _kernel(where, rows, bits, out_features, in_features, groups, architecture) for rows in ROWS},
    }


def _layout(sizes: tuple[int, int, int, int], dtype: torch.dtype, architecture: str | None) -> tuple[str, str]:
    bits, _, in_features, groups = sizes
    if architecture is None:
        return registry.reason(_first_device(), *sizes, dtype)
    refusal = registry.reason_for_shape(bits, in_features, groups)
    return (registry.STREAM, refusal) if refusal else (registry.TILED, "fused")


def _kernel(where: str, rows: int, bits: int, n: int, k: int, groups: int, architecture: str | None) -> str:
    """What computes so many rows, in a few words."""
    if where == registry.STREAM:
        name = wq_kernels.select("cuda" if architecture else _first_device().type, bits).__name__.rpartition(".")[2]
        return {"reference": "dequantize in torch, then matmul", "dense": "dequantize in Triton, then matmul"}[name]
    if where in registry.CPU_LAYOUTS:
        return str(registry.cpu_module(where).describe(rows))
    if rows > configs.FUSED_ROWS:
        return "dequantize in pieces, then matmul"
    blocks = -(-k // layout.block_columns(bits))
    device = _device(architecture)
    config = configs.choose(device, configs.bucket(rows), bits, layout.block_groups(blocks, groups), _triton())
    parts = configs.split(device, config, n, rows, blocks)
    tile = f"fused, tile {config.rows_n}×{config.rows_m}, {config.warps} warps, {config.stages} stages"
    return f"{tile}, columns split in {parts}" if parts > 1 else tile


def _device(architecture: str | None) -> configs.Device:
    if architecture is not None:
        return configs.Device(architecture, architecture, _PROCESSORS[architecture])
    from wq_kernels import target

    return target.describe(_first_device())


def _first_device() -> torch.device:
    return torch.device(default_device())


def _devices() -> list[dict[str, Any]]:
    """The CPU, and every accelerator with its memory."""
    found: list[dict[str, Any]] = [{"device": "cpu", "threads": torch.get_num_threads()}]
    if torch.accelerator.is_available():
        module = torch.get_device_module()
        for index in range(torch.accelerator.device_count()):
            device = {"device": f"{torch.accelerator.current_accelerator()}:{index}"}
            if hasattr(module, "get_device_properties"):  # Apple's has none
                properties = module.get_device_properties(index)
                device |= {"name": properties.name, "memory_bytes": properties.total_memory}
            found.append(device)
    return found


def _importable(name: str) -> bool:
    try:
        wq_kernels.get(name)
    except ImportError:
        return False
    return True


def _triton() -> str:
    """The version that the kernels ask tiles for; that of its wheel may say more, or be of another name."""
    try:
        import triton
    except ImportError:
        return ""
    return str(triton.__version__)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
