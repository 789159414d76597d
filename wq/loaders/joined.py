"""What vLLM and SGLang join into one layer, and what a config has to call such a layer for them to find it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from wq.scheme import Scheme, Targets

# What is joined, by its name there: all parts are quantized alike, or none is.
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}
EXPERT = re.compile(r"^(?P<experts>.*\.experts)\.\d+\.[^.]+$")
_JOINED = {part: name for name, parts in FUSED.items() for part in parts}
_NUMBERED = re.compile(r"[^.]+\.\d+\.")


def joined(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Layers as they are joined: `{name: parts}`; one that is not joined is its own only part. Without experts."""
    present = {name for name in names if not EXPERT.match(name)}
    found: dict[str, tuple[str, ...]] = {}
    for name in sorted(present):
        parent, dot, leaf = name.rpartition(".")
        whole = _JOINED.get(leaf)
        parts = tuple(parent + dot + part for part in FUSED[whole]) if whole else (name,)
        parts = tuple(part for part in parts if part in present)
        found[f"{parent}{dot}{whole}" if len(parts) > 1 else name] = parts
    return found


def targets(schemes: Mapping[str, Scheme], paths: Mapping[str, str] | None = None) -> list[Targets]:
    """Who has which scheme, for a config of several: one entry for each joined layer and each module of experts.

    schemes: of each packed matrix, by its name on disk. paths: of those whose name in the model differs, that name.
    Parts of one joined layer that differ are in entries of their own, without its name.
    """
    found = []
    for whole, parts in joined(schemes).items():
        alike = len(parts) > 1 and len({schemes[part] for part in parts}) == 1
        for together in (parts,) if alike else ((part,) for part in parts):
            names = [name for part in together for name in (part, (paths or {}).get(part, part))]
            found.append(Targets(schemes[together[0]], tuple(dict.fromkeys(names)), whole if alike else ""))
    return [*found, *_experts(schemes)]


def _experts(schemes: Mapping[str, Scheme]) -> Iterator[Targets]:
    """By a pattern from the list of blocks on: what is in front of it loaders call by other names."""
    modules: dict[str, Scheme] = {}
    for name, scheme in schemes.items():
        if match := EXPERT.match(name):
            modules.setdefault(match["experts"], scheme)
    tails = {module: module[found.start() :] if (found := _NUMBERED.search(module)) else module for module in modules}
    count = Counter(tails.values())
    for module, scheme in modules.items():
        tail = tails[module]
        pattern = f".*{re.escape(tail)}" if count[tail] == 1 else f"^{re.escape(module)}"
        yield Targets(scheme, (), experts=pattern)
