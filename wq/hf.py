"""wq inside `from_pretrained`: the only file that knows transformers' quantizer API.

    AutoModelForCausalLM.from_pretrained(repo, quantization_config=WqConfig())

A dense repo is rounded to nearest while it loads. A compressed-tensors pack-quantized repo loads onto packed layers
and stays packed. `WqConfig(dequantize=True)` on such a repo gives an ordinary dense model.

What a layer is, is decided by the tensors that are in the shards, checked against the config, before a module is
made. A tensor that is missing, left over or of the wrong shape is an error: transformers alone would fill it with
random numbers and warn.

transformers has registries for quantizers, but a user's config for an already quantized repo goes through
`AutoHfQuantizer.merge_quantization_configs`, which only takes the class the repo was written with. Importing this
file wraps that one function, for `WqConfig` alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils import logging as transformers_logging
from transformers.utils.quantization_config import QuantizationConfigMixin

import wq_kernels
from wq.checkpoint import Entry, read_header
from wq.errors import CheckpointError, FormatError, ModelError, first_line
from wq.formats import bits as bit_stream
from wq.formats import compressed_tensors
from wq.layers import ExpertWeight, WqLinear, experts
from wq.scheme import PER_CHANNEL, Scheme
from wq.solvers import rtn
from wq.structure import auto_group_size, find_blocks, find_linears, is_linear, map_names, patterns

_METHOD = "wq"  # the name in transformers' registries; never written to a checkpoint
_PACKED = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")


@register_quantization_config(_METHOD)
class WqConfig(QuantizationConfigMixin):
    """The one flag.

    bits, group_size, symmetric, keep: how to quantize a dense repo on load, as in `wq.quantize`; an already quantized
    repo brings its own. dequantize: load an already quantized repo as a dense model.
    Raises SchemeError for values no scheme has.
    """

    def __init__(
        self,
        bits: int = 4,
        group_size: int | None = None,
        symmetric: bool = True,
        keep: Iterable[str] = (),
        dequantize: bool = False,
    ):
        Scheme(bits, PER_CHANNEL if group_size is None else group_size, symmetric)  # refuse bad values here and now
        self.quant_method = _METHOD  # type: ignore[assignment]
        self.bits, self.group_size, self.symmetric = bits, group_size, symmetric
        self.keep, self.dequantize = tuple(keep), dequantize
        self.checkpoint: dict[str, Any] | None = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The inverse of `to_dict`, for a config that is already quantized."""
        config = cls()
        config.checkpoint = dict(config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint of this model says: a standard format's own config, readable without wq."""
        if self.checkpoint is not None:
            return dict(self.checkpoint)
        known = {"bits": self.bits, "group_size": self.group_size, "symmetric": self.symmetric, "keep": list(self.keep)}
        return {"quant_method": _METHOD, **known}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


@register_quantizer(_METHOD)
class WqQuantizer(HfQuantizer):
    """Loads dense and compressed-tensors repos onto `WqLinear` layers."""

    quantization_config: WqConfig
    requires_calibration = False
    # What a weight is stored as. transformers derives converters, and tensor-parallel plans, from this.
    serialized_names = {"weight": ["weight", *_PACKED]}  # noqa: RUF012

    def __init__(self, quantization_config: WqConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.schemes: dict[str, Scheme] = {}  # module path: how its weight is, or is to be, stored

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
            self._prepare_dense(model)
        return model

    def _prepare_dense(self, model: PreTrainedModel) -> None:
        """Choose the layers to quantize on load; they turn into `WqLinear` one by one as their weights arrive."""
        config = self.quantization_config
        path, blocks = find_blocks(model, type(model).__name__)
        keep = patterns(config.keep)
        linears: dict[str, nn.Linear] = {}
        for index, block in enumerate(blocks):
            found = find_linears(block, f"{path}.{index}", keep)
            linears |= {f"{path}.{index}.{name}": linear for name, linear in found.items()}
        if not linears:
            raise ModelError(f"{type(model).__name__}: keep={list(config.keep)} leaves no layer to quantize.")
        dtype = str(torch.get_default_dtype()).removeprefix("torch.")
        size = config.group_size
        if size is None:
            size = auto_group_size({name: linear.in_features for name, linear in linears.items()})
        scheme = Scheme(config.bits, size, config.symmetric, dtype)
        for name, linear in linears.items():
            scheme.groups(linear.in_features, name)
            self.schemes[name] = scheme
        dense = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in linears]
        config.checkpoint = compressed_tensors.config(scheme, dense)

    def _prepare_packed(self, model: PreTrainedModel, files: list[str]) -> None:
        """Put an empty `WqLinear` wherever the shards hold a packed weight, after checking that they fit."""
        entries: dict[str, Entry] = {}
        for file in files:
            entries |= read_header(Path(file))
        mapped, absent, unexpected = map_names(model, entries)
        layers: dict[str, dict[str, Entry]] = {}
        for name, entry in entries.items():
            module, _, leaf = mapped[name][0].rpartition(".")
            if leaf in _PACKED:
                layers.setdefault(module, {})[leaf] = entry
        for module, tensors in layers.items():
            self.schemes[module] = _scheme_of(model, module, tensors, self.quantization_config.checkpoint)
        held = {f"{module}.weight" for module in layers}
        packed = {f"{module}.{leaf}" for module, tensors in layers.items() for leaf in tensors}
        _refuse(type(model).__name__, "missing", [name for name in absent if name not in held])
        _refuse(type(model).__name__, "unexpected", [name for name in unexpected if mapped[name][0] not in packed])
        if self.quantization_config.dequantize:
            return
        for module, scheme in self.schemes.items():
            scale = layers[module]["weight_scale"].dtype
            model.set_submodule(module, _packed_like(model.get_submodule(module), scheme, scale))
        # Recomputed on save; as a parameter, tensor parallelism would cut it up.
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), r"weight_shape$"}

    # --- while they load ---

    @property
    def quantized_element_size(self) -> float | None:
        """Bytes a weight takes once quantized on load; how `device_map="auto"` plans."""
        scheme = next(iter(self.schemes.values()), None)
        return None if self.pre_quantized or scheme is None else scheme.bits / 8

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        module, _, leaf = param_name.rpartition(".")
        return not self.pre_quantized and leaf == "weight" and module in self.schemes

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        return {"dequantize": _Dequantize}  # packed tensors load one to one and need no operation

    # --- after ---

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.pre_quantized and self.quantization_config.dequantize:
            model._weight_conversions = None  # type: ignore[assignment]  # they read packed names; saving the dense model must not
            return model
        for path in self.schemes:
            layer = model.get_submodule(path)
            if not isinstance(layer, WqLinear):
                raise CheckpointError(f"{path}.weight was not in the checkpoint. Download it again.")
            for name, parameter in layer.named_parameters():
                if not parameter.is_meta and not getattr(parameter, "_is_hf_initialized", False):
                    raise CheckpointError(f"{path}.{name} was not in the checkpoint. Download it again.")
            layer.requires_grad_(False)  # the loader turns gradients on for every floating tensor
            layer.prepare()  # what accelerate moves in and out is on no device now, and keeps the checkpoint's layout
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The state dict with the shapes that other readers of the format want."""
        state = model.state_dict()
        for name, module in model.named_modules():
            if isinstance(module, WqLinear):
                state[f"{name}.weight_shape"] = torch.tensor([module.out_features, module.in_features])
        return state, {"format": "pt"}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # saving turns config.dtype into a string
        for name, layer in list(model.named_modules()):
            if isinstance(layer, WqLinear):
                with torch.device("meta"):
                    dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
                dense.weight = nn.Parameter(layer.dequantize(dtype), requires_grad=False)
                if layer.bias is not None:
                    dense.bias = layer.bias
                model.set_submodule(name, dense)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on top train; the packed weights do not."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _scheme_of(model: nn.Module, path: str, tensors: dict[str, Entry], config: dict[str, Any] | None) -> Scheme:
    """The scheme that a layer's tensors say they have. Raises CheckpointError when they contradict the model."""
    try:
        linear = model.get_submodule(path)
    except AttributeError:
        linear = None
    if linear is None or not is_linear(linear):
        what = "is not in the model" if linear is None else f"is a {type(linear).__name__}, not an nn.Linear"
        raise CheckpointError(f"{path} has packed weights but {what}.")
    absent = {"weight_packed", "weight_scale"} - set(tensors)
    if absent:
        raise CheckpointError(f"{path}: {min(absent)} is missing. Download the checkpoint again.")
    rows, in_features = linear.out_features, linear.in_features
    packed, scale = tensors["weight_packed"], tensors["weight_scale"]
    bits = packed.shape[-1] * 32 // in_features if packed.shape else 0
    groups = scale.shape[-1] if len(scale.shape) == 2 else 0
    expected: dict[str, tuple[int, ...]] = {
        "weight_packed": (rows, bit_stream.words(in_features, bits)),
        "weight_scale": (rows, groups),
        "weight_zero_point": (bit_stream.words(rows, bits), groups),
    }
    for leaf, shape in expected.items():
        if leaf in tensors and tensors[leaf].shape != shape:
            raise CheckpointError(
                f"{path}.{leaf} is {list(tensors[leaf].shape)}; for {bits} bits, {groups} groups and a weight of "
                f"[{rows}, {in_features}] it must be {list(shape)}. The file does not fit this model's config."
            )
    if not groups or in_features % groups:
        raise CheckpointError(f"{path}: {groups} groups do not divide in_features {in_features}.")
    declared = {group["weights"]["num_bits"] for group in (config or {}).get("config_groups", {}).values()}
    if declared and bits not in declared:
        raise CheckpointError(f"{path} holds {bits} bits for each weight; config.json says {sorted(declared)}.")
    size = PER_CHANNEL if groups == 1 else in_features // groups
    return Scheme(bits, size, "weight_zero_point" not in tensors, str(scale.dtype).removeprefix("torch."))


