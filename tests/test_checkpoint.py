"""Safetensors files written piece by piece are what the safetensors package reads; damaged ones are refused."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from wq import checkpoint
from wq.checkpoint import Entry, ShardWriter, Spec, read_header, read_headers, read_tensor
from wq.errors import CheckpointError, OutputError

DTYPES = list(checkpoint._NAMES)


def tensors_of_every_dtype() -> dict[str, Tensor]:
    """One tensor a dtype, of arbitrary bits (no NaN payload may be touched), plus odd shapes."""
    made: dict[str, Tensor] = {}
    for i, dtype in enumerate(DTYPES):
        high = 2 if dtype is torch.bool else 256
        raw = torch.randint(0, high, ((2 * i + 3) * 5 * dtype.itemsize,), dtype=torch.uint8)
        made[f"{dtype}".removeprefix("torch.")] = raw.view(dtype).reshape(2 * i + 3, 5)
    made["empty"] = torch.empty(0, 4, dtype=torch.float16)
    made["scalar"] = torch.tensor(3.5)
    made["transposed"] = torch.randn(6, 4, dtype=torch.bfloat16).t()
    return made


def specs_of(tensors: dict[str, Tensor]) -> dict[str, Spec]:
    return {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def write(folder: Path, tensors: dict[str, Tensor], limit: int = 10**9, backwards: bool = False) -> None:
    with ShardWriter(folder, specs_of(tensors), limit) as writer:
        for name in reversed(tensors) if backwards else tensors:
            writer.write(name, tensors[name])


def assert_bits_equal(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    as_bytes = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (actual, expected)]
    assert torch.equal(*as_bytes)


def header_file(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A file with any header: a value is dumped as JSON, bytes are taken as they are."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(start: Any = 0, stop: Any = 16, shape: Any = (4,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("backwards", [False, True], ids=["in order", "backwards"])
@pytest.mark.parametrize("limit", [10**9, 100, 1], ids=["one file", "a few", "one each"])
def test_the_safetensors_package_reads_back_what_the_writer_wrote(tmp_path: Path, limit: int, backwards: bool) -> None:
    tensors = tensors_of_every_dtype()
    write(tmp_path, tensors, limit, backwards)
    files = sorted(tmp_path.glob("*.safetensors"))
    read = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert_bits_equal(read[name], tensor)
    for file in files:
        with safe_open(file, framework="pt") as handle:
            assert handle.metadata() == {"format": "pt"}


def test_several_shards_have_an_index_that_names_the_shard_of_each_tensor(tmp_path: Path) -> None:
    tensors = tensors_of_every_dtype()
    write(tmp_path, tensors, 300)
    index = json.loads((tmp_path / checkpoint.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.itemsize for t in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    assert shards == sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    for name, shard in index["weight_map"].items():
        assert name in load_file(tmp_path / shard)
    for shard in shards:  # only a tensor larger than the limit may make a shard larger than it
        held = load_file(tmp_path / shard).values()
        assert len(held) == 1 or sum(t.numel() * t.itemsize for t in held) <= 300


def test_one_shard_has_no_index(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.ones(3)})
    assert leftovers(tmp_path) == [checkpoint.SINGLE]


def test_a_checkpoint_of_no_tensors_is_still_a_safetensors_file(tmp_path: Path) -> None:
    write(tmp_path, {})
    assert load_file(tmp_path / checkpoint.SINGLE) == {}


def test_own_readers_read_back_what_the_writer_wrote(tmp_path: Path) -> None:
    tensors = tensors_of_every_dtype()
    write(tmp_path, tensors, 200)
    entries = read_headers(tmp_path)
    assert entries.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert entries[name].bytes == tensor.numel() * tensor.itemsize
        assert_bits_equal(read_tensor(entries[name]), tensor)


def test_own_readers_read_what_the_safetensors_package_wrote(tmp_path: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in tensors_of_every_dtype().items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    entries = read_headers(tmp_path)
    assert entries.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert_bits_equal(read_tensor(entries[name]), tensor)


@pytest.mark.parametrize("limit", [10**9, 100])
def test_the_same_input_twice_gives_identical_files(tmp_path: Path, limit: int) -> None:
    tensors = tensors_of_every_dtype()
    for name, backwards in (("one", False), ("two", True)):
        (tmp_path / name).mkdir()
        write(tmp_path / name, tensors, limit, backwards)
    assert leftovers(tmp_path / "one") == leftovers(tmp_path / "two")
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_data_starts_aligned_to_eight_bytes(tmp_path: Path) -> None:
    for i in range(8):
        (tmp_path / str(i)).mkdir()
        write(tmp_path / str(i), {"x" * i: torch.ones(2, dtype=torch.float64)})
        assert read_header(tmp_path / str(i) / checkpoint.SINGLE)["x" * i].start % 8 == 0


@pytest.mark.parametrize("limit", [1, 100, 10**9])
def test_what_headers_take_is_known_beforehand(limit: int, tmp_path: Path) -> None:
    tensors = tensors_of_every_dtype()
    write(tmp_path, tensors, limit)
    files = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    specs = specs_of(tensors)
    assert checkpoint.header_bytes(specs, limit) == files - sum(spec.bytes for spec in specs.values())


def test_a_missing_tensor_is_an_error_that_names_it(tmp_path: Path) -> None:
    specs = specs_of({"a": torch.ones(2), "b": torch.ones(2)})
    writer = ShardWriter(tmp_path, specs)
    writer.write("a", torch.ones(2))
    with pytest.raises(CheckpointError, match="1 tensors were announced but not written: b"):
        writer.__exit__(None)


def test_an_error_inside_the_block_is_not_hidden_by_the_missing_tensors(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, specs_of({"a": torch.ones(2)})):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    "tensor",
    [torch.ones(2, 3, dtype=torch.float16), torch.ones(3, 2), torch.ones(6), torch.ones(2, 3, 1)],
    ids=["dtype", "transposed", "flat", "dimension more"],
)
def test_a_tensor_that_is_not_the_announced_one_is_an_error(tmp_path: Path, tensor: Tensor) -> None:
    writer = ShardWriter(tmp_path, {"a": Spec(torch.float32, (2, 3))})
    with pytest.raises(CheckpointError, match=r"a: .* computed, .* announced"):
        writer.write("a", tensor)
    writer.__exit__(CheckpointError)


def source_entry(folder: Path, tensor: Tensor) -> Entry:
    """`tensor` in a file of its own, between two others."""
    folder.mkdir()
    save_file({"a": torch.ones(7), "x": tensor.contiguous(), "z": torch.ones(7)}, folder / "source.safetensors")
    return read_header(folder / "source.safetensors")["x"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_copy_takes_the_bytes_as_they_are(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = tensors_of_every_dtype()[f"{dtype}".removeprefix("torch.")]
    place = source_entry(tmp_path / "source", tensor)
    with ShardWriter(tmp_path, {"x": Spec(dtype, tuple(tensor.shape))}) as writer:
        writer.copy("x", place)
    assert_bits_equal(load_file(tmp_path / checkpoint.SINGLE)["x"], tensor)


def test_copy_moves_more_than_one_piece(tmp_path: Path) -> None:
    tensor = torch.randint(0, 256, ((1 << 24) + 5,), dtype=torch.uint8)
    place = source_entry(tmp_path / "source", tensor)
    with ShardWriter(tmp_path, {"x": Spec(torch.uint8, tuple(tensor.shape))}) as writer:
        writer.copy("x", place)
    assert torch.equal(load_file(tmp_path / checkpoint.SINGLE)["x"], tensor)


@pytest.mark.parametrize("target", [torch.float16, torch.bfloat16], ids=str)
def test_copy_casts_to_the_announced_dtype(tmp_path: Path, target: torch.dtype) -> None:
    tensor = torch.randn(5, 7)
    place = source_entry(tmp_path / "source", tensor)
    with ShardWriter(tmp_path, {"x": Spec(target, (5, 7))}) as writer:
        writer.copy("x", place)
    assert_bits_equal(load_file(tmp_path / checkpoint.SINGLE)["x"], tensor.to(target))


@pytest.mark.parametrize("target", [torch.float32, torch.float16], ids=["same dtype", "cast"])
def test_copy_refuses_a_tensor_that_is_not_of_the_announced_shape(tmp_path: Path, target: torch.dtype) -> None:
    place = source_entry(tmp_path / "source", torch.randn(8))
    writer = ShardWriter(tmp_path, {"x": Spec(target, (4,)), "y": Spec(target, (4,))})
    writer.write("y", torch.ones(4, dtype=target))
    try:
        with pytest.raises(CheckpointError, match="x: "):
            writer.copy("x", place)
    finally:
        writer.__exit__(CheckpointError)


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after `seconds`."""

    def ring(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("target", [torch.float32, torch.float16], ids=["same dtype", "cast"])
def test_copy_of_a_file_cut_short_after_its_header_was_read_is_an_error(tmp_path: Path, target: torch.dtype) -> None:
    place = source_entry(tmp_path / "source", torch.randn(8))
    os.truncate(place.file, place.start + 4)
    writer = ShardWriter(tmp_path, {"x": Spec(target, (8,))})
    try:
        with alarm(2), pytest.raises(CheckpointError, match="Download it again"):
            writer.copy("x", place)
    finally:
        writer.__exit__(CheckpointError)


SOUND = json.dumps({"x": entry()}).encode()

# name: (header, data, claimed length of the header)
DAMAGED: dict[str, tuple[Any, bytes, int | None]] = {
    "length larger than the file": (SOUND, bytes(16), 2**40),
    "length of all ones": (SOUND, bytes(16), 2**64 - 1),
    "length one more than there is": (SOUND, b"", len(SOUND) + 1),
    "length too short": (SOUND, bytes(16), len(SOUND) - 1),
    "length of nothing": (SOUND, bytes(16), 0),
    "header not JSON": (b"not json", bytes(16), None),
    "header not UTF-8": (b'{"\xff\xfe": 1}', bytes(16), None),
    "header a list": ([1, 2], b"", None),
    "header a number": (5, b"", None),
    "header nested too deep": (b"[" * 100_000 + b"]" * 100_000, b"", None),
    "entry a number": ({"x": 3}, bytes(16), None),
    "entry null": ({"x": None}, bytes(16), None),
    "no dtype": ({"x": {"shape": [4], "data_offsets": [0, 16]}}, bytes(16), None),
    "no shape": ({"x": {"dtype": "F32", "data_offsets": [0, 16]}}, bytes(16), None),
    "no offsets": ({"x": {"dtype": "F32", "shape": [4]}}, bytes(16), None),
    "unknown dtype": ({"x": entry(dtype="F31")}, bytes(16), None),
    "dtype a list": ({"x": entry(dtype=["F32"])}, bytes(16), None),
    "three offsets": ({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8, 16]}}, bytes(16), None),
    "offsets past the end": ({"x": entry(4, 20)}, bytes(16), None),
    "offsets negative": ({"x": entry(-4, 12)}, bytes(16), None),
    "offsets swapped": ({"x": entry(16, 0)}, bytes(16), None),
    "offsets not the shape's": ({"x": entry(0, 16, [5])}, bytes(20), None),
    "offsets text": ({"x": {"dtype": "F32", "shape": [4], "data_offsets": "08"}}, bytes(16), None),
    "offsets fractions": ({"x": entry(0.0, 16.0)}, bytes(16), None),
    "shape huge": ({"x": entry(shape=[2**40, 2**40])}, bytes(16), None),
    "shape negative twice": ({"x": entry(shape=[-1, -4])}, bytes(16), None),
    "shape a fraction": ({"x": entry(shape=[1.6, 2.5])}, bytes(16), None),
    "shape text": ({"x": entry(shape="4")}, bytes(16), None),
    "shape a number": ({"x": entry(shape=4)}, bytes(16), None),
}


