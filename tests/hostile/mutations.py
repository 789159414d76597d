"""Checkpoints damaged on purpose: each damage a pure function of a folder's files and a seed, with a name.

`mutate(number, files)` is the same damage for ever, so a failure is reproduced by its number:

    python scripts/hostile.py --only 4711
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from wq import manifest
from wq.checkpoint import INDEX

Content = bytes | Path | None  # of a file; where a link leads; None: a pipe into which nobody writes
Files = dict[str, Content]
Mutation = Callable[[Files, random.Random], Files]

MUTATIONS: dict[str, Mutation] = {}
SHARDED: set[str] = set()  # those that need an index
PAYLOAD: set[str] = set()  # those that change values of tensors, and nothing else


class Mutated(NamedTuple):
    """name: of the mutation. renewed: whether the manifest was made anew, as by somebody who wants to deceive."""

    name: str
    files: Files
    renewed: bool


def mutate(number: int, files: Files) -> Mutated:
    """Damage number so-and-so of a folder; one that is sharded gets damage to its index, too."""
    names = sorted(MUTATIONS if INDEX in files else MUTATIONS.keys() - SHARDED)
    chance = random.Random(number)
    name = names[number % len(names)]
    renewed = name not in PAYLOAD and chance.random() < 0.5
    return Mutated(name, MUTATIONS[name](dict(files), chance), renewed)


def read(folder: Path) -> Files:
    """The files of a folder."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file()}


