"""llm-compressor: make a compressed-tensors checkpoint, or write one's weights as compressed-tensors dequantizes them.

recipes: `gptq` (the package's default order of columns), `gptq-static` and `gptq-unordered` (that order named, or
none), `gptq-mse` (GPTQ with its search for scales that weighs inputs), `awq`, `rtn` (no data), `mixed` (GPTQ, `v_proj`
and `down_proj` at 8 bits in groups of a row), `head` (round to nearest, with a head of its own quantized too). What a
float32 model keeps is stored in float16, as scales of such models usually are.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor

RECIPES = ("gptq", "gptq-static", "gptq-unordered", "gptq-mse", "awq", "rtn", "mixed", "head")


def modifiers(options: argparse.Namespace) -> list:
    """The recipe as llm-compressor's modifiers."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    def scheme(bits: int, group: int, targets: list[str]) -> QuantizationScheme:
        strategy: dict[str, Any] = {"strategy": "channel"} if group < 0 else {"strategy": "group", "group_size": group}
        if options.recipe == "gptq-mse":
            strategy |= {"observer": "imatrix_mse"}
        weights = QuantizationArgs(num_bits=bits, type="int", symmetric=not options.asymmetric, **strategy)
        return QuantizationScheme(targets=targets, weights=weights)

    groups = {"group_0": scheme(options.bits, options.group, ["Linear"])}
    if options.recipe == "mixed":
        groups = {"group_1": scheme(8, -1, ["re:.*v_proj$", "re:.*down_proj$"])} | groups
    ignore = [] if options.recipe == "head" else ["lm_head"]
    if options.recipe in ("rtn", "head"):
        return [QuantizationModifier(config_groups=groups, ignore=ignore)]
    if options.recipe == "awq":
        from llmcompressor.modifiers.transform.awq import AWQModifier
        from llmcompressor.pipelines.cache import IntermediatesCache

        if not torch.accelerator.is_available():  # it pins memory for a GPU without asking whether there is one
            IntermediatesCache.pin_memory = lambda *arguments, **named: None
        return [AWQModifier(), QuantizationModifier(config_groups=groups, ignore=ignore)]
    order = {"gptq-static": {"actorder": "static"}, "gptq-unordered": {"actorder": None}}.get(options.recipe, {})
    return [GPTQModifier(config_groups=groups, ignore=ignore, **order)]


def quantize(options: argparse.Namespace, ids: Tensor) -> None:
    """Calibrate on `ids` `[n, tokens]` and save a compressed folder."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(options.source, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(options.source)
    columns = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    data = {"dataset": Dataset.from_dict(columns), "num_calibration_samples": len(ids), "max_seq_length": ids.shape[1]}
    oneshot(model=model, processor=tokenizer, recipe=modifiers(options), **data)
    if model.dtype is torch.float32:
        model.half()
    model.save_pretrained(options.out, save_compressed=True)
    tokenizer.save_pretrained(options.out)


def dequantize(checkpoint: Path) -> common.Weights:
    """Each weight from compressed-tensors' own decompressor."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    said = common.quantization(checkpoint)
    model = common.skeleton(checkpoint)
    apply_quantization_config(model, QuantizationConfig.model_validate(said))
    for name, local in common.layers(common.tensors(checkpoint), "weight_packed").items():
        scheme = model.get_submodule(name).quantization_scheme
        compressor = BaseCompressor.get_value_from_registry(scheme.format or said["format"])

        def weight(wide: bool, local: dict = local, scheme: Any = scheme, compressor: Any = compressor) -> Tensor:
            scale = local["weight_scale"]
            return compressor.decompress({**local, "weight_scale": scale.float() if wide else scale}, scheme)["weight"]

        yield name, weight


if __name__ == "__main__":
    common.run("llmcompressor", common.arguments(__doc__, RECIPES), quantize, dequantize)