def _packed_like(dense: nn.Module, scheme: Scheme, scale: torch.dtype) -> WqLinear:
    """An empty `WqLinear` in the place of `dense`, with its bias."""
    assert isinstance(dense, nn.Linear)
    layer = WqLinear(dense.in_features, dense.out_features, dense.bias is not None, scheme, scale)
    layer.bias = dense.bias
    return layer


def _refuse(model: str, what: str, names: list[str]) -> None:
    if names:
        more = ", ..." if len(names) > 3 else ""
        raise CheckpointError(
            f"{model}: {len(names)} {what} tensors in the checkpoint: {', '.join(names[:3])}{more}. "
            "It is damaged, or was written for another architecture; wq does not load it with random weights."
        )


class _Quantize(ConversionOps):
    """A dense weight arrives; its layer becomes a `WqLinear` and its packed tensors go on."""

    def __init__(self, hf_quantizer: WqQuantizer):
        self.hf_quantizer = hf_quantizer  # transformers looks for this attribute by name

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], full_layer_name: str, model: nn.Module, missing_keys: set[str], **kwargs: Any
    ) -> dict[str, Tensor]:
        (value,) = input_dict.values()
        weight = value[0] if isinstance(value, list) else value
        path = full_layer_name.removesuffix(".weight")
        scheme = self.hf_quantizer.schemes[path]
        solution = rtn.solve(weight, None, scheme)
        model.set_submodule(path, _packed_like(model.get_submodule(path), scheme, solution.scale.dtype))
        missing_keys.discard(full_layer_name)
        packed = compressed_tensors.pack(solution, scheme)
        return {f"{path}.{leaf}": tensor for leaf, tensor in packed.items() if leaf != "weight_shape"}


