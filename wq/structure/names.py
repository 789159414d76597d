"""Names on disk and names in a model differ for some architectures, and transformers knows how."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils.loading_report import LoadStateDictInfo

from wq.checkpoint import Entry
from wq.errors import CheckpointError

_MORE, _PIECES = 1000, 10  # names on disk for a parameter, at most; of experts, for each of them


def map_names(model: PreTrainedModel, names: Iterable[str]) -> tuple[dict[str, tuple[str, bool]], list[str], list[str]]:
    """How tensors on disk become parameters: `(mapped, absent, unexpected)`.

    mapped: for each name on disk, the parameter it goes to and whether it is that parameter, only renamed (not merged
    or split on the way). absent: parameters and persistent buffers that nothing on disk goes to, shared ones aside.
    unexpected: names on disk that go nowhere and that the architecture does not ignore.

    Raises CheckpointError for many more names than can go anywhere: each is compared with all renamings.
    """
    names = list(names)
    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    known = model.state_dict()
    most = _MORE + sum(_PIECES * (t.shape[0] if "experts" in name and t.ndim > 1 else 1) for name, t in known.items())
    if len(names) > most:
        raise CheckpointError(
            f"the files have tensors of {len(names)} names; {type(model).__name__}, as config.json describes it, takes "
            f"{most} at most. Download the checkpoint again."
        )
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


def misfits(
    model: PreTrainedModel, mapped: Mapping[str, tuple[str, bool]], entries: Mapping[str, Entry]
) -> dict[str, str]:
    """What is wrong with tensors that are parameters or buffers, only renamed: `{name on disk: sentence}`.

    A wrong shape, and whole numbers where there should be fractions: transformers would cast those.
    """
    known = model.state_dict()
    found = {}
    for name, (target, plain) in mapped.items():
        if not plain or target not in known or name not in entries:
            continue
        entry, tensor = entries[name], known[target]
        if entry.shape != tuple(tensor.shape):
            found[name] = f"is {list(entry.shape)}; config.json makes it {list(tensor.shape)}"
        elif tensor.is_floating_point() and not entry.dtype.is_floating_point:
            found[name] = f"is {entry.dtype}; the model has {tensor.dtype} there"
    return found


def check_plain(model: PreTrainedModel, mapped: Mapping[str, tuple[str, bool]], entries: Mapping[str, Entry]) -> None:
    """Raise CheckpointError for the first of `misfits`."""
    for name, what in misfits(model, mapped, entries).items():
        raise CheckpointError(f"{name} {what}. The files do not fit the config; download both again.")