def write(files: Files, folder: Path, renewed: bool = False) -> None:
    """Make `folder` hold these files and no others, each of its own: what others have open stays as it is."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in files.items():
        if content is None:
            os.mkfifo(folder / name)
        elif isinstance(content, Path):
            (folder / name).symlink_to(content)
        else:
            (folder / name).write_bytes(content)
    if renewed:
        manifest.write(folder)


# --- tools ---


def mutation(function: Mutation) -> Mutation:
    """Register a damage under its own name."""
    MUTATIONS[function.__name__.replace("_", " ")] = function
    return function


def payload(function: Mutation) -> Mutation:
    PAYLOAD.add(function.__name__.replace("_", " "))
    return mutation(function)


def sharded(function: Mutation) -> Mutation:
    SHARDED.add(function.__name__.replace("_", " "))
    return mutation(function)


def shards(files: Files) -> list[str]:
    return sorted(name for name in files if name.endswith(".safetensors"))


def change_file(files: Files, name: str, change: Callable[[bytes], bytes]) -> Files:
    content = files[name]
    assert isinstance(content, bytes)
    return files | {name: change(content)}


def change_shard(files: Files, chance: random.Random, change: Callable[[bytes], bytes]) -> Files:
    return change_file(files, chance.choice(shards(files)), change)


def split(data: bytes) -> tuple[bytes, bytes]:
    """Header and payload of a safetensors file."""
    stop = 8 + int.from_bytes(data[:8], "little")
    return data[8:stop], data[stop:]


def join(head: bytes, body: bytes) -> bytes:
    return len(head).to_bytes(8, "little") + head + body


def change_header(files: Files, chance: random.Random, change: Callable[[dict[str, Any]], Any]) -> Files:
    """Another header for the same payload; what `change` returns, if anything, takes its place."""

    def both(data: bytes) -> bytes:
        head, body = split(data)
        values = json.loads(head)
        other = change(values)
        return join(json.dumps(values if other is None else other).encode(), body)

    return change_shard(files, chance, both)


def change_entry(files: Files, chance: random.Random, change: Callable[[dict[str, Any]], Any]) -> Files:
    """Another header entry for one tensor."""
    return change_header(files, chance, lambda values: change(values[a_tensor(values, chance)]))


def a_tensor(values: dict[str, Any], chance: random.Random) -> str:
    return chance.choice(sorted(values.keys() - {"__metadata__"}))


def change_json(files: Files, name: str, change: Callable[[dict[str, Any]], Any]) -> Files:
    def both(data: bytes) -> bytes:
        values = json.loads(data)
        change(values)
        return json.dumps(values).encode()

    return change_file(files, name, both)


def change_index(files: Files, change: Callable[[dict[str, Any]], Any]) -> Files:
    return change_json(files, INDEX, lambda values: change(values["weight_map"]))


def flipped(data: bytes, chance: random.Random, start: int, stop: int, count: int = 1) -> bytes:
    changed = bytearray(data)
    for _ in range(count):
        changed[chance.randrange(start, stop)] ^= 1 << chance.randrange(8)
    return bytes(changed)


NUMBERS: list[Any] = [0, -1, 1, 7, 2**31 - 1, 2**31, 2**32, 2**63, 2**64, 10**30, 1.5, 1e300, "4", None, [], {}, True]
NUMBERS += [float("nan"), float("inf"), int("9" * 4000)]

# --- the bytes of a file ---


@mutation
def cut_anywhere(files: Files, chance: random.Random) -> Files:
    return change_shard(files, chance, lambda data: data[: chance.randrange(len(data))])


@mutation
def cut_by_little(files: Files, chance: random.Random) -> Files:
    return change_shard(files, chance, lambda data: data[: -chance.randint(1, 64)])


@mutation
def cut_in_the_header(files: Files, chance: random.Random) -> Files:
    return change_shard(files, chance, lambda data: data[: chance.randrange(8 + len(split(data)[0]))])


@mutation
def empty(files: Files, chance: random.Random) -> Files:
    return change_shard(files, chance, lambda data: b"")


@mutation
def random_bytes(files: Files, chance: random.Random) -> Files:
    return change_shard(files, chance, lambda data: chance.randbytes(chance.choice([1, 7, 8, 9, 100, 20_000])))


@mutation
def a_tail(files: Files, chance: random.Random) -> Files:
    return change_shard(files, chance, lambda data: data + chance.randbytes(chance.randint(1, 1000)))


@mutation
def a_bit_of_the_file(files: Files, chance: random.Random) -> Files:
    return change_shard(files, chance, lambda data: flipped(data, chance, 0, len(data)))


@mutation
def bits_of_the_header(files: Files, chance: random.Random) -> Files:
    return change_shard(
        files, chance, lambda data: flipped(data, chance, 8, 8 + len(split(data)[0]), chance.choice([1, 1, 3, 30]))
    )


@mutation
def bytes_of_the_header(files: Files, chance: random.Random) -> Files:
    """Printable ones: the header stays JSON more often."""

    def change(data: bytes) -> bytes:
        head, body = split(data)
        changed = bytearray(head)
        for _ in range(chance.choice([1, 2, 5])):
            changed[chance.randrange(len(head))] = chance.choice(b'0123456789[]{}",:-.eIF_ x')
        return join(bytes(changed), body)

    return change_shard(files, chance, change)


@payload
def a_bit_of_the_payload(files: Files, chance: random.Random) -> Files:
    return change_shard(
        files, chance, lambda data: flipped(data, chance, 8 + len(split(data)[0]), len(data), chance.choice([1, 1, 2]))
    )


@payload
def a_page_of_zeros(files: Files, chance: random.Random) -> Files:
    """As a torn write leaves it. A page that was zeros before gets a bit flipped as well: it must have changed."""

    def change(data: bytes) -> bytes:
        start = chance.randrange(8 + len(split(data)[0]), len(data))
        changed = data[:start] + bytes(len(data[start : start + 4096])) + data[start + 4096 :]
        return changed if changed != data else flipped(data, chance, start, start + 1)

    return change_shard(files, chance, change)


@mutation
def a_lie_about_the_header_length(files: Files, chance: random.Random) -> Files:
    def change(data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        lies = [0, 1, 2, length - 1, length + 1, length + 8, len(data), len(data) - 8, len(data) - 9, 10**8, 10**8 + 1]
        lies += [2**31, 2**32, 2**63, 2**64 - 1, chance.randrange(2**64), chance.randrange(len(data))]
        return chance.choice(lies).to_bytes(8, "little") + data[8:]

    return change_shard(files, chance, change)


# --- the header ---


@mutation
def a_lie_about_a_shape(files: Files, chance: random.Random) -> Files:
    def change(entry: dict[str, Any]) -> None:
        shape = entry["shape"]
        lies: list[Any] = [
            [],
            [0],
            shape[::-1],
            [*shape, 1],
            [1, *shape],
            [*shape, 2],
            shape[1:],
            [s + 1 for s in shape],
        ]
        lies += [[2**32, 2**32], [2**63, 2], [-n for n in shape], [1] * 100_000, [2**60] * 3000, "64", 64, None, {}]
        lies += [[chance.choice(NUMBERS)], [*shape[:-1], chance.choice(NUMBERS)]]
        entry["shape"] = chance.choice(lies)

    return change_entry(files, chance, change)


@mutation
def a_lie_about_a_dtype(files: Files, chance: random.Random) -> Files:
    lies: list[Any] = ["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "F4", "C64"]
    lies += ["", "f16", "I32 ", "F" * 10_000, None, 4, [], {}, ["I32"], float("nan")]
    return change_entry(files, chance, lambda entry: entry.update(dtype=chance.choice(lies)))


@mutation
def another_dtype_of_the_same_size(files: Files, chance: random.Random) -> Files:
    alike = {"F16": ["BF16", "I16"], "I32": ["F32"], "I64": ["F64"], "F32": ["I32"], "BF16": ["F16", "I16"]}
    return change_entry(files, chance, lambda entry: entry.update(dtype=chance.choice(alike[entry["dtype"]])))


@mutation
def a_lie_about_offsets(files: Files, chance: random.Random) -> Files:
    def change(entry: dict[str, Any]) -> None:
        start, stop = entry["data_offsets"]
        step = chance.choice([-(2**40), -8, -1, 1, 8, 2**40, 2**63])
        lies: list[Any] = [
            [start + step, stop + step],
            [start, stop + step],
            [stop, start],
            [start],
            [start, stop, stop],
        ]
        lies += [[float(start), float(stop)], [str(start), str(stop)], [], None, "ab", {}, [True, False], [None, None]]
        lies += [[chance.choice(NUMBERS), stop], [start, chance.choice(NUMBERS)]]
        entry["data_offsets"] = chance.choice(lies)

    return change_entry(files, chance, change)


@mutation
def two_tensors_at_one_place(files: Files, chance: random.Random) -> Files:
    def change(values: dict[str, Any]) -> None:
        values[a_tensor(values, chance)] = dict(values[a_tensor(values, chance)])
        values.update({"one more": dict(values[a_tensor(values, chance)])} if chance.random() < 0.5 else {})

    return change_header(files, chance, change)


@mutation
def two_tensors_exchanged(files: Files, chance: random.Random) -> Files:
    def change(values: dict[str, Any]) -> None:
        one, other = a_tensor(values, chance), a_tensor(values, chance)
        values[one], values[other] = values[other], values[one]

    return change_header(files, chance, change)


@mutation
def a_tensor_absent(files: Files, chance: random.Random) -> Files:
    return change_header(files, chance, lambda values: values.pop(a_tensor(values, chance)) and None)


@mutation
def a_tensor_renamed(files: Files, chance: random.Random) -> Files:
    names = ["", ".", "weight", "../x", "x" * 70_000, "a\0b", "\x1b[31mred", "\ud800", "__class__", "модель", "x\ny"]

    def change(values: dict[str, Any]) -> None:
        old = a_tensor(values, chance)
        layer, _, leaf = old.rpartition(".")
        more = [f"{old}.weight", f".{old}", f"{layer}..{leaf}", f"{layer}.qweight", f"{layer}.weight", leaf]
        values[chance.choice(names + more)] = values.pop(old)

    return change_header(files, chance, change)


@mutation
def an_extra_tensor(files: Files, chance: random.Random) -> Files:
    names = [
        "extra",
        "model.layers.7.mlp.up_proj.weight",
        "lm_head.bias",
        "lm_head.qweight",
        "model.norm.weight_packed",
    ]
    entry: dict[str, Any] = {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]}
    return change_header(files, chance, lambda values: values.update({chance.choice(names): entry}))


@mutation
def a_key_twice(files: Files, chance: random.Random) -> Files:
    """Two entries of one name, which readers may take differently."""

    def change(data: bytes) -> bytes:
        head, body = split(data)
        values = json.loads(head)
        name = a_tensor(values, chance)
        again = json.dumps({name: values[a_tensor(values, chance)]}).encode()
        text = head.rstrip()
        return join(text[:-1] + b"," + again[1:] if chance.random() < 0.5 else again[:-1] + b"," + text[1:], body)

    return change_shard(files, chance, change)


@mutation
def metadata_of_another_kind(files: Files, chance: random.Random) -> Files:
    lies: list[Any] = [
        None,
        [],
        7,
        "pt",
        {"format": "tf"},
        {"format": ["pt"]},
        {"format": None},
        {"x": "y" * 100_000},
        {},
    ]
    lies += [{"format": "\ud800"}, {"format": {"a": {}}}]
    return change_header(files, chance, lambda values: values.update(__metadata__=chance.choice(lies)))


@mutation
def a_header_of_another_kind(files: Files, chance: random.Random) -> Files:
    texts = [
        b"",
        b"[]",
        b"7",
        b"null",
        b'"x"',
        b"{}",
        b"[" * 50_000,
        b'{"a":' * 50_000,
        b"\xff\xfe{}",
        b"nan",
        b"{" * 9,
    ]
    texts += [b'{"a": ' + b"9" * 5000 + b"}", b'{"__metadata__": {}}', b'{"a": {}}', b'{"a": []}', b'{"": null}']
    return change_shard(files, chance, lambda data: join(chance.choice(texts), split(data)[1]))


@mutation
def an_entry_of_another_kind(files: Files, chance: random.Random) -> Files:
    return change_header(files, chance, lambda v: v.update({a_tensor(v, chance): chance.choice([*NUMBERS, "x", [1]])}))


@mutation
def many_tensors_of_nothing(files: Files, chance: random.Random) -> Files:
    entry: dict[str, Any] = {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]}
    return change_header(files, chance, lambda v: v.update({f"t.{i}.qweight": entry for i in range(5000)}))


# --- the values of tensors ---


def change_values(files: Files, chance: random.Random, wanted: Callable[[str], bool], value: float) -> Files:
    """A few elements of one floating tensor, in place."""

    def change(data: bytes) -> bytes:
        head, body = split(data)
        kinds = {"F16": torch.float16, "F32": torch.float32, "BF16": torch.bfloat16}
        entries = {n: e for n, e in json.loads(head).items() if n != "__metadata__" and e["dtype"] in kinds}
        name = chance.choice(sorted(filter(wanted, entries)) or sorted(entries))
        start, stop = entries[name]["data_offsets"]
        values = torch.frombuffer(bytearray(body[start:stop]), dtype=kinds[entries[name]["dtype"]])
        for _ in range(chance.choice([1, 3])):
            values[chance.randrange(len(values))] = value
        return join(head, body[:start] + values.view(torch.uint8).numpy().tobytes() + body[stop:])

    good = [name for name in shards(files) if any(wanted(tensor) for tensor in _names(files, name))]
    return change_file(files, chance.choice(good or shards(files)), change)


def _names(files: Files, shard: str) -> list[str]:
    data = files[shard]
    assert isinstance(data, bytes)
    return list(json.loads(split(data)[0]))


def _is_scale(name: str) -> bool:
    return name.endswith(("scale", "scales"))


@mutation
def a_weight_not_finite(files: Files, chance: random.Random) -> Files:
    value = chance.choice([float("nan"), float("inf"), float("-inf")])
    return change_values(files, chance, lambda name: name.endswith((".weight", ".bias")), value)


@mutation
def a_scale_not_finite(files: Files, chance: random.Random) -> Files:
    return change_values(files, chance, _is_scale, chance.choice([float("nan"), float("inf"), float("-inf")]))


@mutation
def a_scale_of_zero(files: Files, chance: random.Random) -> Files:
    return change_values(files, chance, _is_scale, 0.0)


# --- config.json ---


@mutation
def a_value_of_the_config(files: Files, chance: random.Random) -> Files:
    """Any value of it, at any depth."""

    def change(values: dict[str, Any]) -> None:
        place: Any = values
        while True:
            key = chance.choice(sorted(place)) if isinstance(place, dict) else chance.randrange(len(place))
            if not isinstance(place[key], (dict, list)) or not place[key] or chance.random() < 0.2:
                break
            place = place[key]
        place[key] = chance.choice([*NUMBERS, "x" * 10_000, "../..", [None], [[]], {"a": {}}, "re:(a+)+$"])

    return change_json(files, "config.json", change)


@mutation
def a_key_of_the_config_gone(files: Files, chance: random.Random) -> Files:
    def change(values: dict[str, Any]) -> None:
        inner = values.get("quantization_config")
        place = inner if inner and chance.random() < 0.5 else values
        del place[chance.choice(sorted(place))]

    return change_json(files, "config.json", change)


@mutation
def a_bit_of_the_config(files: Files, chance: random.Random) -> Files:
    return change_file(files, "config.json", lambda data: flipped(data, chance, 0, len(data), chance.choice([1, 1, 3])))


@mutation
def a_config_of_another_kind(files: Files, chance: random.Random) -> Files:
    texts = [b"", b"{", b"[]", b"[1]", b"null", b"7", b'"x"', b"{}", b"\xff", b"[" * 100_000, b'{"a":' * 100_000]
    texts += [
        b'{"quantization_config": {}}',
        b'{"model_type": "llama"}',
        b'{"model_type": ["llama"]}',
        b"\xef\xbb\xbf{}",
    ]
    return files | {"config.json": chance.choice(texts)}


@mutation
def no_config(files: Files, chance: random.Random) -> Files:
    return {name: content for name, content in files.items() if name != "config.json"}


# --- what is in the folder ---


@mutation
def a_link(files: Files, chance: random.Random) -> Files:
    """Instead of a file: out of the folder, to a device, to itself, to nothing."""
    name = chance.choice([chance.choice(shards(files)), "config.json"])
    return files | {name: Path(chance.choice(["/etc/hostname", "/dev/zero", "/dev/null", name, "nowhere", "/", "."]))}


@mutation
def a_pipe(files: Files, chance: random.Random) -> Files:
    return files | {chance.choice([chance.choice(shards(files)), "config.json"]): None}


@mutation
def no_weights(files: Files, chance: random.Random) -> Files:
    gone = chance.choice(shards(files))
    return {name: content for name, content in files.items() if name != gone}


# --- the index ---

OUTSIDE: list[Any] = [
    "../dense/model.safetensors",
    "/etc/hostname",
    "..",
    ".",
    "",
    "/",
    "a/../model.safetensors",
    "./x",
]
OUTSIDE += ["x\0y", "x" * 300, "\ud800", "~/x", "file:///etc/passwd", "model.safetensors\n", 7, None, [], {}, True]


@sharded
def an_index_that_leads_out(files: Files, chance: random.Random) -> Files:
    def change(weight_map: dict[str, Any]) -> None:
        lie = chance.choice(OUTSIDE)
        every = chance.random() < 0.5
        weight_map.update(dict.fromkeys(weight_map if every else [chance.choice(sorted(weight_map))], lie))

    return change_index(files, change)


@sharded
def a_tensor_in_the_wrong_shard(files: Files, chance: random.Random) -> Files:
    def change(weight_map: dict[str, Any]) -> None:
        name = chance.choice(sorted(weight_map))
        weight_map[name] = chance.choice([shard for shard in shards(files) if shard != weight_map[name]])

    return change_index(files, change)


@sharded
def a_tensor_not_in_the_index(files: Files, chance: random.Random) -> Files:
    return change_index(files, lambda weight_map: weight_map.pop(chance.choice(sorted(weight_map))))


@sharded
def a_tensor_only_in_the_index(files: Files, chance: random.Random) -> Files:
    return change_index(files, lambda weight_map: weight_map.update(extra=chance.choice(shards(files))))


@sharded
def a_tensor_in_two_shards(files: Files, chance: random.Random) -> Files:
    """One shard's first tensor also in another, whole."""
    one, other = chance.sample(shards(files), 2)
    first, second = files[one], files[other]
    assert isinstance(first, bytes)
    assert isinstance(second, bytes)
    (head, body), (other_head, other_body) = split(first), split(second)
    name = a_tensor(json.loads(head), chance)
    entry = json.loads(head)[name]
    start, stop = entry["data_offsets"]
    again = entry | {"data_offsets": [len(other_body), len(other_body) + stop - start]}
    merged = json.loads(other_head) | {name: again}
    return files | {other: join(json.dumps(merged).encode(), other_body + body[start:stop])}


@sharded
def two_shards_exchanged(files: Files, chance: random.Random) -> Files:
    one, other = chance.sample(shards(files), 2)
    return files | {one: files[other], other: files[one]}


@sharded
def an_index_of_another_kind(files: Files, chance: random.Random) -> Files:
    texts = [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"weight_map": []}',
        b'{"weight_map": {}}',
        b'{"weight_map": 7}',
        b"[" * 100_000,
    ]
    texts += [b'{"weight_map": {"a": "b"}, "weight_map": {"a": "c"}}', b'{"weight_map": null}', b"\xff"]
    return files | {INDEX: chance.choice(texts)}


@sharded
def a_bit_of_the_index(files: Files, chance: random.Random) -> Files:
    return change_file(files, INDEX, lambda data: flipped(data, chance, 0, len(data), chance.choice([1, 1, 3])))


@sharded
def an_index_with_a_shard_linked_out(files: Files, chance: random.Random) -> Files:
    return files | {chance.choice(shards(files)): Path("../dense/model.safetensors")}
