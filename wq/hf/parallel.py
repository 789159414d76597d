"""Tensor parallelism: each process holds some rows, or some columns, of every packed weight.

transformers splits a model by a plan that gives layers a style. Before loading, the style turns parameters into
DTensors, of which each process then reads its part of the file, and wraps the layer's forward. wq's styles do so for a
`WqLinear`, but for

- tensors that lie otherwise on disk than in the layer, and weights that are rounded on load: each process reads them
  whole, one layer at a time, and keeps its part once they are packed;
- one scale for a whole row, which every process has when the columns are split;
- columns in another order (act-order): a part of them is for inputs from anywhere, so the input is gathered.

A split that would cut a word of codes or a group of columns is refused before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES, replace_layer_number_by_wildcard
from transformers.distributed.tensor_parallel import ColwiseParallel, RowwiseParallel

from wq.errors import ModelError
from wq.formats import compressed_tensors
from wq.hf import experts
from wq.hf.conversion import Dequantize, Quantize, _Operation
from wq.hf.experts import Fused
from wq.layers import ExpertWeight, WqLinear
from wq.scheme import Scheme
from wq.structure.linears import shape_of

_PREFIX = "wq_"  # of the names of wq's styles; after it, the name of the style of transformers that they refine
_ROWS = ("colwise", "colwise_gather_output", "colwise_rep")
_COLUMNS = ("rowwise", "rowwise_split_input", "rowwise_rep")
_NOT_SPLIT = ("replicate", "mla_kv_a_proj")  # styles that leave the weight whole


def processes(model: PreTrainedModel) -> int:
    """Over how many processes the model's layers are split."""
    config = getattr(model.config, "distributed_config", None)
    return int(getattr(config, "tp_size", None) or 1)


def adapt(model: PreTrainedModel, plan: dict[str, str], layers: Mapping[str, Scheme | None], whole: set[str]) -> None:
    """Give packed layers, and those that will be or were, wq's styles. whole: those whose tensors are read whole.

    Raises ModelError for a layer that cannot be split as planned.
    """
    count = processes(model)
    for path, scheme in layers.items() if count > 1 else ():
        key = replace_layer_number_by_wildcard(path)
        style = plan.get(key, _NOT_SPLIT[0]).removeprefix(_PREFIX)
        layer = model.get_submodule(path)
        if style in _NOT_SPLIT and (isinstance(layer, WqLinear) or style == _NOT_SPLIT[0]):
            continue
        if style not in _ROWS + _COLUMNS:
            raise ModelError(f"{path}: wq cannot split a {type(layer).__name__} by the style {style!r}.")
        if scheme is not None:
            shape = (layer.out_features, layer.in_features) if isinstance(layer, WqLinear) else shape_of(layer)
            _check(path, shape, scheme, count, style in _ROWS)
        layer._wq_whole = path in whole  # type: ignore[assignment]
        plan[key] = _PREFIX + style


