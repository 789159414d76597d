"""A run that was interrupted goes on where it was, to the same bytes; another job is refused by what differs."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import wq
from wq import distill, manifest
from wq.errors import OutputError
from wq.pipeline import mixing, sampling
from wq.presets import quantize

ROOT = Path(__file__).resolve().parents[2]
TinyModel = Callable[..., Path]
OPTIONS: dict[str, Any] = {"calibration": "builtin", "samples": 16, "seqlen": 32, "group_size": 32}
MEASURED = ("seconds", "peak_rss_bytes")


def interrupt(event: dict[str, Any]) -> None:
    """After each block, but not for what a run before has done."""
    if not event.get("resumed"):
        raise KeyboardInterrupt


def broken(model: Path, folder: Path, **options: Any) -> tuple[dict[str, Any], int]:
    """The report of a run that is interrupted after every block, and how often it was."""
    told: list[str] = []
    while True:
        try:
            made = quantize(model, folder, on_block=interrupt, **options)
        except KeyboardInterrupt as error:
            told += error.__notes__
            continue
        assert all("repeat the command to go on" in note for note in told)
        return made, len(told)


def files(folder: Path) -> dict[str, Any]:
    """What a checkpoint computes with, by the manifest."""
    return manifest.read(folder) or pytest.fail("no manifest")


@pytest.mark.parametrize("method", ["gptq", "awq", "rtn"])
@pytest.mark.parametrize("architecture", ["llama", "mixtral", "qwen3", "llava", "t5"])
def test_an_interrupted_run_makes_the_same_bytes(
    tiny_model: TinyModel, tmp_path: Path, architecture: str, method: str
) -> None:
    model = tiny_model(architecture)
    unbroken = quantize(model, tmp_path / "one", method=method, **OPTIONS)
    report, interrupts = broken(model, tmp_path / "two", method=method, **OPTIONS)
    assert interrupts == (4 if architecture == "t5" else 2)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert {k: v for k, v in report.items() if k not in MEASURED} == {
        k: v for k, v in unbroken.items() if k not in MEASURED
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_what_took_long_before_the_first_block_is_not_done_again(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**OPTIONS, "calibration": "self", "target_bpw": 5.5}
    quantize(tiny_model(), tmp_path / "one", **options)
    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_model(), tmp_path / "two", on_block=interrupt, **options)
    monkeypatch.setattr(sampling, "sample", lambda *_: pytest.fail("sampled again"))
    monkeypatch.setattr(mixing, "choose", lambda *_: pytest.fail("chose again"))
    quantize(tiny_model(), tmp_path / "two", **options)
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_a_run_goes_on_behind_its_distillation(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**OPTIONS, "samples": 32, "bits": 2, "preset": "best"}
    made = quantize(tiny_model(), tmp_path / "one", **options)
    assert made["distillation"]["kept"]
    written = []

    def killed(entry: Any, tensor: Any) -> None:
        written.append(entry)
        if len(written) == 3:
            raise KeyboardInterrupt  # with the third of many tensors not in its place
        wq.checkpoint.overwrite(entry, tensor)

    monkeypatch.setattr(distill, "overwrite", killed)
    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_model(), tmp_path / "two", **options)
    monkeypatch.setattr(distill, "overwrite", wq.checkpoint.overwrite)
    monkeypatch.setattr(distill, "Pupil", lambda *_: pytest.fail("taught again"))
    again = quantize(tiny_model(), tmp_path / "two", **options)
    assert again["distillation"]["heldout_kl"] == made["distillation"]["heldout_kl"]
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_a_run_goes_on_in_the_middle_of_its_distillation(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**OPTIONS, "samples": 32, "bits": 2, "preset": "best"}
    monkeypatch.setattr(distill, "_NOTE_EVERY", -1.0)
    quantize(tiny_model(), tmp_path / "one", **options)
    steps: list[int] = []

    def killed(step: int, total: int, kl: float) -> None:
        steps.append(step)
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_model(), tmp_path / "two", on_step=killed, **options)
    quantize(tiny_model(), tmp_path / "two", on_step=lambda step, total, kl: steps.append(step), **options)
    assert steps[:5] == [1, 2, 3, 3, 4]  # the third was done, and had not been noted
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def one_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def theta(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["rms_norm_eps"] = 1e-4
    (folder / "config.json").write_text(json.dumps(config))


MUTATIONS: dict[str, tuple[dict[str, Any], Callable[[Path], None] | None]] = {
    "model.model.safetensors": ({}, one_weight),
    "model.config.json": ({}, theta),
    "scheme.bits": ({"bits": 3}, None),
    "scheme.group_size": ({"group_size": 64}, None),
    "scheme.symmetric": ({"symmetric": False}, None),
    "method": ({"method": "awq"}, None),
    "format": ({"format": "gptq"}, None),
    "calibration.seed": ({"seed": 1}, None),
    "samples": ({"samples": 8}, None),
    "seqlen": ({"seqlen": 16}, None),
    "calibration.source": ({"calibration": ["other text, " * 500]}, None),
    "dense": ({"keep": ["o_proj"]}, None),
    "dtype": ({"dtype": "bfloat16"}, None),
    "without": ({"without": ["refine"]}, None),
    "reserve": ({"preset": "best", "samples": 16 + 16}, None),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_another_job_is_refused_by_what_differs(tiny_model: TinyModel, tmp_path: Path, name: str) -> None:
    options, change = MUTATIONS[name]
    model = Path(shutil.copytree(tiny_model(), tmp_path / "model"))
    with pytest.raises(KeyboardInterrupt):
        quantize(model, tmp_path / "out", on_block=interrupt, **OPTIONS)
    before = (tmp_path / ".out.partial" / "progress.safetensors").read_bytes()
    if change is not None:
        change(model)
    with pytest.raises(OutputError, match=rf"[:;] {re.escape(name)} was .*, now .*--restart"):
        quantize(model, tmp_path / "out", **{**OPTIONS, **options})
    assert (tmp_path / ".out.partial" / "progress.safetensors").read_bytes() == before
    assert not (tmp_path / "out").exists()


def test_another_version_is_refused_by_name(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_model(), tmp_path / "out", on_block=interrupt, **OPTIONS)
    monkeypatch.setattr(wq, "__version__", "9.9")
    with pytest.raises(OutputError, match=r"versions\.wq was .*, now 9\.9"):
        quantize(tiny_model(), tmp_path / "out", **OPTIONS)


def test_restart_begins_again(tiny_model: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_model(), tmp_path / "out", on_block=interrupt, bits=3, **OPTIONS)
    told: list[dict[str, Any]] = []
    quantize(tiny_model(), tmp_path / "out", restart=True, on_block=told.append, **OPTIONS)
    assert [event["block"] for event in told] == [1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_damaged_note_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_model(), tmp_path / "out", on_block=interrupt, **OPTIONS)
    note = tmp_path / ".out.partial" / "progress.safetensors"
    content = bytearray(note.read_bytes())
    content[-5] ^= 1
    note.write_bytes(content)
    with pytest.raises(OutputError, match="is damaged"):
        quantize(tiny_model(), tmp_path / "out", **OPTIONS)


def test_a_run_that_was_killed_after_publishing_is_not_made_again(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(wq.staging.Workplace, "discard", lambda place: None)
        made = quantize(tiny_model(), tmp_path / "out", **OPTIONS)
    assert (tmp_path / ".out.partial").exists()
    again = quantize(tiny_model(), tmp_path / "out", on_block=lambda event: pytest.fail("made again"), **OPTIONS)
    assert again == made
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("overwrite", [True, False], ids=["overwrite", "keep"])
def test_after_a_run_that_had_published_another_job_begins_anew(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    """What is in place is complete: it is no run to go on with, and nothing to lose without --overwrite."""
    with monkeypatch.context() as patch:
        patch.setattr(wq.staging.Workplace, "discard", lambda place: None)
        quantize(tiny_model(), tmp_path / "out", **OPTIONS)
    before = files(tmp_path / "out")
    other = {**OPTIONS, "seed": 1, "overwrite": overwrite}
    if not overwrite:
        with pytest.raises(OutputError, match="not empty"):
            quantize(tiny_model(), tmp_path / "out", **other)
        assert files(tmp_path / "out") == before
        return
    quantize(tiny_model(), tmp_path / "out", **other)
    quantize(tiny_model(), tmp_path / "one", **{**OPTIONS, "seed": 1})
    assert files(tmp_path / "out") == files(tmp_path / "one") != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "out"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_signal_stops_within_a_block_and_the_same_command_goes_on(
    tiny_model: TinyModel, tmp_path: Path, number: signal.Signals
) -> None:
    model = tiny_model("llama", num_hidden_layers=24)
    options = ["--calibration", "builtin", "--samples", "16", "--seqlen", "32"]
    command = [sys.executable, "-m", "wq", "quantize", str(model), "-o", str(tmp_path / "out"), *options]
    heard = partial(signal.signal, number, signal.SIG_DFL)  # a shell's background jobs ignore ctrl-c
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    assert process.stderr is not None
    while not process.stderr.readline().startswith("block 2/24"):
        assert process.poll() is None
    process.send_signal(number)
    rest = process.stderr.read()
    assert process.wait() == 130
    assert "repeat the command to go on" in rest
    assert not (tmp_path / "out").exists()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "done before, going on" in done.stderr
    assert "block 1/24" not in done.stderr


@pytest.mark.parametrize("part", ["resume", "save", "race", "full"])
def test_killed_raced_and_starved_nothing_is_lost(part: str) -> None:
    """A short run of the script that counts; it prints its figures."""
    script = ROOT / "scripts" / "reliability.py"
    command = [sys.executable, script, "--count", "3", "--only", part]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    skipped = next((line for line in done.stdout.splitlines() if "not tried" in line), None)
    if skipped:
        pytest.skip(skipped)
