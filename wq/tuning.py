"""`wq tune`: the kernels' own measurement of tiles, written to a file that WQ_CONFIG names."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from wq.checkpoint import write_text
from wq.errors import ModelError, OutputError
from wq.machine import default_device
from wq_kernels import registry


def tune(
    output: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    on_bucket: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure on the first GPU and write `output`, adding to what it says of other devices; return what was measured.

    Raises ModelError without a device that runs the fused kernels, OutputError when the file exists.
    """
    path = Path(output)
    device = torch.device(default_device())
    _, why = registry.reason(device, 4, 4096, 4096, 32)
    if why != "fused":
        raise ModelError(f"there is nothing to tune on {device}: {why}. Run `wq tune` on the GPU that will serve.")
    others = _others(path, overwrite)
    folder = path.resolve().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise OutputError(f"{path} cannot be written: {folder} is no folder that can be. Choose another --output.")
    from wq_kernels import tune as kernels

    made = kernels.tune(torch.device(device.type, torch.accelerator.current_device_index()), on_bucket=on_bucket)
    mine = {(tile["device"], tile["triton"]) for tile in made["tiles"]}
    kept = [tile for tile in others if (tile.get("device"), tile.get("triton")) not in mine]
    write_text(path, json.dumps({"tiles": kept + made["tiles"]}, indent=1) + "\n")
    return made


def _others(path: Path, overwrite: bool) -> list[dict[str, Any]]:
    """The entries already in the file. Raises OutputError for one that exists and may not be replaced."""
    if not path.exists():
        return []
    if not overwrite:
        raise OutputError(f"{path} exists. Choose another --output, or add --overwrite to renew its entries.")
    try:
        tiles = json.loads(path.read_text(encoding="utf-8"))["tiles"]
        if not isinstance(tiles, list) or not all(isinstance(tile, dict) for tile in tiles):
            raise TypeError("tiles is no list of objects")
        return tiles
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{path} is no file of tiles ({error}). Choose another --output.") from error
