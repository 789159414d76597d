"""A gptq checkpoint as act-order leaves it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from wq_kernels import stream


def scatter(folder: Path) -> None:
    """Let the columns of every layer of a 4-bit gptq checkpoint belong to groups in no order."""
    generator = torch.Generator().manual_seed(1)
    tensors = load_file(folder / "model.safetensors")
    for name in [key.removesuffix(".g_idx") for key in tensors if key.endswith(".g_idx")]:
        order = torch.randperm(tensors[f"{name}.g_idx"].numel(), generator=generator)
        codes = stream.unpack(tensors[f"{name}.qweight"].t().contiguous(), 4, len(order))
        tensors[f"{name}.qweight"] = stream.pack(codes[:, order], 4).t().contiguous()
        tensors[f"{name}.g_idx"] = tensors[f"{name}.g_idx"][order]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
