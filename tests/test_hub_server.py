"""The local hub is checked with the real client, run as its users run it: in a process of its own."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer

REPO = "org/tiny"

UPLOAD = """
import json, sys
from pathlib import Path
from huggingface_hub import HfApi
folder, api, shas = Path(sys.argv[1]), HfApi(), []
for config in ["{}", "{}", '{"a": 1}']:
    (folder / "config.json").write_text(config)
    url = api.create_repo("org/tiny", exist_ok=True)
    shas.append(api.upload_folder(repo_id=url.repo_id, folder_path=folder).oid)
print(json.dumps({"user": api.whoami()["name"], "repo": url.repo_id, "shas": shas}))
"""

DOWNLOAD = """
import json, sys
from pathlib import Path
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
api = HfApi()
old = hf_hub_download("org/tiny", "config.json", revision=sys.argv[1])
answer = {
    "snapshot": snapshot_download("org/tiny"),
    "old": Path(old).read_text(),
    "tensors": list(api.get_safetensors_metadata("org/tiny").weight_map),
    "exists": [api.file_exists("org/tiny", name) for name in ("config.json", "absent.json")],
    "refs": {ref.name: ref.target_commit for ref in api.list_repo_refs("org/tiny").branches},
    "sizes": {file.rfilename: file.size for file in api.model_info("org/tiny", files_metadata=True).siblings},
}
print(json.dumps(answer))
"""

WRONG_TOKEN = """
import json
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError
def status(call, **arguments):
    try:
        call(**arguments)
    except HfHubHTTPError as error:
        return error.response.status_code
answers = []
for token in ("wrong", False):
    api = HfApi(token=token)
    add = [CommitOperationAdd("a.txt", b"text")]
    answers.append(status(api.create_repo, repo_id="org/other"))
    answers.append(status(api.create_commit, repo_id="org/tiny", operations=add, commit_message="m"))
print(json.dumps(answers))
"""

BAD_OBJECT = """
import json
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import BadRequestError
api, answers = HfApi(), []
def commit(change):
    operation = CommitOperationAdd("model.safetensors", b"weights")
    change(operation)
    try:
        api.create_commit(repo_id="org/tiny", operations=[operation], commit_message="m")
    except (BadRequestError, RuntimeError) as error:
        answers.append(str(error.__cause__ if isinstance(error, RuntimeError) else error))
def wrong_hash(operation):
    operation.upload_info.sha256 = bytes(32)
def wrong_size(operation):
    operation.upload_info.size += 1
def never_sent(operation):
    operation._upload_mode, operation._is_uploaded = "lfs", True
for change in (wrong_hash, wrong_size, never_sent):
    commit(change)
print(json.dumps(answers))
"""


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """Serve an empty hub for one test."""
    with HubServer() as server:
        yield server


def client(hub: HubServer, home: Path, script: str, *arguments: str) -> Any:
    """Run `script` against the hub with fresh caches and return what it prints as JSON."""
    environment = {**os.environ, **hub.environment(home)}
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def model_folder(folder: Path) -> Path:
    """Write a folder shaped like a model, with weights longer than one range request of the client."""
    data = random.Random(0).randbytes(200_000)
    header = json.dumps({"w": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}).encode()
    (folder / "nested").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "nested" / "a b.txt").write_bytes("é\r\n".encode())
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file under `folder` by its relative path, without the client's own bookkeeping."""
    files = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {name.as_posix(): path.read_bytes() for name, path in files.items() if name.parts[0] != ".cache"}


def test_uploads_can_be_repeated_and_come_back_byte_for_byte(hub: HubServer, tmp_path: Path) -> None:
    """Three uploads make two commits, send the weights once, and a fresh client reads the same bytes."""
    folder = model_folder(tmp_path / "model")
    sent = client(hub, tmp_path / "sender", UPLOAD, str(folder))
    first, repeated, changed = sent["shas"]
    assert (sent["user"], sent["repo"]) == ("tester", REPO)
    assert first == repeated
    assert hub.commits(REPO)[1:] == [first, changed]
    assert hub.files(REPO) == contents(folder)
    assert [method for method, _ in hub.requests].count("PUT") == 1

    got = client(hub, tmp_path / "receiver", DOWNLOAD, first)
    assert contents(Path(got["snapshot"])) == contents(folder)
    assert got["old"] == "{}"
    assert got["tensors"] == ["w"]
    assert got["exists"] == [True, False]
    assert got["refs"] == {"main": changed}
    assert got["sizes"] == {name: len(data) for name, data in contents(folder).items()}


def test_wrong_and_missing_tokens_cannot_write(hub: HubServer, tmp_path: Path) -> None:
    """Neither creates a repository nor adds a commit."""
    setup = "from huggingface_hub import HfApi; HfApi().create_repo('org/tiny'); "
    assert client(hub, tmp_path, setup + WRONG_TOKEN) == [401, 401, 401, 401]
    assert len(hub.commits(REPO)) == 1
    with pytest.raises(KeyError):
        hub.commits("org/other")


def test_bad_objects_are_refused(hub: HubServer, tmp_path: Path) -> None:
    """A wrong hash, a wrong size and an object which was never sent leave no commit behind."""
    setup = "from huggingface_hub import HfApi; HfApi().create_repo('org/tiny'); "
    answers = client(hub, tmp_path, setup + BAD_OBJECT)
    expected = ["does not match its sha256", "Expected 8 bytes, got 7", "No object"]
    assert len(answers) == len(expected)
    assert all(part in answer for part, answer in zip(expected, answers, strict=True))
    assert len(hub.commits(REPO)) == 1
