"""Linear layers: which of a block are quantized, and their weights as matrices `[out, in]`."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import Tensor, nn

from wq.errors import GroupSizeError, SchemeError

AUTO_GROUPS = (128, 64, 32)

# Classes that multiply by their weight and add their bias, nothing else; other subclasses of nn.Linear may do more.
_LINEARS = ("Linear", "FalconLinear")
_SHORTEST = AUTO_GROUPS[-1]
_TRANSPOSED = "Conv1D"  # GPT-2's linear layer, which stores its weight as [in, out]
# Routers decide between experts by small differences and cost next to nothing; every published recipe keeps them.
_ROUTER = re.compile(r"(^|\.)(gate|router|shared_expert_gate|gating)(\.|$)")


def find_linears(block: nn.Module, path: str, keep: Iterable[re.Pattern[str]]) -> dict[str, nn.Module]:
    """The block's layers to quantize, by name within it: every linear layer but routers and what `keep` matches.

    Layers with fewer than 32 columns (the time steps of a Mamba, say) have nothing to save and no group that fits.
    """
    keep = tuple(keep)
    return {
        name: module
        for name, module in block.named_modules()
        if is_linear(module)
        and shape_of(module)[1] >= _SHORTEST
        and not _ROUTER.search(name)
        and not any(pattern.search(f"{path}.{name}") for pattern in keep)
    }


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a plain linear layer: an `nn.Linear`, or a `Conv1D`."""
    return is_transposed(module) or (isinstance(module, nn.Linear) and type(module).__name__ in _LINEARS)


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear layer stores its weight as `[in, out]`."""
    return type(module).__name__ == _TRANSPOSED and hasattr(module, "nf")


def matrix(module: nn.Module) -> Tensor:
    """The weight of a linear layer, `[out, in]`: a view, to read and to write."""
    weight: Tensor = module.weight.data  # type: ignore[assignment]
    return weight.t() if is_transposed(module) else weight


def shape_of(module: nn.Module) -> tuple[int, int]:
    """`(out, in)` of a linear layer."""
    out_features, in_features = matrix(module).shape
    return out_features, in_features


def patterns(keep: Iterable[str]) -> list[re.Pattern[str]]:
    """Compile what names layers to keep dense. Raises SchemeError."""
    try:
        return [re.compile(pattern) for pattern in keep]
    except re.error as error:
        raise SchemeError(f"keep {error.pattern!r} is not a regular expression ({error}).") from error


def auto_group_size(in_features: dict[str, int]) -> int:
    """The largest usual group size that divides every layer, given as `{name: in_features}`."""
    for size in AUTO_GROUPS:
        if all(count % size == 0 for count in in_features.values()):
            return size
    name, count = next((name, count) for name, count in in_features.items() if count % AUTO_GROUPS[-1])
    raise GroupSizeError(
        f"{name}: in_features {count} is not a multiple of {', '.join(map(str, AUTO_GROUPS))}. "
        f"Choose a group size yourself (-1 for one scale a row), or keep {name.rpartition('.')[2]} dense."
    )
