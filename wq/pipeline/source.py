"""A dense model opened for reading: its structure on the meta device, its tensors on disk until they are asked for.

One of the few files that import transformers. Names on disk and names in the model differ for some architectures;
transformers knows how, so its own renaming and loading is used, one block's tensors at a time.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig, str_to_torch_dtype
from transformers.utils import logging as transformers_logging

from wq.checkpoint import Entry, read_headers, read_tensor
from wq.errors import CheckpointError, ModelError, first_line
from wq.machine import tells_of_memory
from wq.structure.limits import check_folder, few_modules
from wq.structure.names import check_plain, map_names
from wq.structure.towers import Tower, model_class

# What is wanted, by name: pickles are never fetched, and code only with trust_remote_code.
_HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]
_COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
_NOT_COPIED = {"config.json", "model.safetensors.index.json"}


class Source:
    """A model to quantize.

    name: what the user called it. folder: where its safetensors lie. repo: its id on the Hub, if it came from there.
    config: its transformers config. model: the `PreTrainedModel`, parameters on meta. entries: tensors on disk by
    name. tensors: for each of them the parameter it becomes, and whether it is that parameter, only renamed.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        cleanup: ExitStack,
        trust_remote_code: bool = False,
        entries: dict[str, Entry] | None = None,
    ):
        self.name, self.folder, self._cleanup = name, folder, cleanup
        self.repo = None if Path(name).expanduser().exists() else name
        self._remote_code = trust_remote_code
        self.entries: dict[str, Entry] = read_headers(folder) if entries is None else entries
        self.config = _config(folder, name, trust_remote_code)
        quantized = getattr(self.config, "quantization_config", None)
        if quantized is not None:
            method = quantized.get("quant_method") if isinstance(quantized, dict) else type(quantized).__name__
            raise ModelError(f"{name} is already quantized ({method}). Give the dense model it was made from.")
        with few_modules(len(self.entries)):
            self.model = _build(self.config, name, trust_remote_code)
        self.tensors = self._map_tensors()

    def close(self) -> None:
        """Remove what had to be unpacked to read this model."""
        self._cleanup.close()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the model was published in."""
        declared = getattr(self.config, "dtype", None)
        if isinstance(declared, torch.dtype):
            return declared
        floats = [entry for entry in self.entries.values() if entry.dtype.is_floating_point]
        return max(floats, key=lambda entry: entry.bytes).dtype

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        try:
            return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=self._remote_code)
        except (OSError, ValueError) as error:
            raise ModelError(f"{self.name}: no tokenizer could be loaded ({first_line(error)}).") from error

    def _map_tensors(self) -> dict[str, tuple[str, bool]]:
        mapped, absent, _ = map_names(self.model, self.entries)
        if absent:
            raise CheckpointError(
                f"{self.name}: {len(absent)} tensors of the model are not in its files: {', '.join(absent[:3])}"
                f"{', ...' if len(absent) > 3 else ''}. The checkpoint is not complete, or is not of this architecture."
            )
        check_plain(self.model, mapped, self.entries)
        return mapped

    def on_disk(self, parameter: str) -> str | None:
        """The name on disk of a parameter stored as it is; None if it is assembled from several tensors or shared."""
        return self._by_parameter.get(parameter)

    @cached_property
    def _by_parameter(self) -> dict[str, str]:
        return {renamed: name for name, (renamed, plain) in self.tensors.items() if plain}

    def load(self, prefixes: tuple[str, ...], device: torch.device, dtype: torch.dtype) -> None:
        """Read the parameters under `prefixes` (module names) onto `device`, floating ones as `dtype`."""
        shared = self._shared(prefixes)
        self._read((*prefixes, *shared.values()), device, dtype)
        for parameter, other in shared.items():
            path, _, leaf = parameter.rpartition(".")
            self.model.get_submodule(path)._parameters[leaf] = self.model.get_parameter(other)
        for other in set(shared.values()):
            if not _under(other, prefixes):
                path, _, leaf = other.rpartition(".")
                empty = self.model.get_parameter(other).to("meta")
                self.model.get_submodule(path)._parameters[leaf] = nn.Parameter(empty, requires_grad=False)

    def _shared(self, prefixes: tuple[str, ...]) -> dict[str, str]:
        """Parameters under `prefixes` that are on disk as another's only, by whose: tied embeddings."""
        groups: dict[str, list[str]] = {}
        for parameter, first in self.model.all_tied_weights_keys.items():
            groups.setdefault(first, [first]).append(parameter)
        on_disk = {renamed for renamed, _ in self.tensors.values()}
        return {
            parameter: next(other for other in group if other in on_disk)
            for group in groups.values()
            for parameter in group
            if parameter not in on_disk and _under(parameter, prefixes)
        }

    def _read(self, prefixes: tuple[str, ...], device: torch.device, dtype: torch.dtype) -> None:
        wanted = [name for name, (renamed, _) in self.tensors.items() if _under(renamed, prefixes)]
        declare_dtype(self.model, prefixes, dtype)
        loading = LoadStateDictConfig(
            device_map={"": device},
            dtype=dtype,
            dtype_plan=self.model._get_dtype_plan(dtype),
            weight_mapping=get_model_conversion_mapping(self.model),  # type: ignore[arg-type]
        )
        lazy = {name: _OnDisk(self.entries[name]) for name in wanted}
        info, _ = convert_and_load_state_dict_in_model(self.model, lazy, loading, None)
        damaged = next((tensor.damage for tensor in lazy.values() if tensor.damage), None)
        if damaged is not None:
            raise damaged
        for said in info.conversion_errors.values():  # all that is left of what was raised
            if tells_of_memory(said):
                raise torch.OutOfMemoryError(f"{self.name}: while {prefixes[0] or 'all of it'} was loaded: {said}")
        problems = [*info.mismatched_keys, *info.conversion_errors, *info.unexpected_keys]
        if problems:
            raise CheckpointError(f"{self.name}: could not load {problems[0]} ({len(problems)} such tensors).")

    def unload(self, module: nn.Module) -> None:
        """Put a module's parameters back on meta, freeing their memory; buffers computed at start-up stay."""
        for child in module.modules():
            for name, parameter in child._parameters.items():
                if parameter is not None:
                    child._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    @contextmanager
    def around(self, tower: Tower, device: torch.device, dtype: torch.dtype, with_head: bool = False) -> Iterator[None]:
        """With everything of a tower loaded but its blocks: embeddings, the last norm; perhaps also what is between the
        tower and the logits. Encoders of images and sound are models of their own, and stay out.
        """
        root = self.model if with_head else tower.root
        prefix = f"{tower.path}." if tower.path and not with_head else ""
        others = [name for name, module in root.named_modules() if name and isinstance(module, PreTrainedModel)]
        apart = tuple(f"{name}." for name in others if with_head and not _under(tower.path, (name,)))
        outside = {
            f"{prefix}{name}": module
            for name, module in root.named_modules()
            if module._parameters
            and not f"{prefix}{name}.".startswith(f"{tower.blocks_path}.")
            and not f"{name}.".startswith(apart)
        }
        self.load(tuple(outside), device, dtype)
        for module in root.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(device)
        yield
        for module in outside.values():
            self.unload(module)

    def save_companions(self, folder: Path) -> None:
        """Copy tokenizer, chat template, generation config and the like into `folder`."""
        for pattern in _COPIED:
            for file in sorted(self.folder.glob(pattern)):
                if file.name not in _NOT_COPIED and not file.name.endswith(".index.json"):
                    shutil.copyfile(file, folder / file.name)


