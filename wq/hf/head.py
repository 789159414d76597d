"""The layer that makes logits, rounded as a model loads.

Checkpoints keep it dense, for most runtimes read no other; and where a vocabulary is large, dense, it is the larger
part of what decoding one token reads. What a repo holds stays as it is.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from wq.checkpoint import finite
from wq.errors import ModelError
from wq.formats import compressed_tensors
from wq.hf import parallel
from wq.hf.conversion import packed_like
from wq.layers import WqLinear
from wq.machine import Mapped
from wq.scheme import Scheme
from wq.solvers import rtn
from wq.structure.linears import auto_group_size

_ROWS = 1024  # rounded at once, so that memory stays near the packed size


class Head:
    """The head of a model that was rounded as it loaded.

    path: where it is. tied: whether its weight was the input embedding's, which the model keeps.
    """

    def __init__(self, path: str, tied: bool):
        self.path, self.tied = path, tied

    @classmethod
    def round(cls, model: PreTrainedModel, bits: int, mapped: Mapped) -> Head | None:
        """Put a `WqLinear` in the place of a model's dense head; None where it is packed already.

        mapped: the files that its weight may lie in, whose pages are given back. Raises ModelError for a model without
        a head, or with one that is not whole in memory, CheckpointError for weights that are not finite.
        """
        dense: Any = model.get_output_embeddings()
        if isinstance(dense, WqLinear):
            return None
        if not isinstance(dense, nn.Linear):
            raise ModelError(f"{type(model).__name__} has no linear layer that makes logits; leave head_bits out.")
        path = next(name for name, module in model.named_modules() if module is dense)
        weight = dense.weight.detach()
        if weight.is_meta or parallel.processes(model) > 1:
            where = "offloaded" if weight.is_meta else "split over processes"
            raise ModelError(f"{path} is {where}: head_bits takes a head that is whole in memory. Leave it out.")
        inner: Any = model.get_input_embeddings()
        head = cls(path, getattr(inner, "weight", None) is dense.weight)
        dtype = str(model.dtype).removeprefix("torch.")
        scheme = Scheme(bits, auto_group_size({path: weight.shape[1]}), True, dtype)
        layer = packed_like(dense, scheme, model.dtype)
        for leaf, tensor in _packed(f"{path}.weight", weight, scheme, mapped).items():
            setattr(layer, leaf, nn.Parameter(tensor, requires_grad=False))
        model.set_submodule(path, layer)
        head.untie(model)
        layer.prepare(model.dtype)
        return head

    def untie(self, model: PreTrainedModel) -> None:
        """Have transformers, which ties again on many an occasion, leave the head alone."""
        name = f"{self.path}.weight"
        for known in ("_tied_weights_keys", "all_tied_weights_keys"):
            keys = getattr(model, known, None)
            if isinstance(keys, dict):
                setattr(model, known, {key: source for key, source in keys.items() if key != name})

    def restore(self, model: PreTrainedModel) -> None:
        """Give a model that has been dequantized the weight that its head was made of, where there still is one."""
        if self.tied:
            inner: Any = model.get_input_embeddings()
            model.get_submodule(self.path).weight = inner.weight
            if isinstance(getattr(model, "_tied_weights_keys", None), dict):
                del model._tied_weights_keys  # the instance's: the class has what it was
            model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)

    def check_saved(self) -> None:
        """Raise ModelError if nothing else in the model has the head's weight, so that it cannot be saved."""
        if not self.tied:
            raise ModelError(
                f"{self.path} was rounded as the model loaded, and its weight is not there any more. "
                "To save the model, load it without head_bits."
            )

    def take_from(self, state: dict[str, Tensor]) -> None:
        """Leave the rounded head out of what is saved: its weight is the embedding's."""
        for name in [name for name in state if name.rpartition(".")[0] == self.path and not name.endswith(".bias")]:
            del state[name]


def _packed(name: str, weight: Tensor, scheme: Scheme, mapped: Mapped) -> dict[str, Tensor]:
    """The tensors of a `WqLinear`, filled piece by piece."""
    made: dict[str, Tensor] = {}
    for start in range(0, len(weight), _ROWS):
        rows = finite(name, weight[start : start + _ROWS])
        piece = compressed_tensors.pack(rtn.solve(rows, None, scheme), scheme)
        for leaf in ("weight_packed", "weight_scale"):
            if not start:
                made[leaf] = piece[leaf].new_empty(len(weight), piece[leaf].shape[1])
            made[leaf][start : start + len(rows)] = piece[leaf]
        mapped.forget(rows)
    return made
