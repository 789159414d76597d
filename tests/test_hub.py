"""Uploading to a server that speaks the Hub's protocol, and loading back from it by name, with the real client."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from safetensors.torch import load, load_file

from wq.errors import ModelError
from wq.evaluate import evaluate
from wq.hub import push
from wq.pipeline.quantizer import quantize

TinyModel = Callable[..., Path]


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def checkpoint(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hub") / "out"
    quantize(tiny_model(), out, method="rtn", group_size=32)
    evaluate(out, base=tiny_model(), text="builtin", seqlen=64, windows=1)
    return out


def run(hub: HubServer, home: Path, *command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **hub.environment(home), **environment}
    return subprocess.run([sys.executable, *map(str, command)], env=env, capture_output=True, text=True)


def test_push_uploads_everything_in_one_commit_and_it_loads_by_name(
    hub: HubServer, checkpoint: Path, tmp_path: Path
) -> None:
    done = run(hub, tmp_path, "-m", "wq", "push", checkpoint, "me/model-w4")
    assert done.returncode == 0, done.stderr
    assert "me/model-w4" in done.stdout
    assert hub.files("me/model-w4") == {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    assert len(hub.commits("me/model-w4")) == 2  # the empty repo, and all of it

    code = (
        "import sys, wq\n"
        "model, tokenizer = wq.load('me/model-w4')\n"
        "packed = sum(isinstance(m, wq.WqLinear) for m in model.modules())\n"
        "print(packed, tokenizer.decode(tokenizer('hello')['input_ids']))\n"
    )
    loaded = run(hub, tmp_path, "-c", code)
    assert loaded.stdout.split() == ["14", "hello"], loaded.stderr


def test_a_dense_repo_is_quantized_from_its_name(hub: HubServer, tiny_model: TinyModel, tmp_path: Path) -> None:
    code = "import sys; from huggingface_hub import HfApi; api = HfApi(); api.create_repo('me/dense');"
    code += "api.upload_folder(repo_id='me/dense', folder_path=sys.argv[1])"
    assert run(hub, tmp_path, "-c", code, tiny_model()).returncode == 0
    out = tmp_path / "out"
    done = run(hub, tmp_path, "-m", "wq", "quantize", "me/dense", "-o", out, "--method", "rtn", "--group", 32)
    assert done.returncode == 0, done.stderr
    card = (out / "README.md").read_text()
    assert "base_model: me/dense" in card
    assert (out / "tokenizer.json").is_file()


def test_model_push_to_hub_uploads_the_packed_checkpoint(hub: HubServer, checkpoint: Path, tmp_path: Path) -> None:
    code = "import sys, wq; wq.load(sys.argv[1])[0].push_to_hub('me/pushed')"
    done = run(hub, tmp_path, "-c", code, checkpoint)
    assert done.returncode == 0, done.stderr
    files = hub.files("me/pushed")
    assert b'"compressed-tensors"' in files["config.json"]
    uploaded = load(files["model.safetensors"])
    saved = load_file(checkpoint / "model.safetensors")
    assert uploaded.keys() == saved.keys()
    assert all(torch.equal(uploaded[name], saved[name]) for name in saved)


def test_a_refusal_is_one_line(hub: HubServer, checkpoint: Path, tmp_path: Path) -> None:
    done = run(hub, tmp_path, "-m", "wq", "push", checkpoint, "me/model", HF_TOKEN="hf_wrong")
    assert done.returncode == 1
    assert "HubError: the Hub refused me/model" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unreachable_hub_is_one_line(checkpoint: Path, hub: HubServer, tmp_path: Path) -> None:
    done = run(hub, tmp_path, "-m", "wq", "push", checkpoint, "me/model", HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 1
    assert "HubError: the Hub could not be reached" in done.stderr


def test_a_damaged_or_unmeasured_folder_is_not_shared(checkpoint: Path, tiny_model: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no measured figures.*wq eval"):
        push(tiny_model(), "me/model")
    with pytest.raises(ModelError, match="no checkpoint"):
        push(tmp_path, "me/model")
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[: -100 if file.suffix == ".safetensors" else None])
    with pytest.raises(ModelError, match="cannot be shared.*damaged"):
        push(tmp_path, "me/model")
