"""Stacks of blocks: one in a decoder, two in an encoder-decoder model, the text's alone in a model that also sees."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from wq.errors import ModelError
from wq.structure.linears import is_linear, matrix


@dataclass(frozen=True)
class Tower:
    """A stack of blocks in the module that runs it: token ids go in, hidden states come out.

    root, blocks: that module, and its list of blocks. path, blocks_path: where they are in the model.
    reads_encoder: whether its blocks also attend to the output of an encoder.
    """

    path: str
    root: nn.Module
    blocks_path: str
    blocks: nn.ModuleList
    reads_encoder: bool = False


def find_towers(model: PreTrainedModel, name: str) -> list[Tower]:
    """The stacks whose blocks are quantized, an encoder before its decoder.

    Encoders of images and sound stay dense: they are small, and text to calibrate on never reaches them.
    Raises ModelError when no list of modules holds linear layers.
    """
    paired = bool(model.config.is_encoder_decoder)
    encoder: Any = model.get_encoder() if paired else None
    towers = [_tower(model, encoder, name)] if reads_text(encoder) else []
    decoder = model.get_decoder()
    if decoder is model or not isinstance(decoder, PreTrainedModel):  # ModernBERT calls its head a decoder
        decoder = model.base_model
    return [*towers, _tower(model, decoder, name, paired)]


def find_blocks(model: PreTrainedModel, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Every block of every stack, and its path in the model. Raises ModelError."""
    for tower in find_towers(model, name):
        for index, block in enumerate(tower.blocks):
            yield f"{tower.blocks_path}.{index}", block


def reads_text(root: Any) -> bool:
    """Whether a module's input is token ids."""
    return root is not None and isinstance(root.get_input_embeddings(), nn.Embedding)


def _tower(model: nn.Module, root: nn.Module, name: str, reads_encoder: bool = False) -> Tower:
    """The list of blocks is the list of modules that holds most of the linear weights."""
    path = next(path for path, module in model.named_modules() if module is root)
    best: tuple[int, str, nn.ModuleList | None] = (0, "", None)
    for inner, module in root.named_modules():
        if isinstance(module, nn.ModuleList) and not (best[2] is not None and inner.startswith(best[1] + ".")):
            weights = sum(matrix(m).numel() for m in module.modules() if is_linear(m))
            if weights > best[0]:
                best = weights, inner, module
    if best[2] is None:
        raise ModelError(
            f"{name} ({type(root).__name__}) has no linear layers in a list of blocks, so there is nothing wq can "
            "quantize. wq handles transformers whose blocks hold nn.Linear, Conv1D or experts."
        )
    return Tower(path, root, f"{path}.{best[1]}" if path else best[1], best[2], reads_encoder)


def model_class(config: PreTrainedConfig) -> Any:
    """The class to build or load a model of this config with: the one it was saved from, if transformers has it.

    A config class that is not transformers' own came with the repo, and its model does too.
    """
    own = type(config).__module__.startswith("transformers.")
    names = config.architectures if own and isinstance(config.architectures, (list, tuple)) else ()
    for name in names:
        found = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(found, type) and issubclass(found, PreTrainedModel) and found.can_generate():
            return found
    return AutoModelForCausalLM
