"""GPTQ, as AutoGPTQ and GPTQModel write it: for older stacks, and for vLLM's 4- and 8-bit symmetric path.

    qweight  int32 [words(in), out]     codes along in_features
    qzeros   int32 [groups, words(out)]
    scales   fp16  [groups, out]
    g_idx    int32 [in]                 the group of each column; always in order here

Version 1 stores `zero - 1`, and readers disagree about the zero point 0, which it stores as all ones. So version 1 is
written for symmetric grids only, and version 2 (`checkpoint_format: gptq_v2`), which stores the zero point itself, for
asymmetric ones.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from wq.errors import FormatError
from wq.formats import bits
from wq.scheme import Scheme
from wq.solvers import Solution

QUANT_METHOD = "gptq"


def check(scheme: Scheme, shape: tuple[int, int], name: str) -> None:
    """Raise FormatError or GroupSizeError when GPTQ cannot hold this layer."""
    scheme.groups(shape[1], name)
    if scheme.scale_dtype != "float16":
        raise FormatError(f"{name}: gptq stores float16 scales, not {scheme.scale_dtype}. Use --dtype float16.")
    for label, size in (("out_features", shape[0]), ("in_features", shape[1])):
        if size % 32:
            raise FormatError(
                f"{name}: gptq packs 32 values at a time and {label} is {size}. "
                f"Use --format compressed-tensors, or --keep {name.rpartition('.')[2]}."
            )


def pack(solution: Solution, scheme: Scheme) -> dict[str, Tensor]:
    """Tensors by local name; version 1 if the scheme is symmetric, else version 2."""
    in_features, groups = solution.codes.shape[1], solution.scale.shape[1]
    stored_zero = solution.zero - 1 if scheme.symmetric else solution.zero
    return {
        "qweight": bits.pack(solution.codes, scheme.bits).t().contiguous(),
        "qzeros": bits.pack(stored_zero.t(), scheme.bits),
        "scales": solution.scale.t().contiguous(),
        "g_idx": (torch.arange(in_features) // (in_features // groups)).to(torch.int32),
    }


def unpack(tensors: dict[str, Tensor], scheme: Scheme, shape: tuple[int, int]) -> Solution:
    """Codes, scales and zero points again."""
    out_features, in_features = shape
    codes = bits.unpack(tensors["qweight"].t().contiguous(), scheme.bits, in_features)
    zero = bits.unpack(tensors["qzeros"], scheme.bits, out_features).t().contiguous()
    if scheme.symmetric:
        zero = zero + 1
    return Solution(codes, tensors["scales"].t().contiguous(), zero, {})


def config(scheme: Scheme, dense: list[str]) -> dict[str, Any]:
    """`quantization_config`; dense modules but the head are excluded by GPTQModel's `dynamic` rules."""
    skip: dict[str, Any] = {f"-:^{re.escape(name)}$": {} for name in sorted(dense) if name != "lm_head"}
    values = {
        "quant_method": QUANT_METHOD,
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "sym": scheme.symmetric,
        "desc_act": False,
        "lm_head": False,
        "checkpoint_format": "gptq" if scheme.symmetric else "gptq_v2",
        "pack_dtype": "int32",
    }
    return values | ({"dynamic": skip} if skip else {})
