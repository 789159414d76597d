"""What a run takes is known before it: to the byte on disk, and within a tenth in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from hub_server import HubServer
from torch import nn

from wq import formats, planning, solvers
from wq.errors import BudgetError
from wq.pipeline import estimate
from wq.pipeline.estimate import Job
from wq.pipeline.plan import make_plan
from wq.pipeline.quantizer import quantize
from wq.pipeline.shapes import metered
from wq.pipeline.source import open_source
from wq.scheme import Scheme

TinyModel = Callable[..., Path]

SIZES = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_key_value_heads": 4}
CODE = """
import json, sys
from wq import planning, presets
texts = [f"{i} little words in a row, and some more of them to fill it" for i in range(999)]
options = {"samples": 32, "seqlen": 128, "without": ["refine", "search"], "device": "cpu"}
if sys.argv[3] == "plan":
    found = planning.plan(sys.argv[1], calibration="builtin", **options)
else:
    found = presets.quantize(sys.argv[1], sys.argv[2], calibration=texts, **options)
print(json.dumps(found))
"""


@contextmanager
def job(folder: Path, method: str = "gptq", **options: Any) -> Iterator[Job]:
    solver, fmt = solvers.get(method), formats.get("compressed-tensors")
    calibration = {"samples": 24, "seqlen": 64} if solver.NEEDS_STATISTICS else {}
    with open_source(folder) as source, torch.no_grad():
        plan = make_plan(source, fmt, Scheme(group_size=-1), True, (), None)
        yield Job(source, solver, fmt, plan, torch.device("cpu"), torch.float32, **{**calibration, **options})


def test_a_meter_sees_what_is_made_and_freed_and_done() -> None:
    model = nn.Linear(8, 16, bias=False, device="meta")
    with metered(model) as meter:
        x = torch.empty(4, 8, device="meta")
        assert meter.live == 4 * 8 * 4
        y = model(x)  # the weight, and its transpose, were there before
        assert meter.live == meter.peak == 4 * 8 * 4 + 4 * 16 * 4
        del y
        assert meter.live == 4 * 8 * 4
        peak, work = meter.take()
        assert peak == 4 * 8 * 4 + 4 * 16 * 4
        assert work.flops == 2 * 4 * 8 * 16
        assert meter.peak == meter.live


def test_a_question_for_a_value_is_answered_as_in_a_run_that_goes_well() -> None:
    model = nn.Linear(2, 2, device="meta")
    with metered(model, share=0.25):
        values = torch.empty(6, 2, device="meta")
        assert torch.isfinite(values).all()
        assert not values.mean() <= 0
        assert values.mean() > 0
        assert values.mean().item() > values.mean().item() > 0
        assert int((~torch.isfinite(values)).sum()) == 0
        assert torch.equal(values, values + 1)
        assert len(values[torch.empty(6, dtype=torch.bool, device="meta")]) == 6
        assert len(values[(values == 1).any(1)]) == 3  # a quarter for each of two columns


def test_a_model_is_left_as_it_was(tiny_model: TinyModel) -> None:
    with job(tiny_model()) as one:
        before = {name: buffer.clone() for name, buffer in one.source.model.named_buffers()}
        estimate.estimate(one, 4)
        after = dict(one.source.model.named_buffers())
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert all(parameter.is_meta for parameter in one.source.model.parameters())


@pytest.mark.parametrize("architecture", tiny_models.ALL)
@pytest.mark.parametrize("method", ["gptq", "awq", "rtn"])
def test_every_architecture_is_estimated(architecture: str, method: str, tiny_model: TinyModel) -> None:
    with job(tiny_model(architecture), method) as one:
        made = estimate.estimate(one, 4)
        blocks = sum(len(blocks) for _, blocks in one.plan.towers)
        streams = 24 * 64 * one.source.config.get_text_config().hidden_size * 4
    assert sum(moment.times for moment in made.moments if moment.parts.get("a block") and moment.solves) == blocks
    assert made.journal == {"gptq": 4 * streams, "awq": 2 * streams, "rtn": 0}[method]
    for moment in made.moments:
        assert all(count >= 0 for count in moment.parts.values()), moment


@pytest.mark.parametrize(("architecture", "distilled"), [("llama", True), ("mixtral", True), ("t5", False)])
def test_what_best_does_behind_its_solver_is_counted(architecture: str, distilled: bool, tiny_model: TinyModel) -> None:
    options: dict[str, Any] = {"calibration": "builtin", "samples": 48, "seqlen": 64, "group_size": 32}
    best, plain = (planning.plan(tiny_model(architecture), preset=name, **options) for name in ("best", "balanced"))
    moments = [one for one in best["moments"] if one["name"] == "distillation"]
    assert len(moments) == distilled
    assert all(one["name"] != "distillation" for one in plain["moments"])
    if distilled:
        assert moments[0]["parts"]["two models"] == 2 * 4 * best["parameters"]
        assert best["disk_bytes"]["journal"] >= best["checkpoint_bytes"]  # the note of what was learned


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2", "mixtral", "qwen3_vl_moe", "t5"])
def test_the_checkpoint_takes_what_was_said(architecture: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    with job(tiny_model(architecture), "rtn") as one:
        said = estimate.estimate(one, 4).checkpoint
    made = quantize(tiny_model(architecture), tmp_path / "out", method="rtn")
    assert made["checkpoint_bytes"] == said


def test_a_few_batches_tell_of_all(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with job(tiny_model(), samples=32) as one:
        extended = estimate.estimate(one, 4)
        monkeypatch.setattr(estimate, "_few", lambda rows: 8)
        counted = estimate.estimate(one, 4)
    for few, all_of_them in zip(extended.moments, counted.moments, strict=True):
        assert few.held == all_of_them.held
        assert few.bytes == pytest.approx(all_of_them.bytes, rel=0.25)
        assert few.work.flops == pytest.approx(all_of_them.work.flops)


def test_a_budget_makes_batches_smaller(tiny_model: TinyModel) -> None:
    with job(tiny_model(intermediate_size=4096), "awq", samples=16, seqlen=256) as one:
        most, least = estimate.estimate(one, 16), estimate.estimate(one, 1)
        assert most.memory - least.memory > 50e6  # what this process takes wanders by less
        budget = (most.memory + least.memory) // 2
        made = estimate.fitting(one, 16, budget)
    assert 1 <= made.rows < 16
    assert made.memory <= budget


def test_what_does_not_fit_is_refused_with_what_takes_it(tiny_model: TinyModel) -> None:
    with job(tiny_model()) as one, pytest.raises(BudgetError, match=r"--max-memory 1 MB: this run takes .* for Python"):
        estimate.fitting(one, 4, 10**6)


def run(*arguments: object, **environment: str) -> dict[str, Any]:
    command = [sys.executable, "-c", CODE, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_memory_is_within_a_tenth(tmp_path: Path) -> None:
    source = tiny_models.make(tmp_path / "source", "llama", **SIZES)
    said, made = run(source, tmp_path / "out", "plan"), run(source, tmp_path / "out", "quantize")
    assert said["checkpoint_bytes"] == made["checkpoint_bytes"]
    assert said["peak_rss_bytes"] == pytest.approx(made["peak_rss_bytes"], rel=0.1)
    tensors = said["peak_rss_bytes"] - said["process_bytes"]
    assert tensors > 200e6  # so that it is not the interpreter alone that is told


def test_of_a_repo_the_weights_are_not_fetched(tiny_model: TinyModel, tmp_path: Path) -> None:
    with HubServer() as hub:
        environment = hub.environment(tmp_path / "home")
        upload = (
            "import sys; from huggingface_hub import HfApi; HfApi().create_repo('org/tiny'); "
            "HfApi().upload_folder(repo_id='org/tiny', folder_path=sys.argv[1])"
        )
        subprocess.run([sys.executable, "-c", upload, str(tiny_model())], check=True, env={**os.environ, **environment})
        said = run("org/tiny", "", "plan", **environment)
    here = run(tiny_model(), "", "plan")
    assert said["layers"] == here["layers"]
    assert said["checkpoint_bytes"] == here["checkpoint_bytes"]
    assert not list((tmp_path / "home").rglob("*.safetensors"))


def test_finding_what_tokens_count_is_estimated_too(tiny_model: TinyModel) -> None:
    with job(tiny_model(), samples=32) as plain, job(tiny_model(), samples=32, importance=True) as weighed:
        one, other = estimate.estimate(plain, 4), estimate.estimate(weighed, 4)
        layers = sum(len(block.layers) for _, blocks in weighed.plan.towers for block in blocks)
    assert other.journal - one.journal == 4 * layers * 32 * weighed.seqlen
    extra = [moment for moment in other.moments if moment.name.startswith("what tokens count")]
    assert sum(moment.times for moment in extra) == len(weighed.plan.towers[0][1]) + 1
    assert sum(moment.work.flops for moment in extra) > 0
    assert all(moment.bytes > 0 for moment in extra)
