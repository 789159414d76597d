"""Tensors on their way between a checkpoint and the model: transformers' conversion operations."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D

from wq import formats
from wq.checkpoint import finite
from wq.errors import CheckpointError
from wq.formats import compressed_tensors
from wq.formats.stored import Packed, Stored
from wq.hf import experts
from wq.layers import WqLinear
from wq.scheme import Scheme
from wq.solvers import rtn
from wq.structure.linears import is_transposed, shape_of

if TYPE_CHECKING:
    from wq.hf.quantizer import WqQuantizer

PARAMETERS = ("weight_packed", "weight_scale", "weight_zero_point", "permutation")  # of a WqLinear, as Packed has them


class _Operation(ConversionOps):
    """An operation of wq's quantizer. transformers looks for the attribute `hf_quantizer` by name: with it, tensors
    arrive as they are in the file; and it copies operations deeply, once for each parameter."""

    supports_many_to_many = True

    def __init__(self, hf_quantizer: WqQuantizer):
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: Any) -> _Operation:
        return self


def single(values: dict[str, Any]) -> dict[str, Tensor]:
    """Collected tensors, one for each pattern, by the last part of their name."""
    return {name.rpartition(".")[2]: v[0] if isinstance(v, list) else v for name, v in values.items()}


def packed_like(dense: Any, scheme: Scheme, scale: torch.dtype, permuted: bool = False) -> WqLinear:
    """An empty `WqLinear` in the place of `dense`, with its bias."""
    out_features, in_features = shape_of(dense)
    layer = WqLinear(in_features, out_features, dense.bias is not None, scheme, scale, permuted)
    layer.transposed = is_transposed(dense)
    layer.bias = dense.bias
    return layer


def dense_like(layer: WqLinear, dtype: torch.dtype | None) -> nn.Module:
    """The dense layer that a `WqLinear` stands for, of the class that it replaced."""
    with torch.device("meta"):
        if layer.transposed:
            dense: Any = Conv1D(layer.out_features, layer.in_features)
        else:
            dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    weight = layer.dequantize(dtype)
    dense.weight = nn.Parameter(weight.t().contiguous() if layer.transposed else weight, requires_grad=False)
    dense.bias = layer.bias
    return dense


class Quantize(_Operation):
    """A dense weight arrives; its layer becomes a `WqLinear` and its packed tensors go on."""

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], full_layer_name: str, model: nn.Module, missing_keys: set[str], **kwargs: Any
    ) -> dict[str, Tensor]:
        (weight,) = single(input_dict).values()
        missing_keys.discard(full_layer_name)
        try:
            finite(full_layer_name, weight)
        except CheckpointError as error:  # raised when all are loaded: transformers swallows what is raised here
            self.hf_quantizer.damage = self.hf_quantizer.damage or error
            weight = torch.nan_to_num(weight)
        if full_layer_name in self.hf_quantizer.fused:
            return self._experts(weight, full_layer_name, model)
        path = full_layer_name.removesuffix(".weight")
        scheme = self.hf_quantizer.schemes[path]
        dense = model.get_submodule(path)
        solution = rtn.solve(weight.t() if is_transposed(dense) else weight, None, scheme)
        model.set_submodule(path, packed_like(dense, scheme, solution.scale.dtype))
        packed = compressed_tensors.pack(solution, scheme)
        return {f"{path}.{leaf}": tensor for leaf, tensor in packed.items() if leaf != "weight_shape"}

    def _experts(self, weight: Tensor, name: str, model: nn.Module) -> dict[str, Tensor]:
        """A 3-D weight: one expert after the other."""
        scheme = self.hf_quantizer.schemes[name]
        matrices = weight.transpose(1, 2) if experts.transposed(model, name) else weight
        experts.make_room(model, name, scheme)
        packed = [compressed_tensors.pack(rtn.solve(matrix, None, scheme), scheme) for matrix in matrices]
        leaves = [leaf for leaf in packed[0] if leaf != "weight_shape"]
        return {f"{name}{leaf.removeprefix('weight')}": torch.stack([p[leaf] for p in packed]) for leaf in leaves}


class Unpack(_Operation):
    """The tensors of one layer in any format arrive; those of its `WqLinear` go on."""

    def convert(self, input_dict: dict[str, Any], full_layer_name: str, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        path = full_layer_name.rpartition(".")[0]
        stored = self.hf_quantizer.stored[path]
        tensors = single(input_dict)
        packed = read(tensors, stored)
        for tensor in tensors.values():
            self.hf_quantizer.mapped.forget(tensor)
        return {f"{path}.{name}": tensor for name, tensor in zip(PARAMETERS, packed, strict=True) if tensor is not None}

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError("`get_state_dict_and_metadata` gives the checkpoint's own tensors")


class UnpackExperts(_Operation):
    """One kind of tensor, of all experts, in another format; on its way to be merged."""

    def __init__(self, hf_quantizer: WqQuantizer, leaf: str):
        super().__init__(hf_quantizer)
        self.leaf = leaf

    def convert(self, input_dict: dict[str, Any], full_layer_name: str, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        target = re.sub(r"_(packed|scale|zero_point)$", "", full_layer_name)
        stored = self.hf_quantizer.experts[target].stored
        reader = formats.get(stored.format)
        made = {name: [reader.convert_leaf(self.leaf, t, stored) for t in ts] for name, ts in input_dict.items()}
        for tensor in (tensor for tensors in input_dict.values() for tensor in tensors):
            self.hf_quantizer.mapped.forget(tensor)
        return made

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError("`get_state_dict_and_metadata` gives the checkpoint's own tensors")


class Dequantize(_Operation):
    """Packed tensors arrive; the dense weight goes on. A weight that is dense already passes, cast as declared."""

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], full_layer_name: str, model: PreTrainedModel, **kwargs: Any
    ) -> dict[str, Any]:
        dtype = model.get_parameter_or_buffer(full_layer_name).dtype
        fused = self.hf_quantizer.experts.get(full_layer_name)
        if fused is not None and fused.pieces:
            return self._experts(input_dict, fused.stored, dtype)
        if fused is not None:
            return {
                full_layer_name: self._direct(
                    input_dict, fused.stored, dtype, experts.transposed(model, full_layer_name)
                )
            }
        tensors = single(input_dict)
        known = self.hf_quantizer.stored.get(full_layer_name.removesuffix(".weight"))
        if known is None and set(tensors) != {"weight"}:  # on their way to a merge, experts say; they are dense
            return input_dict
        if known is None:
            return {full_layer_name: tensors["weight"].to(dtype)}
        weight = dense(read(tensors, known), known, dtype)
        turned = is_transposed(model.get_submodule(full_layer_name.rpartition(".")[0]))
        return {full_layer_name: weight.t().contiguous() if turned else weight}

    def _direct(self, input_dict: dict[str, Any], stored: Stored, dtype: torch.dtype, transposed: bool) -> Tensor:
        """3-D packed tensors to a 3-D parameter."""
        names = {name: name.rpartition("_proj_")[2] for name in input_dict}
        stacks = {f"weight_{names[name]}": v[0] if isinstance(v, list) else v for name, v in input_dict.items()}
        count = len(next(iter(stacks.values())))
        each = [dense(read({leaf: t[e] for leaf, t in stacks.items()}, stored), stored, dtype) for e in range(count)]
        weight = torch.stack(each)
        return weight.transpose(1, 2).contiguous() if transposed else weight

    def _experts(self, input_dict: dict[str, Any], stored: Stored, dtype: torch.dtype) -> dict[str, list[Tensor]]:
        """Lists of packed tensors, one for each pattern and expert, to lists of dense weights."""
        sources: dict[str, dict[str, list[Tensor]]] = {}
        for pattern, tensors in input_dict.items():
            prefix, _, leaf = pattern.rpartition(".")
            sources.setdefault(prefix, {})[leaf] = tensors
        made: dict[str, list[Tensor]] = {}
        for prefix, leaves in sources.items():
            count = len(next(iter(leaves.values())))
            each = ({leaf: tensors[e] for leaf, tensors in leaves.items()} for e in range(count))
            made[f"{prefix}.weight"] = [dense(read(tensors, stored), stored, dtype) for tensors in each]
        return made

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError("a dequantized model is saved dense")


def read(tensors: dict[str, Tensor], stored: Stored) -> Packed:
    """A layer's tensors as wq computes with them."""
    reader: Callable[[dict[str, Tensor], Stored], Packed] = formats.get(stored.format).to_packed
    return reader(tensors, stored)


def dense(packed: Packed, stored: Stored, dtype: torch.dtype) -> Tensor:
    """The weight `[out, in]`, its columns in the input's order."""
    layer = WqLinear(stored.shape[1], stored.shape[0], False, stored.scheme, packed.scale.dtype, stored.permuted)
    for name, tensor in zip(PARAMETERS, packed, strict=True):
        if tensor is not None:
            setattr(layer, name, nn.Parameter(tensor, requires_grad=False))
    return layer.dequantize(dtype)


def is_own(converter: Any) -> bool:
    """Whether a converter of transformers has an operation of wq's."""
    return any(isinstance(operation, _Operation) for operation in getattr(converter, "operations", ()))
