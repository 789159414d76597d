"""Safetensors files, read and written piece by piece, and a folder that appears only when it is complete.

The pipeline knows every tensor's name, dtype and shape before it computes one. So headers are written first, and each
tensor goes to its place the moment it exists: memory does not grow with the model, and a missing tensor is noticed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from wq.errors import CheckpointError, OutputError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_SHARD_BYTES = 5 * 10**9

_MAX_HEADER_BYTES = 100_000_000  # what safetensors itself accepts
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: its dtype and shape, the file, and the byte range in it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int

    @property
    def bytes(self) -> int:
        return self.stop - self.start


def read_header(file: Path) -> dict[str, Entry]:
    """Every tensor of a safetensors file, without reading one. Raises CheckpointError if the header is no such thing.

    Sizes are checked against the file's length here, so that nothing later allocates what the file does not hold.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > min(_MAX_HEADER_BYTES, size - 8) or size < 8:
            raise CheckpointError(f"{file}: not a safetensors file, or cut short: {size} bytes. Download it again.")
        header = _json_object(stream.read(length), file)
    header.pop("__metadata__", None)
    entries = {name: _entry(file, name, values, 8 + length, size) for name, values in header.items()}
    ordered = sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop))
    for (one, first), (two, second) in pairwise(ordered):
        if second.start < first.stop:
            raise CheckpointError(f"{file}: {one} and {two} claim the same bytes. The file is damaged.")
    return entries


def _json_object(text: bytes | str, file: Path) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: what should be JSON is not ({error}). Download it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: a JSON object was expected, not a {type(value).__name__}. Download it again.")
    return value


def _entry(file: Path, name: str, values: Any, base: int, size: int) -> Entry:
    try:
        dtype, shape, (start, stop) = _DTYPES[values["dtype"]], tuple(values["shape"]), values["data_offsets"]
        whole = all(type(number) is int and number >= 0 for number in (*shape, start, stop))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: {name} has a header entry that cannot be read: {str(values)[:200]}.") from error
    if not whole or stop - start != prod(shape) * dtype.itemsize or base + stop > size:
        raise CheckpointError(
            f"{file}: {name} claims bytes {start} to {stop} for {dtype} {list(shape)}, in a file of {size} bytes. "
            "The file is damaged; download it again."
        )
    return Entry(dtype, shape, file, base + start, base + stop)


def read_headers(folder: Path) -> dict[str, Entry]:
    """Every tensor of the checkpoint in `folder`, single file or sharded. Raises CheckpointError."""
    index = folder / INDEX
    if (folder / SINGLE).is_file():  # transformers prefers it, too
        files = [folder / SINGLE]
    elif index.is_file():
        files = [folder / name for name in _shard_list(index)]
    else:
        raise CheckpointError(f"{folder}: there is neither {SINGLE} nor {INDEX}.")
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(f"{folder}: {missing[0]} is not there. Download it again.")
    entries: dict[str, Entry] = {}
    for file in files:
        for name, entry in read_header(file).items():
            if name in entries:
                raise CheckpointError(f"{folder}: {name} is in both {entries[name].file.name} and {file.name}.")
            entries[name] = entry
    return entries


def _shard_list(index: Path) -> list[str]:
    """The shards an index names: plain names of files in its own folder, nothing that leads elsewhere."""
    weight_map = _json_object(index.read_bytes(), index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: it has no weight_map. Download it again.")
    names = list(weight_map.values())
    for name in names:
        if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name:
            raise CheckpointError(f"{index}: shard {name!r} is not a plain file name in this folder.")
    return sorted(set(names))


def read_tensor(entry: Entry) -> Tensor:
    """The tensor, in memory of its own (no mapping keeps the file's pages alive)."""
    if not entry.bytes:
        return torch.empty(entry.shape, dtype=entry.dtype)
    buffer = torch.empty(entry.bytes, dtype=torch.uint8)
    left = _memory(buffer)
    with entry.file.open("rb", buffering=0) as stream:
        stream.seek(entry.start)
        while left:
            count = stream.readinto(left)
            if not count:
                raise CheckpointError(f"{entry.file}: ends before byte {entry.stop}. Download it again.")
            left = left[count:]
    return buffer.view(entry.dtype).reshape(entry.shape)


def overwrite(entry: Entry, tensor: Tensor) -> None:
    """Put `tensor` where `entry` lies, in a file that no one else reads yet. Raises CheckpointError if it differs."""
    if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
        was = f"{entry.dtype} {list(entry.shape)}"
        raise CheckpointError(f"{entry.file}: {tensor.dtype} {list(tensor.shape)} cannot take the place of {was}.")
    with entry.file.open("r+b") as file:
        file.seek(entry.start)
        file.write(_memory(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)))
        file.flush()
        os.fsync(file.fileno())


def _memory(flat: Tensor) -> memoryview:
    """The bytes of a uint8 tensor on the CPU, not a copy of them."""
    return memoryview(flat.numpy())  # type: ignore[arg-type]


