"""How far a run is: all that the rest of it depends on, and whether another run may go on from there.

One note says what is done, and so which notes of hidden states, one for each process, go with it; those of the block
before are removed after it. What a block has written to the checkpoint is flushed before; what the next one writes
before its own note is written again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from wq import manifest
from wq.errors import OutputError
from wq.journal import Journal
from wq.pipeline.ranks import Ranks

_NOTE = "progress"
_DIGEST = re.compile(r"[0-9a-f]{64}")

Streams = dict[str, list[Tensor]]


@dataclass
class Progress:
    """blocks: how many are done. layers: their records. written: tensors of the checkpoint that are in their places.
    seconds: spent so far. left_out: calibration windows that are, for what is not finite there. streams: what goes into
    the next block, by name, a tensor for each batch.
    """

    blocks: int = 0
    layers: list[dict[str, Any]] = field(default_factory=list)
    written: list[str] = field(default_factory=list)
    seconds: float = 0.0
    left_out: list[int] = field(default_factory=list)
    streams: Streams = field(default_factory=dict)

    def save(self, journal: Journal, job: Mapping[str, Any], ranks: Ranks) -> None:
        """Note it."""
        tensors = {f"{name}.{i}": t.cpu() for name, stream in self.streams.items() for i, t in enumerate(stream)}
        counts = {name: len(stream) for name, stream in self.streams.items()}
        mine = f"streams-{ranks.rank}-{self.blocks}"
        journal.write(mine, counts, tensors)
        ranks.wait()
        if ranks.is_first:
            journal.write(
                _NOTE, {name: value for name, value in vars(self).items() if name != "streams"} | {"job": job}
            )
        ranks.wait()
        journal.drop(f"streams-{ranks.rank}-*", but=mine)

    @classmethod
    def load(cls, journal: Journal, job: Mapping[str, Any], where: Path, ranks: Ranks) -> Progress | None:
        """What was noted of the same job, or None. Raises OutputError, naming what differs, if it was another."""
        note = journal.read(_NOTE)
        if note is None:
            return None
        value = dict(note.value)
        check_same(value.pop("job"), job, where)
        held = journal.read(f"streams-{ranks.rank}-{value['blocks']}")
        if held is None:
            raise OutputError(f"{where}: the notes to go on from are not complete. Begin again with --restart.")
        streams = {name: [held.tensors[f"{name}.{i}"] for i in range(count)] for name, count in held.value.items()}
        return cls(**value, streams=streams)


def check_same(before: Mapping[str, Any], now: Mapping[str, Any], where: Path) -> None:
    """Raise OutputError, naming what differs, unless two jobs are the same."""
    was, wanted = dict(_flat(before)), dict(_flat(now))
    differing = [name for name in {**was, **wanted} if was.get(name) != wanted.get(name)]
    if differing:
        told = "; ".join(f"{name} was {_short(was.get(name))}, now {_short(wanted.get(name))}" for name in differing)
        raise OutputError(
            f"{where}: a run to this folder is not finished, and this is another one: {told}. "
            "Repeat that command to go on, or begin again with --restart."
        )


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _flat(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", inner


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}…" if _DIGEST.fullmatch(text) else text


def digests(folder: Path) -> dict[str, str]:
    """The sha256 of every file of a model that decides what comes out: weights, config, tokenizer.

    The Hub's cache names a large file by its digest, so that one is not read for it.
    """
    found = {}
    for file in sorted([*folder.glob("*.safetensors"), folder / "config.json", folder / "tokenizer.json"]):
        if file.is_file():
            blob = file.resolve().name if file.is_symlink() else ""
            found[file.name] = blob if _DIGEST.fullmatch(blob) else manifest.sha256(file)
    return found
