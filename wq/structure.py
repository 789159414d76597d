"""What in a transformers model is quantized, and what it is called on disk. No table of models.

One of the few files that import transformers: names on disk and names in a model differ for some architectures, and
transformers knows how.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TypeGuard

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils.loading_report import LoadStateDictInfo

from wq.errors import GroupSizeError, ModelError, SchemeError

AUTO_GROUPS = (128, 64, 32)

# Classes that multiply by their weight and add their bias, nothing else; other subclasses of nn.Linear may do more.
_LINEARS = ("Linear", "FalconLinear")
# Routers decide between experts by small differences and cost next to nothing; every published recipe keeps them.
_ROUTER = re.compile(r"(^|\.)(gate|router|shared_expert_gate|gating)(\.|$)")


def find_blocks(model: nn.Module, name: str) -> tuple[str, nn.ModuleList]:
    """The path and list of the decoder's blocks. Raises ModelError when no list of modules holds linear layers."""
    best: tuple[int, str, nn.ModuleList | None] = (0, "", None)
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not (best[2] is not None and path.startswith(best[1] + ".")):
            weights = sum(m.weight.numel() for m in module.modules() if is_linear(m))
            if weights > best[0]:
                best = weights, path, module
    if best[2] is None:
        raise ModelError(
            f"{name} ({type(model).__name__}) has no linear layers in a list of blocks, so there is nothing wq can "
            "quantize. wq handles decoder-only models whose blocks hold nn.Linear."
        )
    return best[1], best[2]


def find_linears(block: nn.Module, path: str, keep: Iterable[re.Pattern[str]]) -> dict[str, nn.Linear]:
    """The block's layers to quantize, by name within it: every nn.Linear but routers and what `keep` matches."""
    keep = tuple(keep)
    return {
        name: module
        for name, module in block.named_modules()
        if is_linear(module)
        and not _ROUTER.search(name)
        and not any(pattern.search(f"{path}.{name}") for pattern in keep)
    }


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module is a plain linear layer."""
    return isinstance(module, nn.Linear) and type(module).__name__ in _LINEARS


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


def map_names(model: PreTrainedModel, names: Iterable[str]) -> tuple[dict[str, tuple[str, bool]], list[str], list[str]]:
    """How tensors on disk become parameters: `(mapped, absent, unexpected)`.

    mapped: for each name on disk, the parameter it goes to and whether it is that parameter, only renamed (not merged
    or split on the way). absent: parameters and persistent buffers that nothing on disk goes to, shared ones aside.
    unexpected: names on disk that go nowhere and that the architecture does not ignore.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    known = model.state_dict()
    mapped: dict[str, tuple[str, bool]] = {}
    for name in names:
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if renamed not in known and name in known:
            renamed, pattern = name, None
        mapped[name] = (renamed, pattern is None)
    targets = {renamed for renamed, _ in mapped.values()}
    made = [target.replace("*.", "").strip("^$") for converter in converters for target in converter.target_patterns]
    info = LoadStateDictInfo(
        missing_keys={n for n in set(known) - targets if not any(target in n for target in made)},
        unexpected_keys={n for n, (renamed, plain) in mapped.items() if plain and renamed not in known},
        mismatched_keys=set(),
        error_msgs=[],
        conversion_errors={},
        skipped_pp_keys=set(),
    )
    model._adjust_missing_and_unexpected_keys(info)  # what the architecture itself says may be absent or extra
    return mapped, sorted(info.missing_keys - set(model.all_tied_weights_keys)), sorted(info.unexpected_keys)