@pytest.mark.parametrize(("header", "data", "length"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_header_is_refused(tmp_path: Path, header: Any, data: bytes, length: int | None) -> None:
    file = header_file(tmp_path / "model.safetensors", header, data, length)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_header(file)


@pytest.mark.parametrize("size", [0, 4, 7, 8, 9, 40, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, size: int) -> None:
    whole = header_file(tmp_path / "model.safetensors", {"x": entry()}, bytes(16)).read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:size])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_header(tmp_path / "model.safetensors")


def test_a_sound_header_is_accepted_with_and_without_metadata(tmp_path: Path) -> None:
    for name, header in (("a", {"x": entry()}), ("b", {"__metadata__": {"k": "v"}, "x": entry()})):
        read = read_header(header_file(tmp_path / name, header, bytes(16)))
        assert read.keys() == {"x"}
        assert read["x"].shape == (4,)


def test_a_file_cut_short_after_its_header_was_read_is_refused_when_its_tensor_is_read(tmp_path: Path) -> None:
    place = source_entry(tmp_path / "source", torch.randn(8))
    os.truncate(place.file, place.start + 4)
    with pytest.raises(CheckpointError, match="Download it again"):
        read_tensor(place)


def sharded(folder: Path, weight_map: Any, files: dict[str, list[str]]) -> Path:
    """A checkpoint with this index, and files that hold these tensors."""
    (folder / checkpoint.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    for file, names in files.items():
        save_file({name: torch.ones(2) for name in names}, folder / file)
    return folder


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", ".", "..", ""])
def test_a_shard_outside_of_the_folder_is_refused(tmp_path: Path, shard: str) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="plain file name"):
        read_headers(sharded(inner, {"a": shard}, {}))


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"}, {"1.safetensors": ["a"]})
    with pytest.raises(CheckpointError, match=r"2\.safetensors is not there"):
        read_headers(folder)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    files = {"1.safetensors": ["a", "b"], "2.safetensors": ["b"]}
    folder = sharded(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"}, files)
    with pytest.raises(CheckpointError, match=r"b is in both 1\.safetensors and 2\.safetensors"):
        read_headers(folder)


@pytest.mark.parametrize(
    "text",
    ["not json", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 5}}', '{"weight_map": {"a": 5, "b": "c"}}'],
)
def test_an_index_that_cannot_be_read_is_refused(tmp_path: Path, text: str) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model-00001-of-00001.safetensors")
    (tmp_path / checkpoint.INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        read_headers(tmp_path)


def test_a_folder_without_tensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither model.safetensors nor"):
        read_headers(tmp_path)


def test_a_full_disk_is_noticed_before_anything_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError, match=r"cannot reserve 12 bytes \(No space left on device\)"):
        ShardWriter(tmp_path, specs_of({"a": torch.ones(3)}))


def test_a_writer_goes_on_with_what_another_has_begun(tmp_path: Path) -> None:
    tensors = tensors_of_every_dtype()
    specs, first = specs_of(tensors), list(tensors)[::2]
    write(tmp_path, tensors, 300)
    whole = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    for file in tmp_path.iterdir():
        file.unlink()
    begun = ShardWriter(tmp_path, specs, 300)
    for name in first:
        begun.write(name, tensors[name])
    assert begun.written == sorted(first)
    begun.sync()
    with ShardWriter(tmp_path, specs, 300, begun.written) as writer:
        for name in tensors.keys() - set(first):
            writer.write(name, tensors[name])
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == whole


def test_a_writer_does_not_go_on_with_files_of_another_size(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.ones(3)})
    specs = specs_of({"a": torch.ones(3), "b": torch.ones(3)})
    with pytest.raises(OutputError, match="is not as it was left"):
        ShardWriter(tmp_path, specs, written=["a"])
