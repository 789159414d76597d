"""`wq verify`: what is whole is called good, and every damage is found and named."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import ALL
from torch import Tensor

from wq import manifest, quantize
from wq.checkpoint import _PIECE, INDEX, SINGLE, Entry, ShardWriter, Spec, pieces
from wq.convert import convert
from wq.errors import CheckpointError, UnknownNameError, WqError
from wq.verify import verify
from wq_kernels import stream

TinyModel = Callable[..., Path]
Packed = Callable[..., Path]
FORMATS = ("compressed-tensors", "gptq", "awq")
Q = "model.layers.1.self_attn.q_proj"
CODES = {"compressed-tensors": "weight_packed", "gptq": "qweight", "awq": "qweight"}
SCALES = {"compressed-tensors": "weight_scale", "gptq": "scales", "awq": "scales"}


@pytest.fixture(scope="module")
def packed(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    """A tiny checkpoint with a manifest, made once."""
    made: dict[Any, Path] = {}

    def get(format: str, architecture: str = "llama", **options: Any) -> Path:
        key = (format, architecture, *sorted(options.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("packed") / "out"
            options = {"method": "rtn", "group_size": 32, "dtype": "float16", **options}
            quantize(tiny_model(architecture), made[key], format=format, **options)
            manifest.write(made[key])
        return made[key]

    return get


def tensors(change: Callable[[dict[str, Tensor], str], Any]) -> Callable[[Path, str], None]:
    """A damage that rewrites the file with other tensors; the manifest is as new, so that it is not what notices."""

    def damage(folder: Path, format: str) -> None:
        values = load_file(folder / SINGLE)
        change(values, format)
        save_file({name: tensor.contiguous() for name, tensor in values.items()}, folder / SINGLE, {"format": "pt"})

    return renewed(damage)


def config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path, str], None]:
    """A damage to config.json."""

    def damage(folder: Path, format: str) -> None:
        values = json.loads((folder / "config.json").read_text())
        change(values)
        (folder / "config.json").write_text(json.dumps(values))

    return renewed(damage)


def said(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path, str], None]:
    """A damage to the `quantization_config`."""
    return config(lambda values: change(values["quantization_config"]))


def index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path, str], None]:
    """A damage to the index of a sharded checkpoint."""

    def damage(folder: Path, format: str) -> None:
        values = json.loads((folder / INDEX).read_text())
        change(values)
        (folder / INDEX).write_text(json.dumps(values))

    return sharded(damage)


def sharded(damage: Callable[[Path, str], Any]) -> Callable[[Path, str], None]:
    """A damage to a checkpoint of several files."""

    def split(folder: Path, format: str) -> None:
        values = load_file(folder / SINGLE)
        (folder / SINGLE).unlink()
        specs = {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in values.items()}
        with ShardWriter(folder, specs, 60_000) as writer:
            for name, tensor in values.items():
                writer.write(name, tensor)
        damage(folder, format)

    return renewed(split)


def renewed(damage: Callable[[Path, str], Any]) -> Callable[[Path, str], None]:
    def both(folder: Path, format: str) -> None:
        damage(folder, format)
        manifest.write(folder)

    return both


def written(name: str, content: str | bytes) -> Callable[[Path, str], None]:
    def damage(folder: Path, format: str) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


def header(change: Callable[[dict[str, Any]], Any] | None = None, text: Callable[[bytes], bytes] | None = None) -> Any:
    """A damage to the header of the safetensors file."""

    def damage(folder: Path, format: str) -> None:
        data = (folder / SINGLE).read_bytes()
        length = int.from_bytes(data[:8], "little")
        head = data[8 : 8 + length]
        if change is not None:
            values = json.loads(head)
            change(values)
            head = json.dumps(values).encode()
        if text is not None:
            head = text(head)
        (folder / SINGLE).write_bytes(len(head).to_bytes(8, "little") + head + data[8 + length :])

    return renewed(damage)


def flip(name: str, place: float) -> Callable[[Path, str], None]:
    """One bit of a file."""

    def damage(folder: Path, format: str) -> None:
        data = bytearray((folder / name).read_bytes())
        data[int(place * len(data))] ^= 16
        (folder / name).write_bytes(bytes(data))

    return damage


def set_to(leaves: dict[str, str], value: Callable[[Tensor], Tensor]) -> Callable[[Path, str], None]:
    """A damage to one tensor of q_proj."""

    def change(values: dict[str, Tensor], format: str) -> None:
        name = f"{Q}.{leaves[format]}"
        values[name] = value(values[name])

    return tensors(change)


def put(tensor: Tensor, value: float) -> Tensor:
    tensor.view(-1)[7] = value
    return tensor


def shard(folder: Path, number: int) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[number]


def copy_a_tensor(folder: Path, format: str) -> None:
    """The first tensor of the first shard also in the second."""
    first, second = load_file(shard(folder, 0)), load_file(shard(folder, 1))
    name = min(first)
    save_file(second | {name: first[name]}, shard(folder, 1))


def drop_a_tensor(folder: Path, format: str) -> None:
    values = load_file(shard(folder, 0))
    values.pop(min(values))
    save_file(values, shard(folder, 0))


def one_in_group_9(t: dict[str, Tensor], f: str) -> None:
    t[f"{Q}.g_idx"][5] = 9


def one_more_in_group_0(t: dict[str, Tensor], f: str) -> None:
    t[f"{Q}.g_idx"][40] = 0


def zero_points_of_0(t: dict[str, Tensor], f: str) -> None:
    t[f"{Q}.qzeros"] = t[f"{Q}.qzeros"] * 0 + 0x11111111


BOMB = r"re:(a+)+$"
ONLY_CT, ONLY_GPTQ, ONLY_AWQ = ("compressed-tensors",), ("gptq",), ("awq",)
Damage = tuple[tuple[str, ...], Callable[[Path, str], None], str, str]

# The formats, the damage, and what a problem must say: where, and what.
DAMAGES: dict[str, Damage] = {
    # config.json
    "no config": (FORMATS, lambda f, _: (f / "config.json").unlink(), "config.json", "is missing"),
    "config cut": (FORMATS, renewed(written("config.json", "{")), "config.json", "is not JSON"),
    "config a list": (FORMATS, renewed(written("config.json", "[1]")), "config.json", "is no JSON object"),
    "config in latin-1": (FORMATS, renewed(written("config.json", b'{"a": "\xe4"}')), "config.json", "is not JSON"),
    "config deep": (FORMATS, renewed(written("config.json", "[" * 100_000)), "config.json", "is not JSON"),
    "key twice": (FORMATS, renewed(written("config.json", '{"a": 1, "a": 2}')), "config.json", "understands alike"),
    "not quantized": (FORMATS, config(lambda c: c.pop("quantization_config")), "config.json", "no quantization_config"),
    "config of a list": (FORMATS, config(lambda c: c.update(quantization_config=[])),
                         "config.json", "no quantization_"),
    "unknown method": (FORMATS, said(lambda s: s.update(quant_method="magic")), "config.json", "quant_method"),
    "unknown layout": (ONLY_CT, said(lambda s: s.update(format="marlin-24")), "config.json", "layout"),
    "a million layers": (FORMATS, config(lambda c: c.update(num_hidden_layers=10**6)), "config.json", "num_hidden_lay"),
    "three layers": (FORMATS, config(lambda c: c.update(num_hidden_layers=3)), "model.layers.2.", "is missing"),
    "one layer": (FORMATS, config(lambda c: c.update(num_hidden_layers=1)), "model.layers.1.", "is unknown to"),
    "wider": (FORMATS, config(lambda c: c.update(hidden_size=128)), "model.norm.weight", r"is \[64\].*\[128\]"),
    "no heads": (FORMATS, config(lambda c: c.update(num_attention_heads=0)), "config.json", "describes no model"),
    "unknown model": (FORMATS, config(lambda c: c.update(model_type="yeti")), "config.json", "describes no model"),
    # files
    "no weights": (FORMATS, renewed(lambda f, _: (f / SINGLE).unlink()), ".", "has neither"),
    "weights cut": (FORMATS, renewed(lambda f, _: _cut(f / SINGLE, 1000)), SINGLE, "The file is damaged"),
    "weights empty": (FORMATS, renewed(written(SINGLE, b"")), SINGLE, "not a safetensors file"),
    "weights random": (FORMATS, renewed(written(SINGLE, random.Random(0).randbytes(9999))),
                       SINGLE, "not a safetensors"),
    "tail": (FORMATS, renewed(lambda f, _: _append(f / SINGLE, b"x" * 5)), SINGLE, "belong to no tensor"),
    "shape lies": (FORMATS, header(lambda h: h["model.norm.weight"].update(shape=[65])),
                   SINGLE, r"model.norm.weight cl"),
    "dtype lies": (FORMATS, header(lambda h: h["model.norm.weight"].update(dtype="F99")), SINGLE, "cannot be read"),
    "overlap": (FORMATS, header(lambda h: h.update(again=h["model.norm.weight"])), SINGLE, "claim the same bytes"),
    "tensor twice": (FORMATS, header(text=lambda t: t.rstrip()[:-1] + b"," + _entry(t)),
                     SINGLE, "is there twice"),
    "stray shard": (FORMATS, renewed(lambda f, _: shutil.copy(f / SINGLE, f / "b.safetensors")),
                    "b.safetensors", "no ind"),
    # the index
    "shard missing": (FORMATS, sharded(lambda f, _: shard(f, 1).unlink()), "model-00002-of", "is missing"),
    "shard cut": (FORMATS, sharded(lambda f, _: _cut(shard(f, 1), 64)), "model-00002-of", "The file is damaged"),
    "index cut": (FORMATS, sharded(lambda f, _: (f / INDEX).write_text("{")), INDEX, "is not JSON"),
    "index empty": (FORMATS, index(lambda i: i.pop("weight_map")), INDEX, "has no weight_map"),
    "index leads out": (FORMATS, index(lambda i: _all(i, "../b.safetensors")),
                        "lm_head.weight", "outside of the folder"),
    "index of numbers": (FORMATS, index(lambda i: _all(i, 3)), "lm_head.weight", "outside of the folder"),
    "total lies": (FORMATS, index(lambda i: i["metadata"].update(total_size=7)), INDEX, "another total_size"),
    "one not indexed": (FORMATS, index(lambda i: i["weight_map"].pop("model.norm.weight")),
                        "model.norm.weight", "is not in mod"),
    "one too many": (FORMATS, index(lambda i: i["weight_map"].update(x=_any(i))), "x", "is not in the shard"),
    "wrong shard": (FORMATS, index(lambda i: _move(i, "model.norm.weight")),
                    "model.norm.weight", "is in another shard"),
    "in two shards": (FORMATS, sharded(copy_a_tensor), "", "is in two shards"),
    "in no shard": (FORMATS, sharded(drop_a_tensor), "", "is not in the shard where"),
    # the manifest
    "codes flipped": (FORMATS, flip(SINGLE, 0.9), SINGLE, "is not what was written"),
    "tokenizer changed": (FORMATS, flip("tokenizer.json", 0.5), "tokenizer.json", "is not what was written"),
    "file shorter": (FORMATS, lambda f, _: _cut(f / "tokenizer.json", 9), "tokenizer.json", "another size"),
    "file gone": (FORMATS, lambda f, _: (f / "tokenizer.json").unlink(), "tokenizer.json", "not in the folder"),
    "manifest cut": (FORMATS, written(manifest.MANIFEST, "{"), manifest.MANIFEST, "is not JSON"),
    "manifest leads out": (FORMATS, written(manifest.MANIFEST, json.dumps({"version": 1, "files": {"../x": {}}})),
                           manifest.MANIFEST, "plain file names"),
    "manifest of tomorrow": (FORMATS, written(manifest.MANIFEST, '{"version": 2}'), manifest.MANIFEST, "version 1"),
    # tensors against the architecture
    "norm missing": (FORMATS, tensors(lambda t, f: t.pop("model.norm.weight")), "model.norm.weight", "is missing"),
    "extra tensor": (FORMATS, tensors(lambda t, f: t.update(extra=torch.ones(2))), "extra", "is unknown to"),
    "norm too long": (FORMATS, tensors(lambda t, f: t.update({"model.norm.weight": torch.ones(65)})),
                      "model.norm.weight", r"is \[65\].*\[64\]"),
    "both": (FORMATS, tensors(lambda t, f: t.update({f"{Q}.weight": torch.ones(64, 64)})), Q, "both packed and dense"),
    "norm packed": (FORMATS, tensors(lambda t, f: _move_layer(t, Q, "model.norm")), "model.norm", "no linear layer"),
    "nothing packed": (FORMATS, tensors(lambda t, f: [t.pop(n) for n in list(t) if "_proj" in n]), Q, "is missing"),
    # packed layers
    "no codes": (FORMATS, tensors(lambda t, f: t.pop(f"{Q}.{CODES[f]}")), Q, "is missing"),
    "no scales": (FORMATS, tensors(lambda t, f: t.pop(f"{Q}.{SCALES[f]}")), Q, "is missing|not 2-D"),
    "codes of int64": (FORMATS, set_to(CODES, lambda t: t.long()), Q, "is torch.int64"),
    "codes short": (FORMATS, set_to(CODES, lambda t: t[:-1]), Q, "must be|bits for"),
    "scales of int32": (FORMATS, set_to(SCALES, lambda t: t.int()), Q, "is torch.int32"),
    "scales flat": (FORMATS, set_to(SCALES, lambda t: t.flatten()), Q, "must be|groups"),
    "scales of other groups": (FORMATS, set_to(SCALES, lambda t: torch.cat([t, t], 0 if t.shape[0] == 2 else 1)),
                               Q, "group|must be"),
    "shape lies inside": (ONLY_CT, tensors(lambda t, f: t[f"{Q}.weight_shape"].copy_(torch.tensor([64, 128]))),
                          Q, "weight_"),
    "zero points missing": (("gptq", "awq"), tensors(lambda t, f: t.pop(f"{Q}.qzeros")), Q, "qzeros is missing"),
    "zero points short": (("gptq", "awq"), tensors(lambda t, f: t.update({f"{Q}.qzeros": t[f"{Q}.qzeros"][:1]})),
                          Q, "must be"),
    "zero points not said": (ONLY_CT, said(lambda s: _weights(s).update(symmetric=False)),
                             Q, "weight_zero_point is missing"),
    "group too high": (ONLY_GPTQ, tensors(one_in_group_9), Q, "column 5 is in group 9"),
    "groups unequal": (ONLY_GPTQ, tensors(one_more_in_group_0), Q, "every group must have"),
    # values
    "scale NaN": (FORMATS, set_to(SCALES, lambda t: put(t, float("nan"))), f"{Q}.", "not finite"),
    "scale infinite": (FORMATS, set_to(SCALES, lambda t: put(t, float("inf"))), f"{Q}.", "not finite"),
    "scale zero": (FORMATS, set_to(SCALES, lambda t: put(t, 0)), f"{Q}.", "scales of zero"),
    "norm NaN": (FORMATS, tensors(lambda t, f: put(t["model.norm.weight"], float("nan"))),
                 "model.norm.w", "not finite"),
    "embedding infinite": (FORMATS, tensors(lambda t, f: put(t["model.embed_tokens.weight"], float("-inf"))),
                           "model.embed_tokens.weight", "not finite"),
    "zero points in a symmetric grid": (("gptq",), tensors(zero_points_of_0), Q, "config says symmetric"),
    # config against tensors
    "other bits": (("gptq", "awq"), said(lambda s: s.update(bits=3)), Q, "bits 4; config.json says"),
    "other bits, by group": (ONLY_CT, said(lambda s: _weights(s).update(num_bits=3)), Q, "bits for each of"),
    "other groups": (("gptq", "awq"), said(lambda s: s.update(group_size=16)), Q, "groups of 32; config.json says"),
    "other groups, by group": (ONLY_CT, said(lambda s: _weights(s).update(group_size=16)), Q, "groups of 32; config"),
    "one scale a row": (ONLY_CT, said(lambda s: _weights(s).update(strategy="channel", group_size=None)),
                        Q, "scale a row"),
    "packed left out": (ONLY_CT, said(lambda s: s["ignore"].append(Q)), Q, "the config leaves it out"),
    "packed left out by pattern": (ONLY_CT, said(lambda s: s["ignore"].append("re:.*q_proj")), Q, "leaves it out"),
    "packed left out, gptq": (ONLY_GPTQ, said(lambda s: s.update(dynamic={f"-:{Q}": {}})), Q, "leaves it out"),
    "packed left out, awq": (ONLY_AWQ, said(lambda s: s["modules_to_not_convert"].append("q_proj")),
                             Q, "leaves it out"),
    "dense not left out": (ONLY_CT, said(lambda s: s.update(ignore=[])), "lm_head", "does not leave it out"),
    "pattern that hangs": (ONLY_CT, said(lambda s: s["ignore"].append(BOMB)), "config.json, ignore", "exponential"),
    "target that hangs": (ONLY_CT, said(lambda s: s["config_groups"]["group_0"]["targets"].append(BOMB)),
                          "config.json, group_0", "exponential"),
    "rule that hangs": (ONLY_GPTQ, said(lambda s: s.update(dynamic={"-:(a|a)+b": {}})),
                        "config.json, dyn", "exponential"),
    "pattern broken": (ONLY_CT, said(lambda s: s["ignore"].append("re:(")), "config.json, ignore", "no regular expr"),
    "columns sorted by another": (ONLY_GPTQ, said(lambda s: s.update(checkpoint_format="marlin")), Q, "marlin"),
    "awq of another layout": (ONLY_AWQ, said(lambda s: s.update(version="marlin")), Q, "marlin"),
}  # fmt: skip
CASES = [(case, format) for case in DAMAGES for format in DAMAGES[case][0]]


def _cut(file: Path, count: int) -> None:
    file.write_bytes(file.read_bytes()[:-count])


def _append(file: Path, data: bytes) -> None:
    file.write_bytes(file.read_bytes() + data)


def _entry(head: bytes) -> bytes:
    """Another header entry of the norm, for the end of a header."""
    again = json.dumps({"model.norm.weight": json.loads(head)["model.norm.weight"]}).encode()
    return again[1:]


def _all(index: dict[str, Any], shard: Any) -> None:
    index["weight_map"] = dict.fromkeys(index["weight_map"], shard)


def _any(index: dict[str, Any]) -> str:
    return str(next(iter(index["weight_map"].values())))


def _move(index: dict[str, Any], name: str) -> None:
    index["weight_map"][name] = next(s for s in index["weight_map"].values() if s != index["weight_map"][name])


def _move_layer(values: dict[str, Tensor], layer: str, to: str) -> None:
    for name in [name for name in values if name.startswith(f"{layer}.")]:
        values[name.replace(layer, to)] = values[name].clone()


def _weights(said: dict[str, Any]) -> dict[str, Any]:
    weights: dict[str, Any] = said["config_groups"]["group_0"]["weights"]
    return weights


def damaged(packed: Packed, format: str, damage: Callable[[Path, str], None], place: Path, **options: Any) -> Path:
    folder = place / "damaged"
    shutil.copytree(packed(format, **options), folder)
    damage(folder, format)
    return folder


def named(found: list[dict[str, str]], where: str, what: str) -> bool:
    return any(one["where"].startswith(where) and re.search(what, one["problem"] + one["measured"]) for one in found)


def test_there_are_enough_ways_to_damage_a_checkpoint() -> None:
    assert len(DAMAGES) >= 80
    assert len(CASES) >= 180


@pytest.mark.parametrize(("case", "format"), CASES)
def test_damage_is_found_and_named(case: str, format: str, packed: Packed, tmp_path: Path) -> None:
    _, damage, where, what = DAMAGES[case]
    folder = damaged(packed, format, damage, tmp_path)
    report = verify(folder)
    assert not report["good"]
    assert named(report["problems"], str(folder) if where == "." else where, what), report["problems"]
    assert all(one["problem"] and one["hint"] for one in report["problems"])
    assert not any(verdict["takes"] for verdict in report["loaders"])
    json.dumps(report)


def test_all_problems_are_listed_and_not_the_first_alone(packed: Packed, tmp_path: Path) -> None:
    up, down = "model.layers.0.mlp.up_proj.weight_scale", "model.layers.0.mlp.down_proj"

    def damage(values: dict[str, Tensor], format: str) -> None:
        values[up][0, 0] = float("nan")
        values[f"{down}.weight_packed"] = values[f"{down}.weight_packed"].long()
        del values["model.norm.weight"]
        values["extra"] = torch.ones(2)

    folder = damaged(packed, "compressed-tensors", tensors(damage), tmp_path)
    (folder / "tokenizer.json").write_text("{}")
    found = verify(folder)["problems"]
    assert sorted(one["where"] for one in found) == sorted([up, down, "model.norm.weight", "extra", "tokenizer.json"])


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("format", FORMATS)
def test_what_wq_writes_is_good(format: str, symmetric: bool, packed: Packed) -> None:
    report = verify(packed(format, symmetric=symmetric))
    assert report["good"], report["problems"]
    assert not report["warnings"]
    assert (report["layers"], report["sha256"]) == (14, len(manifest.names(packed(format, symmetric=symmetric))))


@pytest.mark.parametrize("architecture", ALL)
def test_every_architecture_is_matched_with_its_tensors(architecture: str, packed: Packed) -> None:
    report = verify(packed("compressed-tensors", architecture, group_size=-1))
    assert report["good"], report["problems"]
    assert report["layers"] > 0


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_other_widths_are_good_too(bits: int, packed: Packed) -> None:
    assert verify(packed("compressed-tensors", bits=bits, symmetric=False))["good"]
    assert verify(packed("gptq", bits=bits))["good"]


def test_a_sharded_checkpoint_is_good(packed: Packed, tmp_path: Path) -> None:
    folder = damaged(packed, "gptq", sharded(lambda f, _: None), tmp_path)
    assert len(list(folder.glob("*.safetensors"))) > 2
    report = verify(folder)
    assert report["good"], report["problems"]


def test_a_converted_checkpoint_is_good_and_has_a_manifest_of_its_own(packed: Packed, tmp_path: Path) -> None:
    convert(packed("compressed-tensors"), tmp_path / "out", to="gptq")
    files = manifest.read(tmp_path / "out")
    assert files is not None
    assert files.keys() == set(manifest.names(tmp_path / "out"))
    report = verify(tmp_path / "out")
    assert report["good"], report["problems"]
    assert report["sha256"] == len(files)


EXPERT = "model.layers.0.block_sparse_moe.experts.2.w1"


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("leaf", "change", "where", "what"),
    [
        ("", lambda t, n: [t.pop(name) for name in list(t) if name.startswith(n)], "model.layers.0.mlp", "expert 2"),
        ("scales", lambda t, n: t.update({n: t[n] * float("nan")}), EXPERT, "not finite"),
        ("codes", lambda t, n: t.update({n: t[n][:-1]}), EXPERT, "must be|bits for|rows"),
    ],
    ids=["missing", "NaN", "short"],
)
def test_damage_inside_of_experts_is_found(
    format: str, leaf: str, change: Any, where: str, what: str, packed: Packed, tmp_path: Path
) -> None:
    name = f"{EXPERT}." + {"": "", "scales": SCALES[format], "codes": CODES[format]}[leaf]
    damage = tensors(lambda t, f: change(t, name))
    found = verify(damaged(packed, format, damage, tmp_path, architecture="mixtral"))["problems"]
    assert named(found, where, what), found


def test_damage_inside_of_three_dimensional_experts_is_found(packed: Packed, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    for number, (change, where, what) in enumerate(
        [
            (lambda t, f: t.update({f"{name}_scale": t[f"{name}_scale"] * 0}), f"{name}_scale", "scales of zero"),
            (lambda t, f: t.pop(f"{name}_scale"), name, "scales are missing"),
            (lambda t, f: t.update({f"{name}_packed": t[f"{name}_packed"][:3]}), name, "is for 3 experts"),
        ]
    ):
        place = tmp_path / str(number)
        place.mkdir()
        folder = damaged(packed, "compressed-tensors", tensors(change), place, architecture="gpt_oss")
        assert named(verify(folder)["problems"], where, what), verify(folder)["problems"]


WARNINGS: dict[str, tuple[Callable[[Path, str], Any], str, str]] = {
    "no manifest": (lambda f, _: (f / manifest.MANIFEST).unlink(), manifest.MANIFEST, "is missing"),
    "no tokenizer": (renewed(lambda f, _: (f / "tokenizer.json").unlink()), "tokenizer", "there is none"),
    "a pickle": (renewed(written("pytorch_model.bin", b"x")), "pytorch_model.bin", "may be a pickle"),
    "a link that leads out": (renewed(lambda f, _: (f / "x.json").symlink_to("/etc/hostname")), "x.json", "leads out"),
    "a file added": (written("notes.txt", "x"), "notes.txt", "was added later"),
    "an index too many": (renewed(written(INDEX, "{}")), INDEX, "is not looked at"),
    "code of its own": (config(lambda c: c.update(auto_map={"AutoModel": "x.Y"})), "config.json", "which is not run"),
}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("case", WARNINGS)
def test_what_is_only_worth_knowing_is_a_warning(case: str, format: str, packed: Packed, tmp_path: Path) -> None:
    damage, where, what = WARNINGS[case]
    report = verify(damaged(packed, format, damage, tmp_path))
    assert report["good"], report["problems"]
    assert named(report["warnings"], where, what), report["warnings"]


def test_dense_layers_that_gptq_and_awq_do_not_name_are_a_warning(packed: Packed, tmp_path: Path) -> None:
    for format, key in (("gptq", "dynamic"), ("awq", "modules_to_not_convert")):
        damage = said(lambda s, key=key: s.pop(key, None))
        (tmp_path / format).mkdir()
        folder = damaged(packed, format, damage, tmp_path / format, keep=("o_proj",))
        report = verify(folder)
        assert report["good"], report["problems"]
        assert named(report["warnings"], "model.layers.0.self_attn.o_proj", "does not leave it out")


def test_zero_points_that_version_1_cannot_say_are_a_warning(packed: Packed, tmp_path: Path) -> None:
    def stored_as_all_ones(folder: Path, format: str) -> None:
        values = load_file(folder / SINGLE)
        for name in [name for name in values if name.endswith("qzeros")]:
            values[name] = torch.full_like(values[name], -1)
        save_file(values, folder / SINGLE)

    folder = damaged(packed, "gptq", renewed(stored_as_all_ones), tmp_path)
    said(lambda s: s.update(sym=False))(folder, "gptq")
    report = verify(folder)
    assert named(report["warnings"], f"{Q}.qzeros", "disagree about")


def test_the_card_and_the_report_may_change(packed: Packed, tmp_path: Path) -> None:
    folder = damaged(packed, "awq", lambda f, _: None, tmp_path)
    for name in ("README.md", "wq_report.json"):
        (folder / name).write_text("{}")
    report = verify(folder)
    assert report["good"]
    assert not report["warnings"]


def test_every_flipped_bit_of_every_file_is_noticed(packed: Packed, tmp_path: Path) -> None:
    folder = damaged(packed, "compressed-tensors", lambda f, _: None, tmp_path)
    chance = random.Random(0)
    for file in [folder / name for name in manifest.names(folder)]:
        data = file.read_bytes()
        for _ in range(10):
            changed = bytearray(data)
            changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            file.write_bytes(bytes(changed))
            assert not verify(folder)["good"]
        file.write_bytes(data)
    assert verify(folder)["good"]


@pytest.mark.parametrize("name", [SINGLE, "config.json", manifest.MANIFEST])
def test_whatever_a_file_holds_the_answer_is_a_report(name: str, packed: Packed, tmp_path: Path) -> None:
    folder = damaged(packed, "compressed-tensors", lambda f, _: None, tmp_path)
    data = (folder / name).read_bytes()
    chance = random.Random(1)
    for _ in range(40):
        changed = bytearray(data)
        for _ in range(chance.choice([1, 3, 30])):
            changed[chance.randrange(min(len(data), 6000))] = chance.randrange(256)
        (folder / name).write_bytes(bytes(changed[: chance.choice([len(data), chance.randrange(len(data))])]))
        try:
            json.dumps(verify(folder))
        except WqError as error:
            pytest.fail(f"{error}")


VALUES: list[Any] = [
    None,
    -1,
    0,
    10**9,
    2**63,
    "4",
    "",
    [],
    {},
    [None],
    {"a": {}},
    True,
    float("nan"),
    "re:" + "(" * 50,
]


@pytest.mark.parametrize("format", FORMATS)
def test_whatever_the_config_says_the_answer_is_a_report(format: str, packed: Packed, tmp_path: Path) -> None:
    folder = damaged(packed, format, lambda f, _: None, tmp_path)
    before = json.loads((folder / "config.json").read_text())
    keys = [("quantization_config", key) for key in before["quantization_config"]]
    if format == "compressed-tensors":
        keys += [("quantization_config", "config_groups", "group_0")]
        keys += [(*keys[-1], key) for key in ("targets", "weights")]
        keys += [(*keys[-1], key) for key in ("num_bits", "group_size", "symmetric", "strategy", "actorder")]
    for path in keys:
        for value in VALUES:
            values = json.loads(json.dumps(before))
            place = values
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = value
            (folder / "config.json").write_text(json.dumps(values))
            json.dumps(verify(folder))


def test_large_tensors_are_looked_at_in_pieces(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(bytes(3 * _PIECE + 8))
    entry = Entry(torch.float16, (3 * _PIECE // 2 + 4,), file, 0, 3 * _PIECE + 8)
    sizes = [piece.numel() * 2 for piece in pieces(entry)]
    assert sizes == [_PIECE, _PIECE, _PIECE, 8]


def test_act_order_is_good(packed: Packed, tmp_path: Path) -> None:
    def permute(values: dict[str, Tensor], format: str) -> None:
        order = torch.randperm(64)
        codes = stream.unpack(values[f"{Q}.qweight"].t().contiguous(), 4, 64)[:, order]
        values[f"{Q}.qweight"] = stream.pack(codes.contiguous(), 4).t().contiguous()
        values[f"{Q}.g_idx"] = values[f"{Q}.g_idx"][order]

    folder = damaged(packed, "gptq", tensors(permute), tmp_path)
    report = verify(folder)
    assert report["good"], report["problems"]
    assert [v["takes"] for v in report["loaders"] if v["loader"] == "vllm"] == [False]


# --- the command ---


def wq(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "wq", *map(str, arguments)], capture_output=True, text=True)


def test_the_command_says_good_and_who_loads_it(packed: Packed) -> None:
    folder = packed("compressed-tensors")
    done = wq("verify", folder)
    assert done.returncode == 0, done.stderr
    assert f"{folder}: good (14 packed layers" in done.stdout
    for loader in ("transformers 5.24", "vllm 0.33.0", "sglang 0.5.23"):
        assert loader in done.stdout
    report = json.loads(wq("verify", folder, "--for", "vllm", "--json").stdout)
    assert [verdict["takes"] for verdict in report["loaders"]] == [True]


def test_the_command_has_a_line_for_each_problem_and_exit_code_1(packed: Packed, tmp_path: Path) -> None:
    folder = damaged(packed, "gptq", DAMAGES["scale NaN"][1], tmp_path)
    done = wq("verify", folder)
    assert done.returncode == 1
    assert f"✗ {Q}.scales: has values that are not finite (1 of 128, the first at 7). Download it again" in done.stdout
    assert "Traceback" not in done.stderr


def test_what_a_loader_refuses_is_a_problem_when_it_is_asked_for(packed: Packed) -> None:
    folder = packed("gptq", symmetric=False)
    assert wq("verify", folder).returncode == 0
    done = wq("verify", folder, "--for", "vllm", "--json")
    assert done.returncode == 1
    (problem,) = json.loads(done.stdout)["problems"]
    assert problem["problem"] == "vLLM takes gptq of 4 or 8 bits, symmetric"
    assert problem["measured"] == "bits 4, sym False"


def test_what_cannot_be_looked_at_is_exit_code_2(packed: Packed, tmp_path: Path) -> None:
    done = wq("verify", tmp_path / "nowhere")
    assert done.returncode == 2
    assert "is no folder" in done.stderr
    done = wq("verify", packed("awq"), "--for", "llama.cpp")
    assert done.returncode == 2
    assert "loader 'llama.cpp' is unknown. Use transformers, vllm, sglang." in done.stderr
    with pytest.raises(CheckpointError, match="is no folder"):
        verify(packed("awq") / "config.json")
    with pytest.raises(UnknownNameError):
        verify(packed("awq"), "llama.cpp")
