"""Benchmark tasks: the real lm-evaluation-harness on a tiny model and a local task, and what cannot be run."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from wq import report, tasks
from wq.errors import TaskError
from wq.hf import load
from wq.pipeline.quantizer import quantize

TinyModel = Callable[..., Path]
WORDS = ["azure", "beige", "black", "brown", "coral", "green", "ivory", "khaki", "mauve", "olive", "white"]
# Answers of one length: a random model prefers a shorter one, whatever it says.
QUESTIONS = [
    {"q": f"Which colour has number {i}?", "a": [WORDS[(i * k) % 11] for k in (1, 3, 7)][: 2 + i % 2]}
    for i in range(1, 30)
    if i % 11
]


@pytest.fixture(scope="module")
def _harness() -> None:
    reason = "lm_eval is not installed whole: pip install 'wq-quant[eval]', or what scripts/test.sh installs for it"
    pytest.importorskip("lm_eval.evaluator", reason=reason)


@pytest.fixture(scope="module")
def own_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a multiple-choice task whose data lie beside it."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "colours.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    task = {
        "task": "colours",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "colours.jsonl")}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "fewshot_split": "test",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{a}}",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        "metadata": {"version": 1.0},
    }
    (folder / "colours.yaml").write_text(yaml.safe_dump(task))
    return folder


@pytest.fixture(scope="module")
def packed(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "out"
    quantize(tiny_model(), out, method="rtn", bits=2, group_size=32)
    return out


@pytest.fixture(scope="module")
def base(tiny_model: TinyModel) -> Path:
    """Not what `packed` was made from, as a random model gives the same answers in any number of bits."""
    return tiny_model("llama", seed=1)


@pytest.fixture(scope="module")
def result(_harness: None, packed: Path, base: Path, own_tasks: Path) -> dict[str, Any]:
    return tasks.evaluate(packed, ["colours"], base=base, limit=20, include_path=own_tasks, dtype="float32", batch=4)


def correct(folder: Path, by_length: bool) -> list[bool]:
    """Whether the likeliest answer to each question is the right one, computed here."""
    model, tokenizer = load(folder, dtype="float32")
    found = []
    for question in QUESTIONS[:20]:
        values = []
        for answer in question["a"]:
            context = tokenizer(question["q"])["input_ids"]
            ids = torch.tensor([tokenizer(f"{question['q']} {answer}")["input_ids"]])
            with torch.no_grad():
                predicted: Tensor = model(input_ids=ids).logits[0, len(context) - 1 : -1].log_softmax(-1)
            total = float(predicted.gather(1, ids[0, len(context) :, None]).sum())
            values.append(total / len(answer) if by_length else total)
        found.append(max(range(len(values)), key=values.__getitem__) == 0)
    return found


@pytest.mark.parametrize("metric", ["acc", "acc_norm"])
def test_scores_are_what_the_task_says(metric: str, result: dict[str, Any], packed: Path, base: Path) -> None:
    (row,) = [row for row in result["tasks"] if row["metric"] == metric]
    ours, theirs = (correct(folder, metric == "acc_norm") for folder in (packed, base))
    assert row["value"] == pytest.approx(sum(ours) / 20)
    assert row["base"]["value"] == pytest.approx(sum(theirs) / 20)
    changes = torch.tensor(ours).double() - torch.tensor(theirs).double()
    assert changes.any()
    assert row["difference"] == pytest.approx(float(changes.mean()))
    assert row["paired"]["stderr"] == pytest.approx(float(changes.std() / math.sqrt(20)))
    assert row["paired"]["better"] == int((changes > 0).sum())
    assert row["paired"]["worse"] == int((changes < 0).sum())
    assert (row["task"], row["documents"], row["fewshot"]) == ("colours", 20, 0)


def test_figures_go_into_the_report_and_the_card(result: dict[str, Any], packed: Path) -> None:
    known = report.load(packed)
    assert known is not None
    assert known["tasks"] == json.loads(json.dumps(result))
    card = (packed / "README.md").read_text()
    row = result["tasks"][0]
    assert f"| colours | acc | {report.figure(row['base'])} | {report.figure(row)} | {report.paired(row)} |" in card
    assert "the first 20 documents of each task" in card
    assert "Not evaluated yet" in card  # perplexity is another matter


@pytest.mark.usefixtures("_harness")
def test_a_rounded_head_is_told_and_leaves_the_folder_s_own_figures_alone(
    result: dict[str, Any], packed: Path, base: Path, own_tasks: Path
) -> None:
    options: dict[str, Any] = {"limit": 20, "include_path": own_tasks, "dtype": "float32"}
    found = tasks.evaluate(packed, ["colours"], base=base, head_bits=8, **options)
    known = report.load(packed)
    assert (found["head_bits"], "head_bits" in result) == (8, False)
    assert known is not None
    assert known["tasks"] == json.loads(json.dumps(result))


@pytest.mark.usefixtures("_harness")
def test_the_command_line_runs_a_task_of_ones_own(
    own_tasks: Path, tiny_model: TinyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    from wq.cli import app

    options = ["--tasks", "colour*", "--include-path", str(own_tasks), "--limit", "3", "--fewshot", "2", "--dtype"]
    app(["eval", str(tiny_model()), *options, "float32", "--json"], standalone_mode=False)
    made = json.loads(capsys.readouterr().out)
    assert [(row["documents"], row["fewshot"]) for row in made["tasks"]] == [(3, 2), (3, 2)]
    assert made["base"] is None
    assert all("difference" not in row for row in made["tasks"])


def test_the_table_shows_both_models_and_the_difference(result: dict[str, Any]) -> None:
    from rich.console import Console

    from wq.cli import task_table

    console = Console(width=200)
    with console.capture() as captured:
        console.print(task_table(result))
    row = result["tasks"][1]
    for text in ("colours", "acc_norm", report.figure(row), report.figure(row["base"]), report.paired(row)):
        assert text in captured.get()


@pytest.mark.usefixtures("_harness")
def test_an_unknown_task_is_refused_with_its_neighbours(tiny_model: TinyModel) -> None:
    with pytest.raises(TaskError, match=r"'arc_esay' is none of the \d+ .*arc_easy"):
        tasks.evaluate(tiny_model(), ["arc_esay"])


@pytest.mark.usefixtures("_harness")
def test_a_task_whose_data_cannot_be_fetched_says_so(tiny_model: TinyModel) -> None:
    with pytest.raises(TaskError, match=r"task arc_easy could not be loaded .*check the network"):
        tasks.evaluate(tiny_model(), ["arc_easy"])  # the suite runs offline


@pytest.mark.usefixtures("_harness")
def test_a_folder_of_tasks_that_is_none_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="nowhere is no folder"):
        tasks.evaluate(tiny_model(), ["colours"], include_path=tmp_path / "nowhere")


def test_a_missing_harness_says_what_to_install(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not installed
    with pytest.raises(TaskError, match=r"pip install 'wq-quant\[eval\]'"):
        tasks.evaluate(tiny_model(), ["arc_easy"])


@pytest.mark.parametrize(("better", "worse", "p"), [(0, 0, 1.0), (3, 3, 1.0), (0, 5, 2 / 32), (1, 9, 22 / 1024)])
def test_the_sign_test_is_exact(better: int, worse: int, p: float) -> None:
    assert tasks._sign_test(better, worse) == pytest.approx(p)
    assert tasks._sign_test(worse, better) == pytest.approx(p)


def test_a_lower_score_can_be_the_better_one() -> None:
    paired = tasks._pair({0: 1.0, 1: 2.0, 2: 2.0}, {0: 2.0, 1: 2.0, 2: 1.5}, upwards=False)
    assert paired is not None
    assert (paired["better"], paired["worse"]) == (1, 1)
    assert tasks._pair({0: 1.0}, {1: 1.0}, upwards=True) is None
