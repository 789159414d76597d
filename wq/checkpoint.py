"""Safetensors files, read and written piece by piece.

The pipeline knows every tensor's name, dtype and shape before it computes one. So headers are written first, and each
tensor goes to its place the moment it exists: memory does not grow with the model, and a missing tensor is noticed.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping
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

_PIECE = 1 << 24  # bytes of a tensor that are looked at together

MAX_JSON_BYTES = 100_000_000  # of a config, an index, a manifest; and of a header, where safetensors says so
_MAX_RANK = 8
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

    Sizes are checked against the file's length here, so that nothing later allocates what the file does not hold. A
    name that is there twice is refused: readers differ about which of the two they believe.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > min(MAX_JSON_BYTES, size - 8) or size < 8:
            raise CheckpointError(f"{file}: not a safetensors file, or cut short: {size} bytes. Download it again.")
        header = _json_object(stream.read(length), file)
    notes = header.pop("__metadata__", None) or {}
    if not isinstance(notes, dict) or not _are_texts([*header, *notes, *notes.values()]):
        raise CheckpointError(f"{file}: a name or __metadata__ is no text. The file is damaged; download it again.")
    entries = {name: _entry(file, name, values, 8 + length, size) for name, values in header.items()}
    ordered = sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop))
    for (one, first), (two, second) in pairwise(ordered):
        if second.start < first.stop:
            raise CheckpointError(
                f"{file}: {one[:200]} and {two[:200]} claim the same bytes. The file is damaged; download it again."
            )
    return entries


def _are_texts(values: list[Any]) -> bool:
    """Whether these are texts that other readers take for such, too: Python's has half characters (`"\\ud800"`)."""
    try:
        return "\0".join(values).encode() is not None
    except (TypeError, ValueError):
        return False


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file of any origin. Raises CheckpointError for everything else, a pipe or a device too."""
    if not file.is_file():
        raise CheckpointError(f"{file} is no file, or is not there. Download it again.")
    size = file.stat().st_size
    if size > MAX_JSON_BYTES:
        raise CheckpointError(f"{file} has {size} bytes; no such file has over {MAX_JSON_BYTES}. Download it again.")
    return _json_object(file.read_bytes(), file)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads`: an object whose keys are there once. Raises ValueError for one that is there twice."""
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"{name[:200]!r} is there twice")
        values[name] = value
    return values


def _json_object(text: bytes, file: Path) -> dict[str, Any]:
    try:
        value = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        what = "is not JSON that all readers understand alike"
        raise CheckpointError(f"{file}: {what} ({error}). Download it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: a JSON object was expected, not a {type(value).__name__}. Download it again.")
    return value


def _entry(file: Path, name: str, values: Any, base: int, size: int) -> Entry:
    try:
        dtype, shape, (start, stop) = _DTYPES[values["dtype"]], tuple(values["shape"]), values["data_offsets"]
        whole = all(type(number) is int and 0 <= number < 1 << 63 for number in (*shape[: _MAX_RANK + 1], start, stop))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{file}: {name[:200]} has a header entry that cannot be read: {_short(values)}. Download it again."
        ) from error
    whole = whole and len(shape) <= _MAX_RANK
    if not whole or stop - start != prod(shape) * dtype.itemsize or base + stop > size:
        raise CheckpointError(
            f"{file}: {name[:200]} claims bytes {_short(start)} to {_short(stop)} for {dtype} {_short(list(shape))}, "
            f"in a file of {size} bytes. The file is damaged; download it again."
        )
    return Entry(dtype, shape, file, base + start, base + stop)


def _short(value: Any) -> str:
    """What a header says, for a sentence: it may be a list of a million numbers of four thousand digits."""
    try:
        return str(value[:9] if isinstance(value, (list, str)) else value)[:200]
    except ValueError:  # a number of more digits than Python writes
        return "a number of thousands of digits"


def read_headers(folder: Path) -> dict[str, Entry]:
    """Every tensor of the checkpoint in `folder`, single file or sharded. Raises CheckpointError."""
    index = folder / INDEX
    if (folder / SINGLE).is_file():  # transformers prefers it, too
        files = [folder / SINGLE]
    elif index.is_file():
        files = [folder / name for name in _shard_list(index)]
    else:
        raise CheckpointError(f"{folder}: there is neither {SINGLE} nor {INDEX}. Download it again.")
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(f"{folder}: {missing[0]} is not there. Download it again.")
    entries: dict[str, Entry] = {}
    for file in files:
        for name, entry in read_header(file).items():
            if name in entries:
                both = f"{entries[name].file.name} and {file.name}"
                raise CheckpointError(f"{folder}: {name[:200]} is in both {both}. Download the checkpoint again.")
            entries[name] = entry
    return entries