class _Dequantize(ConversionOps):
    """Packed tensors arrive; the dense weight goes on. A weight that is dense already passes, cast as declared."""

    def __init__(self, hf_quantizer: WqQuantizer):
        self.hf_quantizer = hf_quantizer

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], full_layer_name: str, model: PreTrainedModel, **kwargs: Any
    ) -> dict[str, Any]:
        if set(input_dict) - {"weight", *_PACKED}:  # tensors on their way to a merge, experts say; they are dense
            return input_dict
        tensors = {name: v[0] if isinstance(v, list) else v for name, v in input_dict.items()}
        dtype = model.get_parameter_or_buffer(full_layer_name).dtype
        if "weight_packed" not in tensors:
            return {full_layer_name: tensors["weight"].to(dtype)}
        scheme = self.hf_quantizer.schemes[full_layer_name.removesuffix(".weight")]
        out_features, in_features = model.get_parameter(full_layer_name).shape
        weight = wq_kernels.dequantize(
            tensors["weight_packed"],
            tensors["weight_scale"],
            tensors.get("weight_zero_point"),
            scheme.bits,
            out_features,
            in_features,
            dtype,
        )
        return {full_layer_name: weight}

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError("a dequantized model is saved dense")


def _bind(mine: WqConfig, checkpoint: Any) -> WqConfig:
    """`mine` for a repo that says it is `checkpoint`. Raises FormatError for a format wq does not read."""
    values = checkpoint if isinstance(checkpoint, dict) else checkpoint.to_dict()
    method, layout = values.get("quant_method"), values.get("format")
    if method != compressed_tensors.QUANT_METHOD or layout != "pack-quantized":
        raise FormatError(
            f"this repo is quantized as {method}{f' {layout}' if layout else ''}; wq loads compressed-tensors "
            "pack-quantized. Leave quantization_config out to use the repo's own loader."
        )
    ordered = [(g.get("weights") or {}).get("actorder") for g in values.get("config_groups", {}).values()]
    if any(order in ("group", "dynamic") for order in ordered):
        raise FormatError("this repo was quantized with actorder 'group', a run-time column order wq does not read.")
    bound = WqConfig(mine.bits, mine.group_size, mine.symmetric, mine.keep, mine.dequantize)
    bound.checkpoint = dict(values)
    return bound


