"""config.json, the index and its shards, the manifest, and what else is in the folder."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wq import manifest
from wq.checkpoint import INDEX, MAX_JSON_BYTES, SINGLE, Entry, is_plain, read_header, unique
from wq.errors import WqError, first_line
from wq.formats.patterns import exact, refuse_pattern
from wq.structure.limits import check_depth
from wq.verify.found import Found

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_MOST_PATTERNS = 1000
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def read_config(folder: Path, found: Found) -> dict[str, Any]:
    """config.json, or as much of it as there is."""
    config = _json(folder / "config.json", found)
    try:
        check_depth(config)
    except WqError as error:
        found.problem("config.json", str(error))
        return {}
    said = config.get("quantization_config")
    if isinstance(said, dict):
        _method(said, found)
    elif config:
        found.problem(
            "config.json",
            "has no quantization_config, so loaders take the weights for dense ones",
            type(said).__name__,
            "Make the checkpoint again; `wq quantize` writes it.",
        )
    return config


def _json(file: Path, found: Found) -> dict[str, Any]:
    """The object in a file; empty, and why, where there is none."""
    if not file.is_file():
        found.problem(file.name, "is missing")
    elif file.stat().st_size > MAX_JSON_BYTES:
        found.problem(file.name, "is larger than any such file", f"{file.stat().st_size} bytes")
    else:
        try:
            value = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=unique)
        except (ValueError, RecursionError) as error:
            found.problem(file.name, "is not JSON that every reader understands alike", first_line(error))
            return {}
        if isinstance(value, dict) and value:
            return value
        found.problem(file.name, "is no JSON object with something in it", type(value).__name__)
    return {}


def _method(said: dict[str, Any], found: Found) -> None:
    from wq.hf.config import READ, readable

    method, layout = said.get("quant_method"), said.get("format") or said.get("packing_format")
    if method not in READ:
        found.problem("config.json", "has a quant_method that no reader of wq's knows", repr(method), "Convert it.")
    elif not readable(said):
        found.problem("config.json", f"is {method} in a layout that wq does not read", repr(layout), "Convert it.")


def harmless(said: dict[str, Any], found: Found) -> dict[str, Any]:
    """The config without what is no list of names, and without regular expressions that could run for ever; each is a
    problem."""
    said = dict(said)
    for key in ("ignore", "modules_to_not_convert"):
        if said.get(key) is not None:
            said[key] = _kept(said[key], f"config.json, {key}", found)
    groups = said.get("config_groups")
    if isinstance(groups, dict):
        said["config_groups"] = {
            name: group | {"targets": _kept(group.get("targets"), f"config.json, {name}", found)}
            for name, group in groups.items()
            if isinstance(group, dict)
        }
    dynamic = said.get("dynamic")
    if isinstance(dynamic, dict):
        rules = {rule: f"re:{re.sub(r'^[-+]:', '', rule)}" for rule in dynamic}
        good = set(_kept(list(rules.values()), "config.json, dynamic", found))
        said["dynamic"] = {rule: dynamic[rule] for rule, pattern in rules.items() if pattern in good}
    return said


def _kept(entries: Any, where: str, found: Found) -> list[str]:
    """The entries of a list that can be used. Many patterns, each of them quick, take long together."""
    if not isinstance(entries, list):
        found.problem(where, "is no list of names", str(entries)[:200])
        return []
    good: list[str] = []
    patterns = 0
    for entry in entries:
        refusal = "" if isinstance(entry, str) else "is no text"
        if isinstance(entry, str) and entry.startswith("re:"):
            patterns += exact(entry.removeprefix("re:")) is None
            if patterns > _MOST_PATTERNS:
                found.problem(where, "has more patterns than wq tries", f"over {_MOST_PATTERNS}", "Name the layers.")
                break
            refusal = refuse_pattern(entry.removeprefix("re:"))
        if refusal:
            found.problem(where, refusal, str(entry)[:200], "Name the layers instead.")
        else:
            good.append(entry)
    return good


def read_tensors(folder: Path, found: Found) -> dict[str, Entry]:
    """Every tensor of every shard that can be read."""
    weight_map: dict[str, str] | None = None
    if (folder / SINGLE).is_file():
        shards = [SINGLE]
        if (folder / INDEX).is_file():
            found.warn(INDEX, f"is not looked at by loaders that find {SINGLE}", hint="Delete it.")
    elif (folder / INDEX).is_file():
        index = _json(folder / INDEX, found)
        weight_map = _weight_map(index, found)
        shards = sorted(set(weight_map.values()))
    else:
        found.problem(str(folder), f"has neither {SINGLE} nor {INDEX}")
        shards = []
    for file in sorted(folder.glob("*.safetensors")):
        if file.name not in shards:
            found.problem(file.name, "belongs to no index; some loaders read it all the same", hint="Delete it.")
    entries: dict[str, Entry] = {}
    for shard in shards:
        for name, entry in _shard(folder / shard, found).items():
            if name in entries:
                found.problem(name, "is in two shards", f"{entries[name].file.name} and {shard}")
            elif weight_map is not None and weight_map.get(name) != shard:
                said = weight_map.get(name)
                what = f"is not in {INDEX}" if said is None else f"is in another shard than {INDEX} says"
                found.problem(name, what, shard if said is None else f"in {shard}, not in {said}")
            entries.setdefault(name, entry)
    if weight_map:
        _indexed(folder, index, weight_map, entries, found)
    return entries


def _weight_map(index: dict[str, Any], found: Found) -> dict[str, str]:
    """What the index says, as far as it stays in the folder."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        if index:
            found.problem(INDEX, "has no weight_map")
        return {}
    good: dict[str, str] = {}
    for name, shard in weight_map.items():
        if not is_plain(shard):
            told = repr(shard)[:200]
            found.problem(name, f"{INDEX} looks for it outside of the folder", told, "Do not load this folder.")
        else:
            good[name] = shard
    return good


