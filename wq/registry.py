"""One way to find what a name stands for: built in, or offered by another package as an entry point."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from types import ModuleType

from wq.errors import UnknownNameError


def find(kind: str, name: str, built_in: dict[str, str], group: str) -> ModuleType:
    """The module called `name`; `built_in` maps names to modules, `group` is the entry points' group.

    Raises UnknownNameError, listing what there is.
    """
    if name in built_in:
        return import_module(built_in[name])
    offered = {point.name: point for point in entry_points(group=group)}
    if name in offered:
        return offered[name].load()
    raise UnknownNameError(f"{kind} {name!r} is unknown; wq has {', '.join(sorted({*built_in, *offered}))}.")