def adapt_experts(
    model: PreTrainedModel, plan: Mapping[str, str], on_load: Mapping[str, Scheme], stored: Mapping[str, Fused]
) -> None:
    """Refuse experts that cannot be split as planned. Raises ModelError."""
    if processes(model) == 1 or (getattr(model.config.distributed_config, "ep_size", None) or 1) > 1:
        return  # or expert parallelism shares them out, one by one
    schemes = {**on_load, **{path: entry.stored.scheme for path, entry in stored.items()}}
    for path, scheme in schemes.items():
        style = plan.get(replace_layer_number_by_wildcard(path))
        if style is None:
            continue
        sizes, rows = experts.sizes(model, path), style == "packed_colwise" or style in _ROWS
        if sizes.transposed or not (rows or style in _COLUMNS):
            raise ModelError(f"{path}: wq cannot split packed experts by the style {style!r}.")
        if path in stored and not compressed_tensors.is_plain(stored[path].stored):
            raise ModelError(f"{path}: wq splits experts of compressed-tensors checkpoints only. See `wq convert`.")
        shape = (sizes.out_features // 2 if style == "packed_colwise" else sizes.out_features, sizes.in_features)
        _check(path, shape, scheme, processes(model), rows)
        if not rows and scheme.groups(sizes.in_features, path) == 1:
            raise ModelError(
                f"{path}: the processes would cut the one group of each row. Share out whole experts: ep_size."
            )


def _check(path: str, shape: tuple[int, int], scheme: Scheme, count: int, rows: bool) -> None:
    """Refuse to cut words, or groups of more than one in a row."""
    size, what = shape[0 if rows else 1], "rows" if rows else "columns"
    part, rest = divmod(size, count)
    group = 0 if rows or scheme.groups(shape[1], path) == 1 else scheme.group_size
    if rest or (group and part % group):
        unit = f" in groups of {group}" if group else ""
        raise ModelError(f"{path}: {size} {what}{unit} cannot be split evenly over {count} processes.")
    if part * scheme.bits % 32 and not (rows and scheme.symmetric):
        kind = f"{scheme.bits}-bit {'zero points' if rows else 'codes'}"
        raise ModelError(f"{path}: {part} of {size} {what} for each of {count} processes would cut a word of {kind}.")


class _Style:
    """What wq's styles add to those of transformers."""

    def skips(self, module: WqLinear) -> tuple[str, ...]:
        """Parameters that every process keeps whole."""
        raise NotImplementedError

    def part(self, module: WqLinear, count: int) -> tuple[int, int]:
        """`(out, in)` of a process's part."""
        raise NotImplementedError

    def shard_param(self, module: nn.Module, param: str, mesh: Any) -> None:
        if param == "bias" or not getattr(module, "_wq_whole", False):
            self.place(module, param, mesh)

    def place(self, module: nn.Module, param: str, mesh: Any) -> None:
        """Turn a parameter into a DTensor."""
        if not (isinstance(module, WqLinear) and param in self.skips(module)):
            super().shard_param(module, param, mesh)  # type: ignore[misc]

    def install_forward(self, module: nn.Module, mesh: Any) -> nn.Module:
        if hasattr(module, "_wq_whole"):
            module._wq_parallel = (self, mesh)  # type: ignore[assignment]
        if isinstance(module, WqLinear):
            module.part = self.part(module, mesh.size())
        installed: nn.Module = super().install_forward(module, mesh)  # type: ignore[misc]
        return installed


class Rows(_Style, ColwiseParallel):
    """Each process has some rows: some of the outputs."""

    def skips(self, module: WqLinear) -> tuple[str, ...]:
        return ("permutation",)

    def part(self, module: WqLinear, count: int) -> tuple[int, int]:
        return module.out_features // count, module.in_features


class Columns(_Style, RowwiseParallel):
    """Each process has some columns; the products are summed."""

    def skips(self, module: WqLinear) -> tuple[str, ...]:
        single = module.weight_scale.shape[1] == 1
        return ("weight_scale", "weight_zero_point") if single else ()

    def part(self, module: WqLinear, count: int) -> tuple[int, int]:
        return module.out_features, module.in_features // count

    def transform_inputs_pre_forward(self, module: nn.Module, args: Any, kwargs: Any, mesh: Any) -> Any:
        if getattr(module, "permutation", None) is None:
            return super().transform_inputs_pre_forward(module, args, kwargs, mesh)
        from torch.distributed.tensor import DTensor, Partial, Replicate

        if self.input_layouts.is_shard():
            x = self._from_local_last_dim_shard(args[0], mesh, module.in_features)
        else:
            x = DTensor.from_local(args[0], mesh, [self.input_layouts], run_check=False)
        gathered = x.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
        return (gathered, *args[1:]), kwargs


for _name in (*_ROWS, *_COLUMNS):
    _base: Any = ALL_PARALLEL_STYLES[_name]
    _style: Any = (Rows if _name in _ROWS else Columns)(
        input_layouts=_base.input_layouts, output_layouts=_base.output_layouts
    )
    ALL_PARALLEL_STYLES.register(_PREFIX + _name, _style)


# --- tensors that arrive whole ---


class Cut(_Operation):
    """The packed tensors of layers arrive whole; of those that are split, this process's part goes on."""

    def convert(self, input_dict: dict[str, Tensor], model: nn.Module, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        return {name: _cut(model, name, tensor) for name, tensor in input_dict.items()}


def _cut(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    path, _, leaf = name.rpartition(".")
    layer = model.get_submodule(path)
    if not getattr(layer, "_wq_whole", False):
        return tensor
    style, mesh = layer._wq_parallel  # type: ignore[misc]
    style.place(layer, leaf, mesh)
    return _part(tensor, layer._parameters[leaf])


def _part(tensor: Tensor, parameter: Any) -> Tensor:
    """A process's part of what becomes a parameter, if that is a DTensor."""
    if not hasattr(parameter, "placements"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    split = distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
    part: Tensor = split.to_local().clone()  # of its own: the whole must not live on
    return part


class DequantizeAndCut(Dequantize):
    """`Dequantize`, and of a layer that is split, this process's part."""

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], full_layer_name: str, model: PreTrainedModel, **kwargs: Any
    ) -> dict[str, Any]:
        made = super().convert(input_dict, full_layer_name, model, **kwargs)
        return {key: _cut(model, key, value) if key == full_layer_name else value for key, value in made.items()}


class QuantizeAndCut(Quantize):
    """`Quantize` for a model that is split: linear layers arrive whole, experts in parts."""

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], full_layer_name: str, model: nn.Module, missing_keys: set[str], **kwargs: Any
    ) -> dict[str, Tensor]:
        path, _, name = full_layer_name.rpartition(".")
        dense = model.get_submodule(path)
        placed = dense._parameters[name]
        tensors = super().convert(input_dict, full_layer_name, model, missing_keys, **kwargs)
        if hasattr(placed, "placements"):
            for packed in tensors:
                _place_like(placed, dense, packed.rpartition(".")[2])
        if hasattr(dense, "_wq_parallel"):
            layer: Any = model.get_submodule(path)
            style, mesh = dense._wq_parallel  # type: ignore[misc]
            layer._wq_whole = True
            style.install_forward(layer, mesh)
        return {key: _cut(model, key, tensor) for key, tensor in tensors.items()}


def _place_like(dense: Any, module: nn.Module, name: str) -> None:
    """Make a parameter of experts a DTensor split as the dense one is; their dimensions are the same."""
    from torch.distributed.tensor import distribute_tensor

    empty = module._parameters[name]
    assert empty is not None
    split = distribute_tensor(empty, dense.device_mesh, dense.placements, src_data_rank=None)
    module._parameters[name] = nn.Parameter(split, requires_grad=False)


def is_split(module: nn.Module) -> bool:
    """Whether a module holds a part of a weight only."""
    return module.split if isinstance(module, ExpertWeight) else getattr(module, "part", None) is not None
