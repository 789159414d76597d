"""What a run notes to go on from, should it end before its end: each note a file that is there whole, or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from wq.checkpoint import raw_bytes, read_header, read_tensor, write_tensors
from wq.errors import OutputError, WqError
from wq.staging import sync


class Note(NamedTuple):
    """value: anything JSON holds. tensors: by name, on the CPU."""

    value: Any
    tensors: dict[str, Tensor]


class Journal:
    """Notes in a folder, by name."""

    def __init__(self, folder: Path):
        self._folder = folder

    def write(self, name: str, value: Any, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Note something, in the place of what had that name; when this returns, it outlives a power cut."""
        text, tensors = json.dumps(value), tensors or {}
        file = self._file(name)
        fresh = file.with_suffix(".new")
        write_tensors(fresh, tensors, {"value": text, "sha256": _digest(text, tensors)})
        sync(fresh)
        os.replace(fresh, file)
        sync(self._folder)

    def read(self, name: str) -> Note | None:
        """What was noted, or None. Raises OutputError if the note is damaged."""
        file = self._file(name)
        if not file.is_file():
            return None
        try:
            with safe_open(file, "pt") as stored:
                metadata = stored.metadata()
            tensors = {name: read_tensor(entry) for name, entry in read_header(file).items()}
            text = metadata["value"]
            whole = _digest(text, tensors) == metadata["sha256"]
        except (SafetensorError, WqError, KeyError, TypeError):
            whole = False
        if not whole:
            raise OutputError(f"{file} is damaged, so nothing can go on from it. Begin again with --restart.")
        return Note(json.loads(text), tensors)

    def has_room(self, needed: int) -> bool:
        """Whether the disk holds a note of so many bytes besides the one it takes the place of, and as much again."""
        return shutil.disk_usage(self._folder).free > 2 * needed

    def drop(self, pattern: str, but: str = "") -> None:
        """Remove the notes whose names match a glob, `but` one."""
        for file in self._folder.glob(f"{pattern}.safetensors"):
            if file.stem != but:
                file.unlink()

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Of everything in a note."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()