def _shard_list(index: Path) -> list[str]:
    """The shards an index names: plain names of files in its own folder, nothing that leads elsewhere."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: it has no weight_map. Download it again.")
    names = list(weight_map.values())
    for name in names:
        if not is_plain(name):
            raise CheckpointError(
                f"{index}: shard {str(name)[:200]!r} is not a plain file name in this folder. Do not load this folder."
            )
    return sorted(set(names))


def is_plain(name: Any) -> bool:
    """Whether this is the name of a file in a folder, and leads nowhere else."""
    plain = isinstance(name, str) and name not in ("", ".", "..") and name.isprintable() and "\\" not in name
    return plain and len(name.encode()) < 256 and Path(name).name == name


def read_tensor(entry: Entry) -> Tensor:
    """The tensor, in memory of its own (no mapping keeps the file's pages alive)."""
    if not entry.bytes:
        return torch.empty(entry.shape, dtype=entry.dtype)
    buffer = torch.empty(entry.bytes, dtype=torch.uint8)
    left = raw_bytes(buffer)
    with entry.file.open("rb", buffering=0) as stream:
        stream.seek(entry.start)
        while left:
            count = stream.readinto(left)
            if not count:
                raise CheckpointError(f"{entry.file}: ends before byte {entry.stop}. Download it again.")
            left = left[count:]
    return buffer.view(entry.dtype).reshape(entry.shape)


def pieces(entry: Entry) -> Iterator[Tensor]:
    """The tensor in flat pieces, none of them large."""
    size = entry.dtype.itemsize
    for start in range(entry.start, entry.stop, _PIECE):
        stop = min(start + _PIECE, entry.stop)
        yield read_tensor(Entry(entry.dtype, ((stop - start) // size,), entry.file, start, stop))


def finite(name: str, tensor: Tensor) -> Tensor:
    """`tensor`, if all of its values are finite. Raises CheckpointError, naming it, if not."""
    _refuse_if(_not_finite(tensor), name, tensor.numel())
    return tensor


def check_finite(entries: Mapping[str, Entry]) -> None:
    """Raise CheckpointError, naming it, if a tensor on disk has a value that is not finite."""
    for name, entry in entries.items():
        if entry.dtype.is_floating_point:
            _refuse_if(sum(map(_not_finite, pieces(entry))), name, prod(entry.shape))


def _not_finite(tensor: Tensor) -> int:
    """How many values are not."""
    if not tensor.dtype.is_floating_point:
        return 0
    values = tensor if tensor.dtype.itemsize > 1 else tensor.float()  # torch tests no 8-bit floats
    if not values.numel() or all(torch.isfinite(end) for end in values.aminmax()):  # counting takes memory
        return 0
    return int((~torch.isfinite(values)).sum())


def _refuse_if(wrong: int, name: str, count: int) -> None:
    if wrong:
        raise CheckpointError(
            f"{name} holds {wrong} values that are not finite, of {count}. The source is damaged; download it again."
        )


def overwrite(entry: Entry, tensor: Tensor) -> None:
    """Put `tensor` where `entry` lies, in a file that no one else reads yet. Raises CheckpointError if it differs."""
    if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
        was = f"{entry.dtype} {list(entry.shape)}"
        raise CheckpointError(f"{entry.file}: {tensor.dtype} {list(tensor.shape)} cannot take the place of {was}.")
    with entry.file.open("r+b") as file:
        file.seek(entry.start)
        file.write(raw_bytes(tensor))
        file.flush()
        os.fsync(file.fileno())


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor; no copy of them, if it lies on the CPU in one piece."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
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
    CheckpointError unless every tensor was written once; files are flushed to disk by then. written: names of tensors
    that are in the folder's files already, if a writer of the same specs had begun there; the files are then gone on
    with. Raises OutputError if they are others.
    """

    def __init__(
        self,
        folder: Path,
        specs: dict[str, Spec],
        max_shard_bytes: int = MAX_SHARD_BYTES,
        written: Iterable[str] = (),
    ):
        self._specs, self._left = specs, set(specs).difference(written)
        self._begun = len(self._left) < len(specs)
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

    @property
    def written(self) -> list[str]:
        """The tensors that are in their places."""
        return sorted(self._specs.keys() - self._left)

    def back_to(self, written: Iterable[str]) -> None:
        """Take back all but what was `written` at some time; what is in the files will be written over."""
        self._left = set(self._specs).difference(written)

    def _open(self, path: Path, specs: dict[str, Spec]) -> None:
        header, size = _header(specs), sum(spec.bytes for spec in specs.values())
        if self._begun and not (path.is_file() and path.stat().st_size == len(header) + size):
            raise OutputError(
                f"{path} is not as it was left, so nothing can go on from it. Begin again with --restart."
            )
        file = path.open("r+b" if self._begun else "wb")
        self._files.append(file)
        file.write(header)
        offset = file.tell()
        _reserve(file, offset, size)
        file.truncate(offset + size)
        for name, spec in specs.items():
            self._places[name] = (file, offset)
            offset += spec.bytes

    def write(self, name: str, tensor: Tensor) -> None:
        """Put `tensor` in its place; its dtype and shape must be the announced ones."""
        file = self._place(name, tensor.dtype, tuple(tensor.shape))
        file.write(raw_bytes(tensor))
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

    def sync(self) -> None:
        """Flush what was written to disk."""
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: Any, *rest: object) -> None:
        if kind is None:
            self.sync()
        for file in self._files:
            file.close()
        if kind is None and self._left:
            raise CheckpointError(f"{len(self._left)} tensors were announced but not written: {min(self._left)}, ...")


class Nowhere(ShardWriter):
    """Takes what is written, and forgets it: for a process beside the one that writes."""

    def __init__(self, folder: Path, specs: dict[str, Spec], **_: Any):
        self._specs, self._left = specs, set(specs)

    def write(self, name: str, tensor: Tensor) -> None:
        """Forget it."""
        self._left.discard(name)

    def copy(self, name: str, entry: Entry) -> None:
        """Forget it."""
        self._left.discard(name)

    def sync(self) -> None:
        """There is nothing to flush."""

    def __exit__(self, *_: object) -> None:
        pass


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a small safetensors file of its own."""
    specs = {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with path.open("wb") as file:
        file.write(_header(specs, metadata))
        for tensor in tensors.values():
            file.write(raw_bytes(tensor))


def _header(specs: Mapping[str, Spec], metadata: Mapping[str, str] | None = None) -> bytes:
    """What a safetensors file with these tensors, one after the other, begins with."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
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
