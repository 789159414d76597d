"""The command line as a user meets it: in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

TinyModel = Callable[..., Path]


def wq(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "wq", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


def test_quantize_then_eval_prints_json_for_programs(tiny_model: TinyModel, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = wq("quantize", tiny_model(), "-o", out, "--calibration", "builtin", "--samples", 4, "--seqlen", 64, "--json")
    assert made.returncode == 0, made.stderr
    report = json.loads(made.stdout)
    assert report["scheme"] == {"bits": 4, "group_size": 64, "symmetric": True, "scale_dtype": "float16"}
    assert report["command"].startswith("wq quantize ")
    kept = json.loads((out / "wq_manifest.json").read_text())
    assert kept["command"] == report["command"]
    assert kept["versions"]["torch"] == torch.__version__
    done = wq("eval", out, "--base", tiny_model(), "--text", "builtin", "--seqlen", 128, "--windows", 2, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["windows"] == 2


def test_quantize_tells_people_what_happens(tiny_model: TinyModel, tmp_path: Path) -> None:
    options = ["--calibration", "builtin", "--samples", 4, "--seqlen", 64, "--asymmetric", "--keep", "o_proj"]
    done = wq("quantize", tiny_model(), "-o", tmp_path / "out", *options)
    assert done.returncode == 0, done.stderr
    assert "block 2/2" in done.stderr  # a line a block where there is no terminal
    assert "quantized 65,536 of" in done.stdout  # 2 blocks of q, k, v and the MLP; o_proj was kept
    assert "wq eval" in done.stdout


def test_a_short_calibration_text_is_said_so(tiny_model: TinyModel, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("just enough for two windows of thirty-two tokens, no more than that")
    options = ["--calibration", tmp_path / "short.txt", "--samples", 64, "--seqlen", 32]
    done = wq("quantize", tiny_model(), "-o", tmp_path / "out", *options)
    assert done.returncode == 0, done.stderr
    assert "short.txt gave 2 windows, not 64" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["quantize", "{model}", "-o", "{out}", "--group", "48"], 1, "GroupSizeError: model.layers.0"),
        (["quantize", "{model}", "-o", "{out}", "--bits", "four"], 2, "--bits"),
        (["quantize", "{model}"], 2, "--output"),
        (["quantize", "./nowhere", "-o", "{out}"], 1, "./nowhere does not exist"),
        (["eval", "{model}", "--text", "nowhere.txt"], 1, "nowhere.txt does not exist"),
        (["push", "{model}", "me/model"], 1, "no measured figures"),
        (["frobnicate"], 2, "frobnicate"),
    ],
)
def test_bad_input_is_one_line_and_an_exit_code(
    arguments: list[str], code: int, message: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    filled = [a.format(model=tiny_model(), out=tmp_path / "out") for a in arguments]
    done = wq(*filled)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_version_and_help_answer() -> None:
    from wq import __version__

    assert wq("--version").stdout.strip() == __version__
    assert "quantize" in wq("--help").stdout
