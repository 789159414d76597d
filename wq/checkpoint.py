"""Safetensors files, read and written piece by piece, and a folder that appears only when it is complete.

The pipeline knows every tensor's name, dtype and shape before it computes one. So headers are written first, and each
tensor goes to its place the moment it exists: memory does not grow with the model, and a missing tensor is noticed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
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
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise CheckpointError(f"{file}: its header is not JSON ({error}). Download it again.") from error
    header.pop("__metadata__", None)
    return {name: _entry(file, name, values, 8 + length, size) for name, values in header.items()}


def _entry(file: Path, name: str, values: Any, base: int, size: int) -> Entry:
    try:
        dtype, shape, (start, stop) = _DTYPES[values["dtype"]], tuple(values["shape"]), values["data_offsets"]
        expected = prod(shape) * dtype.itemsize
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: {name} has a header entry that cannot be read: {values}.") from error
    if stop - start != expected or start < 0 or base + stop > size:
        raise CheckpointError(
            f"{file}: {name} claims bytes {start} to {stop} for {dtype} {list(shape)}, in a file of {size} bytes. "
            "The file is damaged; download it again."
        )
    return Entry(dtype, shape, file, base + start, base + stop)


def read_headers(folder: Path) -> dict[str, Entry]:
    """Every tensor of the checkpoint in `folder`, single file or sharded. Raises CheckpointError."""
    index = folder / INDEX
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise CheckpointError(f"{index}: shard {outside[0]!r} is not a plain file name in this folder.")
        files = [folder / name for name in names]
    else:
        files = sorted(folder.glob("*.safetensors"))
    missing = [file.name for file in files if not file.exists()]
    if missing or not files:
        raise CheckpointError(f"{folder}: {missing[0] if missing else 'no *.safetensors file'} is not there.")
    entries: dict[str, Entry] = {}
    for file in files:
        for name, entry in read_header(file).items():
            if name in entries:
                raise CheckpointError(f"{folder}: {name} is in both {entries[name].file.name} and {file.name}.")
            entries[name] = entry
    return entries


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
            index = {"metadata": {"total_size": self.bytes}, "weight_map": dict(sorted(weight_map.items()))}
            write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")

    @property
    def bytes(self) -> int:
        """What the tensors take, headers aside."""
        return sum(spec.bytes for spec in self._specs.values())

    def _open(self, path: Path, specs: dict[str, Spec]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, spec in specs.items():
            stop = offset + spec.bytes
            header[name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, stop]}
            offset = stop
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # data starts aligned
        file = path.open("wb")
        self._files.append(file)
        file.write(len(text).to_bytes(8, "little") + text)
        base = file.tell()
        try:
            if offset:
                os.posix_fallocate(file.fileno(), base, offset)  # a full disk is found now, not hours later
        except OSError as error:
            raise OutputError(f"{path}: cannot reserve {offset} bytes ({error.strerror}). Free some space.") from error
        for name in specs:
            self._places[name] = (file, base + header[name]["data_offsets"][0])

    def write(self, name: str, tensor: Tensor) -> None:
        """Put `tensor` in its place; its dtype and shape must be the announced ones."""
        spec = self._specs[name]
        if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
            raise CheckpointError(
                f"{name}: {tensor.dtype} {list(tensor.shape)} computed, {spec.dtype} {list(spec.shape)} announced."
            )
        file, offset = self._places[name]
        file.seek(offset)
        file.write(_memory(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)))
        self._left.discard(name)

    def copy(self, name: str, entry: Entry) -> None:
        """Put a tensor of another file in its place, cast to the announced dtype if that differs."""
        spec = self._specs[name]
        if entry.dtype != spec.dtype:
            self.write(name, read_tensor(entry).to(spec.dtype))
            return
        file, offset = self._places[name]
        file.seek(offset)
        with entry.file.open("rb") as source:
            source.seek(entry.start)
            left = entry.bytes
            while left:
                piece = source.read(min(left, 1 << 24))
                file.write(piece)
                left -= len(piece)
        self._left.discard(name)

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
    if path.is_file():
        raise OutputError(f"{path} is a file. Choose a folder that does not exist yet.")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise OutputError(f"{path} is not empty. Choose another folder, or replace it with --overwrite.")
    parent = path.absolute().parent
    existing = next(folder for folder in (parent, *parent.parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise OutputError(f"{existing} cannot be written to. Choose another folder.")


@contextlib.contextmanager
def staged(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder beside `path` to build in; it takes the place of `path` at the end, or vanishes with the error.

    `path` is never half-written: it holds what it held before, or the complete new content.
    """
    check_output(path, overwrite)
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    stage = path.with_name(f".{path.name}.partial-{os.getpid()}")
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir()
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