class _OnDisk:
    """A tensor that transformers' loader reads with `[...]`, into memory of its own: no mapping outlives its block.

    damage: why it could not be read. The loader reads in threads and keeps exceptions to itself.
    """

    def __init__(self, entry: Entry):
        self._entry = entry
        self.damage: CheckpointError | None = None

    def __getitem__(self, index: object) -> Tensor:
        try:
            return read_tensor(self._entry)
        except CheckpointError as error:
            self.damage = error
            raise


def open_source(model: str | os.PathLike[str], revision: str | None = None, trust_remote_code: bool = False) -> Source:
    """Open a repo id, a local folder or a GGUF file. Raises ModelError for anything that is not a dense model."""
    _quiet()
    cleanup = ExitStack()
    try:
        folder = _resolve(os.fspath(model), revision, trust_remote_code, cleanup)
        return Source(os.fspath(model), folder, cleanup, trust_remote_code)
    except BaseException:
        cleanup.close()
        raise


def open_headers(model: str | os.PathLike[str], revision: str | None = None, trust_remote_code: bool = False) -> Source:
    """Like `open_source`, of a model whose weights will not be read: those of a repo are not fetched.

    Raises ModelError, also for a GGUF file, whose weights have to be unpacked to be looked at.
    """
    name, path = os.fspath(model), Path(model).expanduser()
    if path.suffix == ".gguf":
        raise ModelError(f"{name}: a GGUF file has to be unpacked before anything is known of it. Give safetensors.")
    if path.exists() or name.count("/") > 1 or name.startswith((".", "/", "~")):
        return open_source(model, revision, trust_remote_code)
    _quiet()
    folder = _download(name, revision, trust_remote_code, weights=False)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{name} is no model: it has no config.json.")
    return Source(name, folder, ExitStack(), trust_remote_code, _remote_headers(name, revision))


