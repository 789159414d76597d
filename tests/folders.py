"""Folders of tiny models, dense or quantized, named in a table and made once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from wq import quantize
from wq_kernels import stream

Folder = Callable[[str], Path]
Table = Mapping[str, tuple[str, dict[str, Any] | None]]  # an architecture, and how it is quantized offline, if it is


def maker(table: Table, tiny_model: Callable[..., Path], temporary: pytest.TempPathFactory) -> Folder:
    """`get(name)`: the folder that the table describes; an architecture that it does not name is dense."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            architecture, options = table.get(name, (name, None))
            made[name] = tiny_model(architecture)
            if options is not None:
                output = temporary.mktemp("packed") / "out"
                dtype = "float16" if "format" in options else "float32"
                quantize(made[name], output, **{"method": "rtn", "group_size": 32, "dtype": dtype, **options})
                made[name] = output
            if "act-order" in name:
                scatter(made[name])
        return made[name]

    return get


def scatter(folder: Path) -> None:
    """As act-order leaves a 4-bit gptq checkpoint: the columns of every layer belong to groups in no order."""
    generator = torch.Generator().manual_seed(1)
    tensors = load_file(folder / "model.safetensors")
    for name in [key.removesuffix(".g_idx") for key in tensors if key.endswith(".g_idx")]:
        order = torch.randperm(tensors[f"{name}.g_idx"].numel(), generator=generator)
        codes = stream.unpack(tensors[f"{name}.qweight"].t().contiguous(), 4, len(order))
        tensors[f"{name}.qweight"] = stream.pack(codes[:, order], 4).t().contiguous()
        tensors[f"{name}.g_idx"] = tensors[f"{name}.g_idx"][order]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
