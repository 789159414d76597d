"""Move a scale of a layer's input into what produced the input, so that it costs nothing at run time.

Two kinds of producers. A norm is found by watching whose output the layer reads. A linear reaches its reader through
something that keeps channels apart (attention mixing, a gated product), which cannot be seen; those pairs are data,
below. Either way the fold is only kept if the block still computes the same: names are a guess, the check decides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wq.structure.linears import matrix, shape_of

# (producer, reader): scaling a row of the producer scales the same channel of the reader's input.
LINEAR_FOLDS: tuple[tuple[str, str], ...] = (
    ("self_attn.v_proj", "self_attn.o_proj"),  # attention mixes tokens, not channels
    ("mlp.up_proj", "mlp.down_proj"),  # the gated product is linear in up
    ("self_attn.v_proj", "self_attn.out_proj"),  # OPT
    ("fc1", "fc2"),  # OPT: relu(t x) = t relu(x)
)

# Norms whose weight is stored as an offset from one: y = x̂ · (offset + w).
NORM_OFFSETS: dict[str, float] = {
    "GemmaRMSNorm": 1.0,
    "Gemma2RMSNorm": 1.0,
    "Gemma3RMSNorm": 1.0,
    "Qwen3NextRMSNorm": 1.0,
}

_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Fold:
    """A producer, by name within the block, that can take over the input scale of some readers."""

    name: str
    producer: nn.Module

    def divide(self, scales: Tensor) -> None:
        """Make every output channel of the producer `scales` times smaller, in place."""
        parameters = dict(self.producer.named_parameters(recurse=False))
        weight, bias = parameters["weight"], parameters.get("bias")
        offset = NORM_OFFSETS.get(type(self.producer).__name__, 0.0)
        column = scales.unsqueeze(1) if weight.dim() == 2 else scales
        weight.data.copy_(((weight.data.float() + offset) / column - offset).to(weight.dtype))
        if bias is not None:
            bias.data.copy_((bias.data.float() / scales).to(bias.dtype))


def find(block: nn.Module, readers: list[str], source: tuple[str, nn.Module] | None) -> Fold | None:
    """What the input scale of `readers` (names within the block) can be folded into, if anything."""
    in_features = shape_of(block.get_submodule(readers[0]))[1]
    if source is not None:
        weight = getattr(source[1], "weight", None)
        is_norm = "norm" in type(source[1]).__name__.lower() and isinstance(weight, Tensor)
        if is_norm:
            return Fold(*source) if tuple(weight.shape) == (in_features,) else None  # type: ignore[union-attr]
    for producer, reader in LINEAR_FOLDS:
        if len(readers) == 1 and readers[0].endswith(reader):
            name = readers[0].removesuffix(reader) + producer
            try:
                module = block.get_submodule(name)
            except AttributeError:
                continue
            if type(module) is nn.Linear and module.out_features == in_features:
                return Fold(name, module)
    return None


@torch.no_grad()
def apply(
    fold: Fold,
    readers: list[nn.Module],
    scales: Tensor,
    run: Callable[[], Tensor],
    agreed: Callable[[bool], bool] = bool,
) -> bool:
    """Fold `scales` `[in_features]`; undo it and return False if the block's output changes by more than rounding.

    agreed: whether that is so for all processes.
    """
    before = run()
    touched = [fold.producer, *readers]
    saved = [{name: p.data.clone() for name, p in m.named_parameters(recurse=False)} for m in touched]
    fold.divide(scales)
    for reader in readers:
        weight = matrix(reader)
        weight.copy_((weight.float() * scales).to(weight.dtype))
    after = run()
    change = (after.float() - before.float()).norm() / before.float().norm().clamp_min(1e-12)
    if agreed(bool(change < _TOLERANCE)):  # also False for NaN
        return True
    for module, values in zip(touched, saved, strict=True):
        for name, value in values.items():
            getattr(module, name).data.copy_(value)
    return False
