"""`wq_manifest.json`: the size and sha256 of every file that decides what a checkpoint computes, and what made them.

Covered are weights, config and tokenizer. The card and the report are not: `wq eval` rewrites both. A flipped bit in
the codes of a layer is another valid code, so nothing but this file finds it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wq.checkpoint import is_plain, read_json, write_text
from wq.errors import CheckpointError

MANIFEST = "wq_manifest.json"
VERSION = 1

_REWRITTEN = (MANIFEST, "wq_report.json", "README.md")  # itself, and what evaluating changes
_PIECE = 1 << 22  # bytes read at once


def write(folder: Path, made_by: Mapping[str, Any] | None = None) -> None:
    """Write the manifest of the files that are in `folder` now; they must be complete. made_by: what else to note."""
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in names(folder)}
    write_text(folder / MANIFEST, json.dumps({"version": VERSION, **(made_by or {}), "files": files}, indent=1) + "\n")


def read(folder: Path) -> dict[str, dict[str, Any]] | None:
    """`{file name: {"bytes": int, "sha256": hex}}`, or None where there is no manifest. Raises CheckpointError."""
    file = folder / MANIFEST
    if not file.is_file():
        return None
    values = read_json(file)
    files = values.get("files") if values.get("version") == VERSION else None
    if not isinstance(files, dict) or not all(_is_entry(name, entry) for name, entry in files.items()):
        raise CheckpointError(
            f"{file} is no manifest of version {VERSION}: it must give plain file names a size and a sha256."
        )
    return files


def names(folder: Path) -> list[str]:
    """The files of a folder that a manifest covers, sorted."""
    return sorted(
        file.name
        for file in folder.iterdir()
        if file.is_file() and not file.name.startswith(".") and file.name not in _REWRITTEN
    )


def sha256(file: Path) -> str:
    """The digest of a file in hex, read piece by piece."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def _is_entry(name: str, entry: Any) -> bool:
    known = isinstance(entry, dict) and type(entry.get("bytes")) is int and isinstance(entry.get("sha256"), str)
    return known and is_plain(name)
