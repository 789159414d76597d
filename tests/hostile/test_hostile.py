"""Damaged and hostile folders through every door: refused with a `WqError`, found by `wq verify`, or read as they are.

A few hundred of each kind, from numbers; `scripts/hostile.py` tries ten thousand, with limits of time and memory.
"""

from __future__ import annotations

import json
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bases
import configs
import layers
import mutations
import pytest
from doors import Outcome, through_load, through_source, through_verify
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from wq import WqConfig
from wq.checkpoint import SINGLE
from wq.errors import CheckpointError, WqError

NAMES = (bases.DENSE, *bases.FORMATS, *(f"{name} sharded" for name in (bases.DENSE, *bases.FORMATS)))


@pytest.fixture(scope="module")
def made(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return bases.make(lambda: tiny_model("llama", num_hidden_layers=1), tmp_path_factory.mktemp("bases"))


@pytest.mark.parametrize("name", NAMES)
def test_whatever_is_done_to_a_folder_wq_says_what_is_wrong(
    name: str, made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, reference = mutations.read(made[name]), bases.state(name, made[name])
    count: Counter[str] = Counter()
    for number in range(NAMES.index(name) % 2, len(mutations.MUTATIONS), 2):
        damaged = mutations.mutate(number, whole)
        mutations.write(damaged.files, tmp_path / "folder", damaged.renewed)
        doors = [through_source] if name.startswith(bases.DENSE) else [through_verify, through_load]
        for door in doors:
            outcome = door(tmp_path / "folder", *([] if door is through_verify else [reference]))
            assert outcome.kind != "escaped", f"{door.__name__} of {name} {number} ({damaged.name}): {outcome.said}"
            if door is through_verify and damaged.name in mutations.PAYLOAD:
                assert outcome.kind == "found", f"{name} {number} ({damaged.name})"
            count[f"{door.__name__} {outcome.kind}"] += 1
    with capsys.disabled():
        print(f"\n{name}: {dict(sorted(count.items()))}", end="")


def test_a_mutation_is_a_function_of_its_number(made: dict[str, Path]) -> None:
    whole = mutations.read(made["gptq sharded"])
    for number in range(len(mutations.MUTATIONS)):
        one, again = (mutations.mutate(number, whole) for _ in range(2))
        assert one == again
    assert whole == mutations.read(made["gptq sharded"])


def test_most_mutations_change_something(made: dict[str, Path]) -> None:
    whole = mutations.read(made["awq sharded"])
    same = [n for n in range(len(mutations.MUTATIONS)) if mutations.mutate(n, whole).files == whole]
    assert len(same) <= 3
    assert len(mutations.MUTATIONS) >= 40


def configured(case: configs.Case, made: dict[str, Path], place: Path) -> Path:
    files = mutations.read(made[case.format])
    return_to = place / "folder"
    mutations.write(mutations.change_json(files, "config.json", case.change), return_to)
    return return_to


QUANTIZATION, MODELS = configs.of_quantization(), configs.of_models()


def test_there_are_enough_hostile_configs_and_layers() -> None:
    assert len(QUANTIZATION) >= 200
    assert all(sum(case.format == format for case in layers.cases()) >= 300 for format in layers.FORMATS)


@pytest.mark.parametrize("part", range(2))
def test_a_hostile_config_is_refused_or_changes_nothing(
    part: int, made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    references = {format: bases.state(format, made[format]) for format in configs.FORMATS}
    chosen = [case for case in QUANTIZATION if "million" not in case.name][part::8]
    chosen += [case for case in QUANTIZATION if "million" in case.name][part::2]
    count: Counter[str] = Counter()
    for case in chosen:
        folder = configured(case, made, tmp_path)
        report, loaded = through_verify(folder), through_load(folder, references[case.format])
        assert report.kind in ("found", "good"), f"{case.name}: {report}"
        assert loaded.kind in ("refused", "equal"), f"{case.name}: {loaded}"
        count[loaded.kind] += 1
    with capsys.disabled():
        print(f"\n{len(chosen)} configs: {dict(count)}", end="")


def test_a_hostile_config_of_the_model_is_refused_or_describes_one(made: dict[str, Path], tmp_path: Path) -> None:
    for case in MODELS[::7]:
        folder = configured(case, made, tmp_path)
        for outcome in (through_verify(folder), through_load(folder)):
            assert outcome.kind != "escaped", f"{case.name}: {outcome.said}"


@pytest.mark.parametrize("format", layers.FORMATS)
def test_tensors_of_a_layer_that_cannot_be_are_refused_by_its_name_before_a_module_is_made(
    format: str, made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = [case for case in layers.cases() if case.format == format][::11]
    for case in chosen:
        tensors = load_file(made[format] / SINGLE)
        case.change(tensors, case.layer)
        folder = tmp_path / "folder"
        mutations.write({k: v for k, v in mutations.read(made[format]).items() if k != SINGLE}, folder)
        save_file(tensors, folder / SINGLE, {"format": "pt"})
        with pytest.raises(WqError, match=case.layer) as refusal:
            AutoModelForCausalLM.from_pretrained(folder, quantization_config=WqConfig())
        passed = [frame.name for frame in traceback.extract_tb(refusal.value.__traceback__)]
        assert "inspect" in passed, f"{case.name}: {passed[-3:]}"  # it decides what is made, from headers
        assert through_verify(folder).kind == "found", case.name
    with capsys.disabled():
        print(f"\n{len(chosen)} layers of {format} refused", end="")


LIES: dict[str, Any] = {
    "above": "../dense/model.safetensors",
    "elsewhere": "/nowhere/model.safetensors",
    "around": "../gptq-sharded/model-00001-of-00003.safetensors",
}


@pytest.mark.parametrize("lie", LIES)
def test_from_pretrained_with_the_flag_follows_no_index_out_of_the_folder(
    lie: str, made: dict[str, Path], tmp_path: Path
) -> None:
    """transformers alone loads what is there."""
    elsewhere = str(made["gptq"] / SINGLE)
    target = {"elsewhere": elsewhere}.get(lie, LIES[lie])
    folder = made["gptq"].parent / f"leads-{lie}"
    files = mutations.change_index(
        mutations.read(made["gptq sharded"]), lambda names: names.update(dict.fromkeys(names, target))
    )
    mutations.write(files, folder)
    with pytest.raises(CheckpointError, match="outside of it"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=WqConfig())
    assert through_load(folder).kind == "refused"
    assert through_verify(folder).kind == "found"


def test_a_link_out_of_the_folder_instead_of_weights_is_found(made: dict[str, Path], tmp_path: Path) -> None:
    files = mutations.read(made["awq"])
    mutations.write(files | {SINGLE: made["gptq"] / SINGLE}, tmp_path / "folder")
    assert "leads out of the folder" in " ".join(_problems(tmp_path / "folder"))


def _problems(folder: Path) -> list[str]:
    from wq.verify import verify

    return [problem["problem"] for problem in verify(folder)["problems"]]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.weight"]
)
def test_a_source_that_is_not_finite_is_refused_by_the_tensors_name(
    name: str, value: str, made: dict[str, Path], tmp_path: Path
) -> None:
    mutations.write(mutations.read(made["dense"]), tmp_path / "folder")
    tensors = load_file(tmp_path / "folder" / SINGLE)
    tensors[name].view(-1)[3] = float(value)
    save_file(tensors, tmp_path / "folder" / SINGLE, {"format": "pt"})
    outcome = through_source(tmp_path / "folder")
    assert outcome == Outcome("refused", f"{name} holds 1 values that are not finite, of {tensors[name].numel()}. "
                              "The source is damaged; download it again.")  # fmt: skip


def test_a_dense_weight_that_is_not_finite_is_not_rounded_on_load(made: dict[str, Path], tmp_path: Path) -> None:
    mutations.write(mutations.read(made["dense"]), tmp_path / "folder")
    tensors = load_file(tmp_path / "folder" / SINGLE)
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name][1, 1] = float("nan")
    save_file(tensors, tmp_path / "folder" / SINGLE, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name} holds 1 values that are not finite"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "folder", quantization_config=WqConfig(group_size=32))


def test_code_that_a_config_asks_for_is_not_run(made: dict[str, Path], tmp_path: Path) -> None:
    """Nor asked for: transformers would wait fifteen seconds for an answer."""
    files = mutations.read(made["gptq"])
    marker = tmp_path / "ran"
    code = f"open({str(marker)!r}, 'w')\n".encode()
    custom = mutations.change_json(
        files,
        "config.json",
        lambda c: c.update(auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}, model_type="x",
                           trust_remote_code=True),
    )  # fmt: skip
    tokenizer = b'{"auto_map": {"AutoTokenizer": ["evil.T", null]}}'
    mutations.write(custom | {"evil.py": code, "tokenizer_config.json": tokenizer}, tmp_path / "folder")
    assert through_load(tmp_path / "folder").kind == "refused"
    assert through_source(tmp_path / "folder").kind == "refused"
    through_verify(tmp_path / "folder")
    assert not marker.exists()


def test_what_is_told_of_a_folder_does_nothing_to_a_terminal(made: dict[str, Path], tmp_path: Path) -> None:
    name = "\x1b]0;evil\x07\x1b[31m" + "x" * 5000
    files = mutations.read(made["gptq"])
    head, body = mutations.split(files[SINGLE])  # type: ignore[arg-type]
    values = json.loads(head)
    values[name] = values.pop("model.norm.weight")
    mutations.write(files | {SINGLE: mutations.join(json.dumps(values).encode(), body)}, tmp_path / "folder")
    for outcome in (through_verify(tmp_path / "folder"), through_load(tmp_path / "folder")):
        assert outcome.kind in ("found", "refused")
        assert "evil" in outcome.said or "model.norm.weight" in outcome.said
        assert outcome.said.isprintable()
