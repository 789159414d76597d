"""transformers' hooks: which layers become packed, what is loaded onto them, what is saved.

What a layer is, is decided by the tensors that are in the shards, checked against the config, before a module is
made. A tensor that is missing, left over or of the wrong shape is an error: transformers alone would fill it with
random numbers and warn.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import HfQuantizer, register_quantizer

from wq import formats
from wq.checkpoint import Entry, read_header
from wq.errors import CheckpointError, ModelError
from wq.formats import compressed_tensors
from wq.formats.stored import Packed, Stored
from wq.hf import experts, parallel
from wq.hf.config import METHOD, WqConfig
from wq.hf.conversion import PARAMETERS, Unpack, dense_like, is_own, packed_like
from wq.hf.head import Head
from wq.hf.inspection import inspect
from wq.layers import WqLinear
from wq.layers.ops import STREAM
from wq.layers.parts import whole
from wq.machine import Mapped
from wq.quantized import LEAVES
from wq.scheme import Scheme
from wq.structure.experts import find_experts
from wq.structure.linears import auto_group_size, find_linears, is_linear, patterns, shape_of
from wq.structure.towers import find_blocks


@register_quantizer(METHOD)
class WqQuantizer(HfQuantizer):
    """Loads dense and quantized repos onto `WqLinear` layers and packed experts."""

    quantization_config: WqConfig
    requires_calibration = False
    # What a weight is stored as. transformers derives converters, and tensor-parallel plans, from this.
    serialized_names = {"weight": ["weight", *LEAVES]}  # noqa: RUF012

    def __init__(self, quantization_config: WqConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.schemes: dict[str, Scheme] = {}  # on load: the scheme of each module, or parameter of experts
        self.fused: set[str] = set()  # those of them that are parameters of experts
        self.stored: dict[str, Stored] = {}  # already quantized: how each module is stored
        self.experts: dict[str, experts.Fused] = {}  # and each parameter of experts
        self.mapped = Mapped(())
        self.head: Head | None = None  # rounded on load
        self.damage: CheckpointError | None = None  # what a dense weight has that cannot be rounded

    # --- before the weights ---

    def update_device_map(self, device_map: Any) -> Any:
        """The current GPU when nothing else was asked for, as other quantizers do."""
        if device_map is None and torch.accelerator.is_available():
            return {"": torch.accelerator.current_device_index()}
        return device_map

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        if self.pre_quantized:
            self._prepare_packed(model, checkpoint_files or [])
        else:
            _stay_inside(model, checkpoint_files or [])
            self.mapped = Mapped(checkpoint_files or [])
            self._prepare_dense(model)
        return model

    def _prepare_dense(self, model: PreTrainedModel) -> None:
        """Choose the layers to quantize on load; they turn into `WqLinear` one by one as their weights arrive."""
        config = self.quantization_config
        keep = patterns(config.keep)
        sizes: dict[str, int] = {}  # in_features
        for path, block in find_blocks(model, type(model).__name__):
            for name, linear in find_linears(block, path, keep).items():
                sizes[f"{path}.{name}"] = shape_of(linear)[1]
            found = {f"{path}.{name}": size for name, size in find_experts(block, path, keep).items()}
            sizes |= {name: projection.in_features for name, projection in found.items()}
            self.fused |= set(found)
        if not sizes:
            raise ModelError(f"{type(model).__name__}: keep={list(config.keep)} leaves no layer to quantize.")
        dtype = str(torch.get_default_dtype()).removeprefix("torch.")
        size = auto_group_size(sizes) if config.group_size is None else config.group_size
        scheme = Scheme(config.bits, size, config.symmetric, dtype)
        for name, in_features in sizes.items():
            scheme.groups(in_features, name)
            self.schemes[name] = scheme
        dense = [n for n, m in model.named_modules() if (isinstance(m, nn.Linear) or is_linear(m)) and n not in sizes]
        config.checkpoint = compressed_tensors.config(scheme, dense)

    def _prepare_packed(self, model: PreTrainedModel, files: list[str]) -> None:
        """Put an empty `WqLinear` wherever the shards hold a packed weight, after checking that they fit."""
        _stay_inside(model, files)
        self.mapped = Mapped(files)
        entries: dict[str, Entry] = {}
        for file in files:
            more = read_header(Path(file))
            twice = sorted(entries.keys() & more.keys())
            if twice:
                raise CheckpointError(f"{twice[0]} is in two shards, one of them {file}. Download it again.")
            entries |= more
        with torch.device("cpu"):  # transformers is building its model on meta; the values read here are real
            found = inspect(model, entries, self.quantization_config.checkpoint or {})
        self.stored, self.experts = found.layers, found.experts
        if self.quantization_config.dequantize:
            return
        for path, stored in self.stored.items():
            dtype = getattr(torch, stored.scheme.scale_dtype)
            dense = model.get_submodule(path)
            model.set_submodule(path, packed_like(dense, stored.scheme, dtype, stored.permuted))
        for parameter, entry in self.experts.items():
            experts.make_room(model, parameter, entry.stored.scheme)
        # Recomputed on save; as parameters, tensor parallelism would cut them up. Of experts in other formats also the
        # zero points of a symmetric grid, and the column order, which by now has the name of a packed weight.
        skipped = {r"weight_shape$", r"g_idx$", r"_proj_shape$", r"_proj_zero_point$", r"experts\..*\.weight_packed$"}
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *skipped}

    def update_parallel_plan(self, model: PreTrainedModel, plan: dict[str, str]) -> None:
        """How packed layers are split over processes. Raises ModelError for one that cannot be."""
        super().update_parallel_plan(model, plan)
        if plan is not model.tp_plan:
            return
        if self.quantization_config.dequantize:
            if self.experts and parallel.processes(model) > 1:
                raise ModelError("packed experts cannot be dequantized in parts. Load them packed, or in one process.")
            parallel.adapt(model, plan, dict.fromkeys(self.stored), set(self.stored))
            return
        whole = set(self.schemes) | {p for p, s in self.stored.items() if not compressed_tensors.is_plain(s)}
        schemes = self.schemes | {path: stored.scheme for path, stored in self.stored.items()}
        layers = {path: scheme for path, scheme in schemes.items() if not self._is_experts(path)}
        parallel.adapt(model, plan, layers, whole)
        parallel.adapt_experts(model, plan, {name: self.schemes[name] for name in self.fused}, self.experts)

    # --- while they load ---

    @property
    def quantized_element_size(self) -> float | None:
        """Bytes a weight takes once quantized on load; how `device_map="auto"` plans."""
        scheme = next(iter(self.schemes.values()), None)
        return None if self.pre_quantized or scheme is None else scheme.bits / 8

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        if self.pre_quantized:
            return False
        module, _, leaf = param_name.rpartition(".")
        return param_name in self.schemes or (leaf == "weight" and module in self.schemes)

    def get_quantize_ops(self) -> ConversionOps:
        return parallel.QuantizeAndCut(self)

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        return {"dequantize": parallel.DequantizeAndCut}

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        """Converters for what the shards hold, before the model's own."""
        if not self.pre_quantized:
            return list(weight_conversions)
        if self.quantization_config.dequantize:
            direct = experts.dequantizers(self, self.experts)
            return [*direct, *super().update_weight_conversions(weight_conversions, model)]
        merging = experts.converters(self, weight_conversions, self.experts)
        return [*weight_conversions, *merging, *self.get_weight_conversions()]

    def get_weight_conversions(self) -> list[WeightConverter]:
        """Layers of other formats and dialects, one converter for a format. Plain packed tensors need none."""
        if not self.pre_quantized or self.quantization_config.dequantize:
            return list(super().get_weight_conversions())
        foreign = {stored.format for stored in self.stored.values() if not compressed_tensors.is_plain(stored)}
        return [
            WeightConverter(list(formats.get(name).LEAVES), ["weight_packed"], [Unpack(self), parallel.Cut(self)])
            for name in sorted(foreign - {"awq"} if "gptq" in foreign else foreign)  # awq's leaves are among gptq's
        ]

    # --- after ---

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.damage is not None:
            raise self.damage
        if self.pre_quantized and self.quantization_config.dequantize:
            model._weight_conversions = None  # type: ignore[assignment]  # they read packed names
            return model
        packed = {
            path: model.get_submodule(path) for path in (*self.schemes, *self.stored) if not self._is_experts(path)
        }
        for path, layer in packed.items():
            if not isinstance(layer, WqLinear):
                raise CheckpointError(f"{path}.weight was not in the checkpoint. Download it again.")
            _require_loaded(path, layer)
            layer.requires_grad_(False)  # the loader turns gradients on for every floating tensor
            read = layer.weight_packed.detach()
            # What accelerate moves in and out is on no device now, and keeps the checkpoint's layout.
            if layer.prepare(model.dtype).layout != STREAM:
                self.mapped.forget(read)
        fused = {name: self.schemes[name] for name in self.schemes if self._is_experts(name)}
        on_load = tuple(fused)
        fused |= {name: entry.stored.scheme for name, entry in self.experts.items()}
        if fused:
            experts.finish(model, fused)
        if self.quantization_config.head_bits is not None:
            self.head = Head.round(model, self.quantization_config.head_bits, self.mapped)
        used: Any = model._weight_conversions
        kept = [converter for converter in used or () if not is_own(converter)]
        model._weight_conversions = [*kept, *experts.converters_for_saving(kept, on_load)]  # type: ignore[assignment]
        return model

    def _is_experts(self, name: str) -> bool:
        return name in self.experts or name in self.fused

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors of the checkpoint that the model came from, or those of a compressed-tensors one."""
        state = model.state_dict()
        if self.head is not None:
            self.head.take_from(state)
        for name, module in model.named_modules():
            if isinstance(module, WqLinear) and (self.head is None or name != self.head.path):
                tensors = {leaf: state.pop(f"{name}.{leaf}", None) for leaf in PARAMETERS}
                stored = self.stored.get(name) or Stored(
                    "compressed-tensors", module.scheme, (module.out_features, module.in_features)
                )
                if not compressed_tensors.is_plain(stored):  # takes values: of all processes, and of what is offloaded
                    tensors = {k: whole(experts.onloaded(model, f"{name}.{k}", t)) for k, t in tensors.items()}
                values = Packed(*tensors.values())
                for leaf, tensor in formats.get(stored.format).from_packed(values, stored).items():
                    state[f"{name}.{leaf}"] = tensor
        experts.save(model, state, self.experts)
        return state, {"format": "pt"}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        for name, module in model.named_modules():
            offloaded = any(p.is_meta for p in module.parameters(recurse=False))
            if offloaded or parallel.is_split(module):
                where = "offloaded" if offloaded else "split over processes"
                raise ModelError(f"{name} is {where}; load the model with WqConfig(dequantize=True) instead.")
        for name, layer in list(model.named_modules()):
            if isinstance(layer, WqLinear):
                model.set_submodule(name, dense_like(layer, dtype))
        if self.head is not None:
            self.head.restore(model)
        experts.dequantize(model, dtype)
        return model

    def is_serializable(self) -> bool:
        """Asked before a file is written. Raises ModelError for a model whose head's weight is gone."""
        if self.head is not None:
            self.head.check_saved()
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on top train; the packed weights do not."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _stay_inside(model: PreTrainedModel, files: list[str]) -> None:
    """Refuse shards that an index finds outside of a local folder: transformers follows it anywhere."""
    folder = Path(model.config._name_or_path)
    for file in map(Path, files if folder.is_dir() else ()):
        if not file.is_relative_to(folder) or ".." in file.relative_to(folder).parts:
            raise CheckpointError(f"{folder}: its index looks for {file} outside of it. Do not load this folder.")


def _require_loaded(path: str, module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if not parameter.is_meta and not getattr(parameter, "_is_hf_initialized", False):
            raise CheckpointError(f"{path}.{name} was not in the checkpoint. Download it again.")
