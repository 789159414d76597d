"""compressed-tensors `pack-quantized`: the default, read by vLLM, SGLang and transformers.

    weight_packed      int32 [out, words(in)]      codes along in_features
    weight_scale       float [out, groups]
    weight_zero_point  int32 [words(out), groups]  zero points along out_features; absent on a symmetric grid
    weight_shape       int64 [2]

Checked bit for bit against compressed-tensors 0.20.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wq.formats import bits
from wq.scheme import PER_CHANNEL, Scheme
from wq.solvers import Solution

QUANT_METHOD = "compressed-tensors"


def check(scheme: Scheme, shape: tuple[int, int], name: str) -> None:
    """Any scheme fits whose groups divide the layer. Raises GroupSizeError."""
    scheme.groups(shape[1], name)


def pack(solution: Solution, scheme: Scheme) -> dict[str, Tensor]:
    """Tensors by local name."""
    packed = {
        "weight_packed": bits.pack(solution.codes, scheme.bits),
        "weight_scale": solution.scale.contiguous(),
        "weight_shape": torch.tensor(tuple(solution.codes.shape)),
    }
    if not scheme.symmetric:
        packed["weight_zero_point"] = bits.pack(solution.zero.t(), scheme.bits).t().contiguous()
    return packed


def unpack(tensors: dict[str, Tensor], scheme: Scheme, shape: tuple[int, int]) -> Solution:
    """Codes, scales and zero points again."""
    out_features, in_features = shape
    scale = tensors["weight_scale"]
    codes = bits.unpack(tensors["weight_packed"], scheme.bits, in_features)
    if scheme.symmetric:
        zero = torch.full_like(scale, scheme.midpoint, dtype=torch.uint8)
    else:
        zero = bits.unpack(tensors["weight_zero_point"].t().contiguous(), scheme.bits, out_features).t().contiguous()
    return Solution(codes, scale, zero, {})


def config(scheme: Scheme, dense: list[str]) -> dict[str, Any]:
    """`quantization_config`; `dense` becomes its ignore list."""
    channel = scheme.group_size == PER_CHANNEL
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if channel else "group",
        "group_size": None if channel else scheme.group_size,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": QUANT_METHOD,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": sorted(dense),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
