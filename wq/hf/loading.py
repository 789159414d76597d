"""`wq.load`: a model and its tokenizer, from whatever holds one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from wq.errors import CheckpointError, FormatError, ModelError, first_line
from wq.hf.config import WqConfig
from wq.structure.towers import model_class


def load(
    model: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    revision: str | None = None,
    dequantize: bool = False,
) -> tuple[PreTrainedModel, Any]:
    """A model to run and its tokenizer, from a dense or quantized repo or folder, or a GGUF file.

    Quantized ones load packed, or dense with `dequantize`; dense ones stay dense. Raises ModelError when there is no
    model to load.
    """
    name = os.fspath(model)
    path = Path(name).expanduser()
    options: dict[str, Any] = {"dtype": dtype, "revision": revision}
    kind: Any = AutoModelForCausalLM
    location: dict[str, Any] = {"pretrained_model_name_or_path": str(path) if path.exists() else name}
    if path.suffix == ".gguf" and path.is_file():
        location = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        options["quantization_config"] = GgufConfig(dequantize=True)
        if dtype == "auto":
            options["dtype"] = torch.float32
    else:
        config = read_config(location["pretrained_model_name_or_path"], revision)
        kind = model_class(config)
        if getattr(config, "quantization_config", None) is not None:
            options["quantization_config"] = WqConfig(dequantize=dequantize)
    try:
        with _quiet():
            loaded = kind.from_pretrained(**location, **options)
            tokenizer = AutoTokenizer.from_pretrained(**location, revision=revision)
    except (OSError, ValueError) as error:
        if isinstance(error, (CheckpointError, FormatError)):
            raise
        raise ModelError(f"{name} could not be loaded ({first_line(error)}).") from error
    if device is not None:
        loaded.to(device)
    return loaded, tokenizer


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own bars; whoever calls `load` shows progress of its own."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def read_config(name: str, revision: str | None) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise ModelError(f"{name} is no model that transformers can load ({first_line(error)}).") from error