@dataclass(frozen=True)
class Spec:
    """What will be written under a name."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class ShardWriter:
    """Writes a checkpoint whose tensors are known in advance, in whatever order they come.

    `with ShardWriter(folder, specs) as writer: writer.write(name, tensor)`. Leaving the block without an error raises
    CheckpointError unless every tensor was written once; files are flushed to disk by then.
    """

    def __init__(self, folder: Path, specs: dict[str, Spec], max_shard_bytes: int = MAX_SHARD_BYTES):
        self._specs, self._left = specs, set(specs)
        self._places: dict[str, tuple[IO[bytes], int]] = {}
        self._files: list[IO[bytes]] = []
        shards = list(_shards(specs, max_shard_bytes))
        names = [SINGLE] if len(shards) == 1 else _shard_names(len(shards))
        for name, shard in zip(names, shards, strict=True):
            self._open(folder / name, {key: specs[key] for key in shard})
        if len(shards) > 1:
            weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")

    @property
    def total_bytes(self) -> int:
        """What the tensors take, headers aside."""
        return sum(spec.bytes for spec in self._specs.values())

    def _open(self, path: Path, specs: dict[str, Spec]) -> None:
        file = path.open("wb")
        self._files.append(file)
        file.write(_header(specs))
        offset = file.tell()
        _reserve(file, offset, sum(spec.bytes for spec in specs.values()))
        for name, spec in specs.items():
            self._places[name] = (file, offset)
            offset += spec.bytes

    def write(self, name: str, tensor: Tensor) -> None:
        """Put `tensor` in its place; its dtype and shape must be the announced ones."""
        file = self._place(name, tensor.dtype, tuple(tensor.shape))
        file.write(_memory(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)))
        self._left.discard(name)

    def copy(self, name: str, entry: Entry) -> None:
        """Put a tensor of another file in its place, cast to the announced dtype if that differs."""
        wanted = self._specs[name].dtype
        if entry.dtype != wanted:
            self.write(name, read_tensor(entry).to(wanted))
            return
        file = self._place(name, entry.dtype, entry.shape)
        with entry.file.open("rb") as source:
            source.seek(entry.start)
            left = entry.bytes
            while left:
                piece = source.read(min(left, 1 << 24))
                if not piece:
                    raise CheckpointError(f"{entry.file}: ends before byte {entry.stop}. Download it again.")
                file.write(piece)
                left -= len(piece)
        self._left.discard(name)

    def _place(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> IO[bytes]:
        """The file that holds `name`, at its place."""
        spec = self._specs[name]
        if dtype != spec.dtype or shape != spec.shape:
            raise CheckpointError(f"{name}: {dtype} {list(shape)} computed, {spec.dtype} {list(spec.shape)} announced.")
        if name not in self._left:
            raise CheckpointError(f"{name}: written twice.")
        file, offset = self._places[name]
        file.seek(offset)
        return file

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: Any, *rest: object) -> None:
        for file in self._files:
            if kind is None:
                file.flush()
                os.fsync(file.fileno())
            file.close()
        if kind is None and self._left:
            raise CheckpointError(f"{len(self._left)} tensors were announced but not written: {min(self._left)}, ...")


def _header(specs: dict[str, Spec]) -> bytes:
    """What a safetensors file with these tensors, one after the other, begins with."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, spec in specs.items():
        stop = offset + spec.bytes
        header[name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data starts aligned
    return len(text).to_bytes(8, "little") + text


def header_bytes(specs: dict[str, Spec], max_shard_bytes: int = MAX_SHARD_BYTES) -> int:
    """How much of the files that `ShardWriter` makes is no tensor."""
    return sum(len(_header({name: specs[name] for name in shard})) for shard in _shards(specs, max_shard_bytes))


def _reserve(file: IO[bytes], start: int, count: int) -> None:
    """Claim the space now, so that a full disk is found before the work and not after it."""
    try:
        if count and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), start, count)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return  # a file system that cannot reserve; writing will tell
        raise OutputError(f"{file.name}: cannot reserve {count} bytes ({error.strerror}). Free some space.") from error


def _shards(specs: dict[str, Spec], limit: int) -> Iterator[list[str]]:
    """Names cut into runs of at most `limit` bytes (a larger tensor stands alone)."""
    shard: list[str] = []
    size = 0
    for name, spec in specs.items():
        if shard and size + spec.bytes > limit:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += spec.bytes
    yield shard


def _shard_names(count: int) -> list[str]:
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def write_text(path: Path, text: str) -> None:
    """Write and flush a small file."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def check_output(path: Path, overwrite: bool = False) -> None:
    """Raise OutputError unless a new folder can be put at `path`."""
    path = path.resolve()
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path} is not a folder. Choose one that does not exist yet.")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise OutputError(f"{path} is not empty. Choose another folder, or replace it with --overwrite.")
    parent = path.parent
    existing = next(folder for folder in (parent, *parent.parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise OutputError(f"{existing} cannot be written to. Choose another folder.")


@contextlib.contextmanager
def staged(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder beside `path` to build in; it takes the place of `path` at the end, or vanishes with the error.

    `path` is never half-written: it holds what it held before, or the complete new content.
    """
    check_output(path, overwrite)
    path = path.resolve()  # behind a link, the folder it leads to
    stage = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir()
    except OSError as error:
        raise OutputError(f"{path} cannot be made ({error.strerror}). Choose another folder.") from error
    try:
        yield stage
        _publish(stage, path)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _publish(stage: Path, path: Path) -> None:
    """Rename `stage` to `path`, with what was there put aside until that has worked."""
    aside = path.with_name(f".{path.name}.old-{os.getpid()}")
    if path.exists():
        path.rename(aside)
    try:
        stage.rename(path)
    except BaseException:
        if aside.exists():
            aside.rename(path)
        raise
    shutil.rmtree(aside, ignore_errors=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