def _indexed(
    folder: Path, index: dict[str, Any], weight_map: dict[str, str], entries: Mapping[str, Entry], found: Found
) -> None:
    """The index against what the shards hold."""
    for name, shard in weight_map.items():
        if name not in entries and (folder / shard).is_file():
            found.problem(name, f"is not in the shard where {INDEX} has it", shard)
    metadata = index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    actual = sum(entry.bytes for entry in entries.values())
    if total is not None and total != actual:
        found.problem(INDEX, "gives another total_size than the shards have", f"{total}, they have {actual} bytes")


def _shard(file: Path, found: Found) -> dict[str, Entry]:
    if not file.is_file():
        found.problem(file.name, "is missing")
        return {}
    try:
        entries = read_header(file)
    except WqError as error:
        found.problem(file.name, str(error).removeprefix(f"{file}: "))
        return {}
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
    claimed = 8 + length + sum(entry.bytes for entry in entries.values())
    if claimed != size:
        found.problem(file.name, "has bytes that belong to no tensor", f"{size} bytes, {claimed} accounted for")
    return entries


def check_manifest(folder: Path, found: Found) -> int:
    """How many files have the digest that the manifest gives."""
    try:
        files = manifest.read(folder)
    except WqError as error:
        found.problem(manifest.MANIFEST, str(error))
        return 0
    if files is None:
        found.warn(manifest.MANIFEST, "is missing, so altered weights would not be noticed")
        return 0
    good = 0
    for name, entry in files.items():
        file = folder / name
        if not file.is_file():
            found.problem(name, f"is in {manifest.MANIFEST} and not in the folder")
        elif file.stat().st_size != entry["bytes"]:
            found.problem(name, "has another size than when it was written", _differs(file, entry))
        elif (digest := manifest.sha256(file)) != entry["sha256"]:
            told = f"sha256 {digest[:16]}…, not {entry['sha256'][:16]}…"
            found.problem(name, "is not what was written", told)
        else:
            good += 1
    for name in manifest.names(folder):
        if name not in files:
            found.warn(name, f"was added later: it is not in {manifest.MANIFEST}")
    return good


def _differs(file: Path, entry: Mapping[str, Any]) -> str:
    return f"{file.stat().st_size} bytes, not {entry['bytes']}"


def check_companions(folder: Path, found: Found) -> None:
    """What else a folder should hold, and should not."""
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        found.warn("tokenizer", "there is none", f"looked for {', '.join(_TOKENIZERS)}", "Copy the base model's.")
    inside = (folder.resolve(), folder.resolve().parent.parent / "blobs")  # the Hub's cache keeps its files there
    for file in sorted(folder.iterdir()):
        if file.suffix in _PICKLES:
            found.warn(file.name, "may be a pickle, which runs code when it is loaded", hint="Delete it.")
        if file.is_symlink() and not any(_leads_to(file).is_relative_to(place) for place in inside):
            decides = file.name == "config.json" or file.suffix == ".safetensors"
            what = "is a link that leads out of the folder"
            (found.problem if decides else found.warn)(file.name, what, str(file.readlink()), "Copy what it leads to.")


def _leads_to(link: Path) -> Path:
    try:
        return link.resolve()
    except (OSError, RuntimeError):  # to itself: inside, and no file
        return link.parent.resolve() / link.name
