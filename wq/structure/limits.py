"""A folder of any origin, looked at before transformers builds what its config describes.

transformers makes as many modules as a config says, in Python, before it opens a file: a config of a hundred bytes can
keep it busy for hours. So what a config describes is compared with the tensors that are there to fill it.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import inf
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from wq.checkpoint import INDEX, SINGLE, Entry, read_headers, read_json
from wq.errors import CheckpointError, ModelError, first_line

_DEPTH = re.compile(r"^(?!max_window_).*(layers?|depth)$")  # keys that say how many modules to make
_MOST_ENTRIES = 100_000  # of one list or object of a config; one that names every expert there is has 45,000
_MODULES = (2000, 20)  # at most so many, and so many more for each tensor; transformers' own models have at most four


def check_folder(folder: Path) -> dict[str, Entry]:
    """The tensors of a folder; none, where it has no safetensors.

    Raises CheckpointError or ModelError for a folder that transformers should not be shown, or cannot be read at all.
    config.json must be a plain JSON object, headers must fit their files, the index must stay in the folder, and the
    config must not describe more layers than there are tensors.
    """
    try:
        return _checked(folder)
    except OSError as error:
        raise ModelError(f"{folder} cannot be read: {first_line(error)}.") from error


def _checked(folder: Path) -> dict[str, Entry]:
    if not (folder / "config.json").exists():
        raise ModelError(f"{folder} is no model: it has no config.json.")
    config = read_json(folder / "config.json")
    if not config:
        raise ModelError(f"{folder}/config.json is empty: it describes no model. Download it again.")
    for key, kind in (("model_type", str), ("quantization_config", dict)):
        value = config.get(key)
        if value is not None and not isinstance(value, kind):
            what = f"{key} is a {type(value).__name__}, not a {kind.__name__}"
            raise ModelError(f"{folder}/config.json: {what}. Download it again.")
    if (folder / SINGLE).exists() or (folder / INDEX).exists():
        entries = read_headers(folder)
        check_depth(config, len(entries))
        return entries
    check_depth(config)
    return {}


def check_depth(config: Mapping[str, Any], tensors: float = inf) -> None:
    """Raise CheckpointError if a config, or a part of one, says that there are more layers than tensors, or has a list
    that is longer than any model has modules. tensors: how many there are, if that is known."""
    parts: list[Any] = [config]
    while parts:
        part = parts.pop()
        if len(part) > _MOST_ENTRIES:
            raise CheckpointError(
                f"config.json has a list of {len(part)} entries, longer than any model has modules "
                f"({_MOST_ENTRIES}). Name modules by patterns, or download it again."
            )
        for key, value in part.items() if isinstance(part, Mapping) else ():
            if type(value) is int and value > tensors and _DEPTH.search(key):
                told = f"{str(value)[:30]}, {tensors} tensors"
                raise CheckpointError(
                    f"config.json: {key[:200]} is more than the files have tensors ({told}). Download it again."
                )
        values = part.values() if isinstance(part, Mapping) else part
        parts += [value for value in values if isinstance(value, (dict, list))]


@contextmanager
def few_modules(tensors: int) -> Iterator[None]:
    """Within it, this thread makes no more modules than so many tensors can fill. Raises CheckpointError."""
    most, each = _MODULES
    left, thread = most + each * tensors, threading.get_ident()

    def count(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
        nonlocal left
        left -= threading.get_ident() == thread
        if left < 0:
            raise CheckpointError(
                f"config.json describes more than {most + each * tensors} modules, and the files have {tensors} "
                "tensors. Download config.json again."
            )

    handle = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()
