"""What a `quantization_config` says of a layer, as loaders read it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from wq.formats import patterns


def matches(name: str, entry: str) -> bool:
    """Whether an entry of compressed-tensors' `ignore` means a module: its name, or `re:` and a regular expression."""
    return patterns.matches(entry.removeprefix("re:"), name) if entry.startswith("re:") else name == entry


def excluded(said: Mapping[str, Any], name: str) -> bool:
    """Whether a `quantization_config` says that the module `name`, on disk or in a loader, stays dense."""
    method = said.get("quant_method")
    if method == "compressed-tensors":
        return _among(name, tuple(texts(said.get("ignore")))) or not _targeted(said, name)
    if method == "awq":
        return any(entry in name for entry in texts(said.get("modules_to_not_convert"))) or _is_head(said, name)
    dynamic = said.get("dynamic")
    rules = [rule for rule in dynamic if rule.startswith("-:")] if isinstance(dynamic, Mapping) else []
    return _among(name, tuple(f"re:{rule.removeprefix('-:')}" for rule in rules)) or _is_head(said, name)


def _among(name: str, entries: tuple[str, ...]) -> bool:
    """Whether one of the entries means a module: of thousands of names, one is found at once."""
    names, others = _sorted(entries)
    return name in names or any(patterns.matches(pattern, name) for pattern in others)


@lru_cache(maxsize=16)
def _sorted(entries: tuple[str, ...]) -> tuple[frozenset[str], tuple[str, ...]]:
    """The names among entries of `ignore`, and the patterns."""
    given = [entry.removeprefix("re:") for entry in entries if entry.startswith("re:")]
    known = {pattern: patterns.exact(pattern) for pattern in given}
    plain = {entry for entry in entries if not entry.startswith("re:")}
    names = plain | {name for name in known.values() if name is not None}
    return frozenset(names), tuple(pattern for pattern in given if known[pattern] is None)


def names_head(said: Mapping[str, Any], name: str) -> bool:
    """Whether a config says that the head is packed: to vLLM and SGLang it is no `Linear`, and must be named."""
    if said.get("quant_method") != "compressed-tensors":
        return said.get("lm_head") is True
    return _among(name, tuple(_targets(said)))


def width(said: Mapping[str, Any], name: str, parts: tuple[str, ...], class_first: bool) -> int | None:
    """The bits that a loader takes a layer to have, whose parts it joins under `name`; None if the config has no word.

    class_first: whether the loader prefers a group of compressed-tensors that means all linear layers to one that names
    the parts.
    """
    method = said.get("quant_method")
    if method == "gptq":
        rule = _rule(said, name)
        bits = said.get("bits") if rule is None else rule.get("bits", said.get("bits"))
    elif method == "compressed-tensors":
        bits = _group_width(said, name, parts, class_first)
    else:
        bits = None
    return bits if type(bits) is int else None


def _rule(said: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """The first of gptq's `dynamic` rules that matches a module, if it does not leave it out."""
    dynamic = said.get("dynamic")
    for rule, values in dynamic.items() if isinstance(dynamic, Mapping) else ():
        if patterns.matches(rule.removeprefix("-:").removeprefix("+:"), name):
            return values if isinstance(values, Mapping) and not rule.startswith("-:") else None
    return None


def _group_width(said: Mapping[str, Any], name: str, parts: tuple[str, ...], class_first: bool) -> Any:
    widths: dict[str, Any] = {}
    for group in groups(said).values():
        weights = group.get("weights")
        if isinstance(weights, Mapping):
            widths |= dict.fromkeys(texts(group.get("targets")), weights.get("num_bits"))
    by_part = [next((target for target in widths if matches(part, target)), None) for part in parts]
    places = [by_part[0] if all(by_part) else None, "Linear" if "Linear" in widths else None]
    by_name = next((target for target in widths if matches(name, target)), None)
    found = next((place for place in (by_name, *(places[::-1] if class_first else places)) if place), None)
    return None if found is None else widths[found]


def groups(said: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The groups of compressed-tensors' config that can be read."""
    found = said.get("config_groups")
    return {name: g for name, g in found.items() if isinstance(g, Mapping)} if isinstance(found, Mapping) else {}


def texts(values: Any) -> list[str]:
    """The texts in what should be a list of them."""
    return [value for value in values if isinstance(value, str)] if isinstance(values, (list, tuple)) else []


def _targets(said: Mapping[str, Any]) -> list[str]:
    return [target for group in groups(said).values() for target in texts(group.get("targets"))]


def _targeted(said: Mapping[str, Any], name: str) -> bool:
    """Whether a group of compressed-tensors' config means this linear layer, by class or by name."""
    targets = _targets(said)
    return "Linear" in targets or _among(name, tuple(targets))


def _is_head(said: Mapping[str, Any], name: str) -> bool:
    return name.rpartition(".")[2] == "lm_head" and said.get("lm_head") is not True