def _experts_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """The experts implementation called `wq`; experts that are dense take transformers' grouped one."""
    if isinstance(getattr(module, "down_proj", None), ExpertWeight):
        return experts.forward(module, *args, **kwargs)
    return ALL_EXPERTS_FUNCTIONS["grouped_mm"](module, *args, **kwargs)


ALL_EXPERTS_FUNCTIONS.register(experts.IMPLEMENTATION, _experts_forward)


def _wrap_merge() -> None:
    original = AutoHfQuantizer.merge_quantization_configs.__func__  # type: ignore[attr-defined]

    def merge(cls: type, quantization_config: Any, quantization_config_from_args: Any) -> Any:
        if isinstance(quantization_config_from_args, WqConfig):
            return _bind(quantization_config_from_args, quantization_config)
        return original(cls, quantization_config, quantization_config_from_args)

    AutoHfQuantizer.merge_quantization_configs = classmethod(merge)  # type: ignore[method-assign, assignment]


_wrap_merge()


def load(
    model: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    revision: str | None = None,
) -> tuple[PreTrainedModel, Any]:
    """A model to run and its tokenizer, from a dense or quantized repo or folder, or a GGUF file.

    Quantized ones load packed; dense ones stay dense. Raises ModelError when there is no model to load.
    """
    name = os.fspath(model)
    path = Path(name).expanduser()
    options: dict[str, Any] = {"dtype": dtype, "revision": revision}
    location: dict[str, Any] = {"pretrained_model_name_or_path": str(path) if path.exists() else name}
    if path.suffix == ".gguf" and path.is_file():
        location = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        options["quantization_config"] = GgufConfig(dequantize=True)
        if dtype == "auto":
            options["dtype"] = torch.float32
    elif _is_quantized(location["pretrained_model_name_or_path"], revision):
        options["quantization_config"] = WqConfig()
    try:
        with _quiet():
            loaded = AutoModelForCausalLM.from_pretrained(**location, **options)
            tokenizer = AutoTokenizer.from_pretrained(**location, revision=revision)
    except (OSError, ValueError) as error:
        if isinstance(error, (CheckpointError, FormatError)):
            raise
        raise ModelError(f"{name} could not be loaded ({first_line(error)}).") from error
    if device is not None:
        loaded.to(device)  # type: ignore[arg-type]
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


def _is_quantized(name: str, revision: str | None) -> bool:
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise ModelError(f"{name} is no model that transformers can load ({first_line(error)}).") from error
    return getattr(config, "quantization_config", None) is not None
