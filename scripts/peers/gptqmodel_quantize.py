"""gptqmodel: make a gptq or awq checkpoint, or write one's weights as gptqmodel's own layers dequantize them.

recipes: `gptq` (every default), `act-order` (`desc_act`), `v2` (format `gptq_v2`), `dynamic` (`v_proj` at 8 bits,
`o_proj` of the first block dense), `head` (quantizes the head too), `awq` (gemm), `gemv` (AWQ in the gemv layout),
`gemv-fast`; for the best quality, `best` (act-order, and the search for scales that its README recommends), `gptaq` and
`foem` (the same with these corrections, each with its default strength).
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import common
import torch
from torch import Tensor, nn

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its thread pool wants two, whatever the machine has

LAYOUTS = {"awq": "gemm", "gemv": "gemv", "gemv-fast": "gemv_fast"}
RECIPES = ("gptq", "act-order", "v2", "dynamic", "head", *LAYOUTS, "best", "gptaq", "foem")
BEST = {"desc_act": True, "act_group_aware": False, "mse": 2.4}  # the one exponent that its documentation names


def settings(options: argparse.Namespace) -> dict:
    """The recipe as arguments of `QuantizeConfig`."""
    found = {"bits": options.bits, "group_size": options.group, "sym": not options.asymmetric, "device": "cpu"}
    if options.group < 0:
        found |= {"act_group_aware": False}  # its default order of columns is one of groups
    if options.recipe == "act-order":
        found |= {"desc_act": True, "act_group_aware": False}
    elif options.recipe == "v2":
        found |= {"format": "gptq_v2"}
    elif options.recipe == "dynamic":
        found |= {"dynamic": {r"+:.*\.v_proj$": {"bits": 8}, r"-:model\.layers\.0\.self_attn\.o_proj$": {}}}
    elif options.recipe == "head":
        found |= {"lm_head": True}
    elif options.recipe in LAYOUTS:
        found |= {"quant_method": "awq", "format": LAYOUTS[options.recipe]}
    elif options.recipe in ("best", "gptaq", "foem"):
        from gptqmodel.quantization.config import FOEMConfig, GPTAQConfig

        found |= BEST | {"gptaq": {"gptaq": GPTAQConfig()}, "foem": {"foem": FOEMConfig()}}.get(options.recipe, {})
    return found


def quantize(options: argparse.Namespace, ids: Tensor) -> None:
    """Calibrate on `ids` `[n, tokens]` and save a folder."""
    from gptqmodel import GPTQModel, QuantizeConfig

    samples = [{"input_ids": row.unsqueeze(0), "attention_mask": torch.ones_like(row).unsqueeze(0)} for row in ids]
    model = GPTQModel.load(str(options.source), QuantizeConfig(**settings(options)))
    model.quantize(samples, batch_size=1)
    model.save(str(options.out))


def dequantize(checkpoint: Path) -> common.Weights:
    """Each weight from the package's own layer, which its own loader filled."""
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.nn_modules.qlinear import BaseQuantLinear

    said = common.quantization(checkpoint)
    backend = BACKEND.AWQ_TORCH if said["quant_method"] == "awq" else BACKEND.GPTQ_TORCH
    dtype = next(t.dtype for name, t in common.tensors(checkpoint).items() if name.endswith(".scales"))
    model = GPTQModel.load(str(checkpoint), backend=backend, device="cpu", dtype=dtype)  # else it casts them
    for name, layer in model.model.named_modules():
        if isinstance(layer, BaseQuantLinear):
            yield name, lambda wide, layer=layer: weight_of(layer, wide)


def weight_of(layer: nn.Module, wide: bool) -> Tensor:
    """One layer's weight `[out, in]`."""
    if wide:
        layer.scales = layer.scales.float()
    if hasattr(layer, "dequantize_weight"):
        return layer.dequantize_weight().t()
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    return dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, layer.bits, layer.group_size).t()


if __name__ == "__main__":
    common.run("gptqmodel", common.arguments(__doc__, RECIPES), quantize, dequantize)
