"""`wq.load`: a model and its tokenizer, from whatever holds one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from wq.checkpoint import Entry
from wq.errors import CheckpointError, ModelError, WqError, first_line
from wq.hf.config import WqConfig
from wq.structure.limits import check_folder, few_modules
from wq.structure.names import check_plain, map_names
from wq.structure.towers import model_class


def load(
    model: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    revision: str | None = None,
    dequantize: bool = False,
    head_bits: int | None = None,
) -> tuple[PreTrainedModel, Any]:
    """A model to run and its tokenizer, from a dense or quantized repo or folder, or a GGUF file.

    Quantized ones load packed, or dense with `dequantize`; dense ones stay dense. head_bits: as in `WqConfig`, of a
    quantized one. Raises ModelError when there is no model to load.
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
        entries = check_folder(path) if path.is_dir() else {}
        config = read_config(location["pretrained_model_name_or_path"], revision)
        kind = model_class(config)
        options["use_safetensors"] = True  # never a pickle
        if getattr(config, "quantization_config", None) is not None:
            options["quantization_config"] = WqConfig(dequantize=dequantize, head_bits=head_bits)
        elif entries:
            _check_dense(kind, config, entries, name)
    if head_bits is not None and not isinstance(options.get("quantization_config"), WqConfig):
        raise ModelError(f"{name} is dense; head_bits rounds the head of a quantized model. Leave it out.")
    try:
        with _quiet():
            loaded = kind.from_pretrained(**location, **options, trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(**location, revision=revision, trust_remote_code=False)
    except WqError:
        raise
    except Exception as error:  # whatever files of any origin make transformers raise
        raise ModelError(f"{name} could not be loaded ({first_line(error)}).") from error
    if device is not None:
        loaded.to(device)
    return loaded, tokenizer


def _check_dense(kind: Any, config: PreTrainedConfig, entries: Mapping[str, Entry], name: str) -> None:
    """Refuse a dense checkpoint that transformers would complete with random numbers. Raises CheckpointError."""
    try:
        with torch.device("meta"), few_modules(len(entries)):
            model = (getattr(kind, "_from_config", None) or kind.from_config)(config)
    except WqError:
        raise
    except Exception as error:  # whatever a config of any origin makes transformers raise
        raise ModelError(f"{name} is no model that transformers can build ({first_line(error)}).") from error
    mapped, absent, _ = map_names(model, entries)
    if absent:
        raise CheckpointError(f"{name}: {absent[0]} is not in its files ({len(absent)} are not). Download it again.")
    check_plain(model, mapped, entries)


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
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    except Exception as error:  # its classes check little of what a config says
        raise ModelError(f"{name} is no model that transformers can load ({first_line(error)}).") from error