def _remote_headers(name: str, revision: str | None) -> dict[str, Entry]:
    """The tensors of a repo on the Hub, from the headers of its files alone; their `file` is not there."""
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError, SafetensorsParsingError

    try:
        files = get_safetensors_metadata(name, revision=revision).files_metadata
    except (HfHubHTTPError, NotASafetensorsRepoError, SafetensorsParsingError, OSError) as error:
        raise ModelError(f"{name}: the headers of its weights could not be read ({first_line(error)}).") from error
    return {
        tensor: Entry(str_to_torch_dtype[info.dtype], tuple(info.shape), Path(file), *info.data_offsets)
        for file, found in sorted(files.items())
        for tensor, info in found.tensors.items()
    }


def _quiet() -> None:
    """wq shows its own progress; a bar for each block read would bury it."""
    transformers_logging.disable_progress_bar()


def _resolve(name: str, revision: str | None, trust_remote_code: bool, cleanup: ExitStack) -> Path:
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="wq-gguf-")))
        unpack_gguf(path, folder)
        return folder
    if path.is_dir():
        folder = path
    elif path.exists():
        raise ModelError(f"{name} is a file, but not a .gguf. Give a folder, a GGUF file or a repo id.")
    elif name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise ModelError(f"{name} does not exist. Give a folder, a GGUF file or a repo id.")
    else:
        folder = _download(name, revision, trust_remote_code)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{name} is no model: it has no config.json.")
    if not any(folder.glob("*.safetensors")):
        others = sorted(file.name for file in folder.glob("*.bin"))
        hint = f"It has {others[0]}: convert that to safetensors first." if others else "Nothing to read weights from."
        raise ModelError(f"{name} has no *.safetensors file. {hint}")
    check_folder(folder)
    return folder


def _download(name: str, revision: str | None, trust_remote_code: bool, weights: bool = True) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        wanted = _HUB_FILES[0 if weights else 1 :] + (["*.py"] if trust_remote_code else [])
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except HFValidationError as error:
        raise ModelError(f"{name} is neither a folder, a GGUF file nor a repo id ({first_line(error)}).") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"{name} is no local folder, and could not be fetched from the Hub ({first_line(error)}). "
            "Check the name, the network, and `hf auth login` for a gated model."
        ) from error


def unpack_gguf(file: Path, folder: Path) -> None:
    """Write a GGUF file's model, dequantized, and its tokenizer to `folder` as safetensors in float32.

    The one source that is held in memory whole: a GGUF tensor can only be read through its own layout.
    """
    location = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            **location, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        tokenizer = AutoTokenizer.from_pretrained(**location)
    except Exception as error:  # whatever the reader trips over, the user's file cannot be used
        raise ModelError(f"{file}: transformers could not read this GGUF file ({first_line(error)}).") from error
    model.config._name_or_path = ""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _config(folder: Path, name: str, trust_remote_code: bool) -> Any:
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # its classes check little of what a config says
        raise ModelError(f"{name} is no model that transformers can load ({first_line(error)}).") from error


def _build(config: Any, name: str, trust_remote_code: bool) -> PreTrainedModel:
    """The model's structure, parameters on meta, with the buffers that no checkpoint holds computed."""
    try:
        with torch.device("meta"):
            found = model_class(config)
            if found is AutoModelForCausalLM:
                model = found.from_config(config, trust_remote_code=trust_remote_code)
            else:
                model = found._from_config(config)
    except CheckpointError:
        raise
    except Exception as error:  # whatever a config of any origin makes transformers raise
        raise ModelError(
            f"{name}: transformers has no language model for {type(config).__name__} ({first_line(error)})."
        ) from error
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    owners = [(prefix, module) for prefix, module in model.named_modules() if isinstance(module, PreTrainedModel)]
    for path, module in model.named_modules():
        names = module._non_persistent_buffers_set
        if not names:
            continue
        for buffer in names:
            if module._buffers[buffer] is not None:
                module._buffers[buffer] = torch.zeros_like(module._buffers[buffer], device="cpu")
        owner = max((o for o in owners if _under(path, (o[0],))), key=lambda o: len(o[0]))[1]
        with torch.no_grad():
            owner._init_weights(module)  # transformers recomputes such buffers here; on meta it does nothing
    return model


def declare_dtype(model: nn.Module, prefixes: tuple[str, ...], dtype: torch.dtype) -> None:
    """Loading casts to the dtype a parameter was declared with; declare those on meta as the dtype wanted now."""
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            on_meta = parameter is not None and parameter.is_meta and parameter.is_floating_point()
            if on_meta and _under(f"{path}.{name}", prefixes):
                module._parameters[name] = nn.Parameter(parameter.to(dtype), requires_grad=False)


def _under(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(not prefix or name == prefix or name.startswith(prefix + ".") for prefix in prefixes)
