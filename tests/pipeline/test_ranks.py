"""Several processes make one checkpoint: like that of one process, and none of them outlives another."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from wq import load, manifest
from wq.distill import mean_kl
from wq.pipeline.ranks import Ranks
from wq.presets import quantize

TinyModel = Callable[..., Path]
OPTIONS: dict[str, Any] = {"calibration": "builtin", "samples": 32, "seqlen": 32, "group_size": 32}
WORDS = ["--calibration", "builtin", "--samples", "32", "--seqlen", "32", "--group", "32"]


def start(count: int, model: Path, out: Path, *options: str) -> list[subprocess.Popen[str]]:
    """`wq quantize` in so many processes, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "wq", "quantize", str(model), "-o", str(out), *WORDS, *options]
    place = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            command,
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    said = [process.communicate() for process in processes]
    return [(process.returncode, *words) for process, words in zip(processes, said, strict=True)]


def kl(folder: Path, model: Path) -> float:
    """Of a checkpoint to the dense model, on the tokens 2 to 257."""
    dense, packed = load(model, dtype="float32")[0], load(folder, dtype="float32")[0]
    with torch.no_grad():
        return mean_kl(dense, packed, torch.arange(2, 258).reshape(4, 64))


@pytest.mark.parametrize(
    ("architecture", "method", "count"), [("llama", "gptq", 2), ("mixtral", "awq", 4), ("llama", "rtn", 2)]
)
def test_several_processes_make_what_one_makes(
    tiny_model: TinyModel, tmp_path: Path, architecture: str, method: str, count: int
) -> None:
    model = tiny_model(architecture)
    one = quantize(model, tmp_path / "one", method=method, **OPTIONS)
    ended = finish(start(count, model, tmp_path / "out", "--method", method, "--json"))
    assert [code for code, _, _ in ended] == [0] * count, ended[0][2]
    report = json.loads(ended[0][1])
    assert [out for _, out, _ in ended[1:]] == [""] * (count - 1)  # one speaks for all
    assert [layer["tokens"] for layer in report["layers"]] == [layer["tokens"] for layer in one["layers"]]
    assert report["calibration"] == one["calibration"]
    difference = abs(kl(tmp_path / "out", model) - kl(tmp_path / "one", model))
    print(f"{architecture}, {method}, {count} processes: KL differs by {difference:.1e}")
    assert difference < 1e-4
    if method == "rtn":
        assert manifest.read(tmp_path / "out") == manifest.read(tmp_path / "one")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "out"]


def test_several_processes_find_what_tokens_count(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model()
    one = quantize(model, tmp_path / "one", preset="fast", **OPTIONS)
    ended = finish(start(2, model, tmp_path / "out", "--preset", "fast", "--json"))
    assert [code for code, _, _ in ended] == [0, 0], ended[0][2]
    assert json.loads(ended[0][1])["importance"] == one["importance"] == {"layers": len(one["layers"])}
    assert abs(kl(tmp_path / "out", model) - kl(tmp_path / "one", model)) < 1e-4


def test_a_killed_process_ends_all_and_the_same_command_goes_on(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama", num_hidden_layers=16)
    whole = finish(start(2, model, tmp_path / "whole"))
    assert [code for code, _, _ in whole] == [0, 0]
    first, second = start(2, model, tmp_path / "out")
    assert first.stderr is not None
    while not first.stderr.readline().startswith("block 2/16"):
        assert first.poll() is None
    second.send_signal(signal.SIGKILL)
    told = first.stderr.read()
    assert first.wait() == 1
    assert "another process of this run has ended" in told
    assert "repeat the command to go on" in told
    assert not (tmp_path / "out").exists()
    ((code, _, told),) = finish(start(1, model, tmp_path / "out"))
    assert code == 1
    assert "processes was 2, now 1" in told
    (code, _, told), _ = finish(start(2, model, tmp_path / "out"))
    assert code == 0, told
    assert "done before, going on" in told
    assert manifest.read(tmp_path / "out") == manifest.read(tmp_path / "whole")


def test_what_the_first_process_is_refused_ends_all(tiny_model: TinyModel, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("precious")
    (code, _, told), (other, _, silent) = finish(start(2, tiny_model(), tmp_path / "out"))
    assert (code, other) == (1, 1)
    assert "is not empty" in told
    assert silent == ""
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_fewer_windows_than_processes_are_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    ended = finish(start(2, tiny_model(), tmp_path / "out", "--samples", "1"))
    assert [code for code, _, _ in ended] == [1, 1]
    assert "1 calibration windows for 2 processes" in ended[0][2]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shares_are_even_and_leave_nothing_out(count: int) -> None:
    for things in (count, 20, 128):
        shares = [Ranks(rank, count).share(things) for rank in range(count)]
        assert [i for share in shares for i in range(things)[share]] == list(range(things))
        sizes = [len(range(things)[share]) for share in shares]
        assert max(sizes) - min(sizes) <= 1
