"""What scripts/stage_hub_kernel.py writes is what the `kernels` package loads, validates and runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("kernels", reason="the package `kernels` is not installed")

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "stage_hub_kernel.py"
PACKAGE = ROOT / "kernels" / "torch-ext" / "wq_kernels"
BACKENDS = ["cuda", "rocm", "xpu", "cpu"]

# Loads the repository at argv[1], as its users do, where nothing else of ours can be imported, and multiplies.
LOAD = """
import sys, torch
from kernels import get_loaded_kernels, get_local_kernel
from pathlib import Path

sys.modules["wq_kernels"] = None
module = get_local_kernel(Path(sys.argv[1]), backend="cpu")
(loaded,) = get_loaded_kernels()
assert loaded.module is module and loaded.metadata.id == module.__name__, loaded.metadata
inputs = torch.load(sys.argv[2])
y = module.linear(inputs["x"], *inputs["weight"], None, inputs["bias"], 4, 33, 96)
dense = module.dequantize(*inputs["weight"], 4, 33, 96, torch.float32)
torch.save({"y": y, "dense": dense, "layout": module.preferred_layout(torch.device("cpu"), 4, 33, 96, 3)}, sys.argv[3])
"""

PATH = """
import sys
sys.path.insert(0, sys.argv[1])
import wq_kernels
assert wq_kernels.__file__.startswith(sys.argv[1]), wq_kernels.__file__
print(wq_kernels.select("cpu", 4).__name__, wq_kernels.linear.__module__, sorted(wq_kernels.__all__)[-1])
"""


def run(code: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that does not look anything up outside."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=180)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hub") / "repo"
    done = subprocess.run([sys.executable, SCRIPT, out], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(out / "build" / f"torch-{backend}") for backend in BACKENDS]
    return out


def metadata(staged: Path, backend: str) -> dict[str, Any]:
    return json.loads((staged / "build" / f"torch-{backend}" / "metadata.json").read_text())


def test_loaded_from_its_folder_it_multiplies_as_the_reference(staged: Path, tmp_path: Path) -> None:
    import torch

    from wq_kernels import reference

    packed = torch.randint(-(2**31), 2**31, (33, 12)).to(torch.int32)
    zero = torch.randint(-(2**31), 2**31, (5, 3)).to(torch.int32)
    weight, x, bias = (packed, torch.rand(33, 3), zero), torch.randn(2, 96), torch.randn(33)
    torch.save({"x": x, "weight": weight, "bias": bias}, tmp_path / "in.pt")
    run(LOAD, staged, tmp_path / "in.pt", tmp_path / "out.pt", cwd=tmp_path)
    result = torch.load(tmp_path / "out.pt")
    torch.testing.assert_close(result["y"], reference.linear(x, *weight, bias, 4, 33, 96))
    assert torch.equal(result["dense"], reference.dequantize(*weight, 4, 33, 96, torch.float32))
    assert result["layout"] == "stream"


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_file_is_there_and_has_the_digest_that_the_loader_computes(staged: Path, backend: str) -> None:
    from kernels._rust import Digest, DigestAlgorithm, DigestValidationError, Metadata

    folder = staged / "build" / f"torch-{backend}"
    read = Metadata.read_from_file(folder / "metadata.json")
    assert read.digest is not None
    read.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, folder))
    sources = {file.relative_to(PACKAGE).as_posix() for kind in ("*.py", "*.cpp") for file in PACKAGE.rglob(kind)}
    assert set(read.digest.files) == sources | {"_ops.py", "wq_kernels/__init__.py"}
    for name in sources:
        assert (folder / name).read_bytes() == (PACKAGE / name).read_bytes()
    (folder / "more.py").touch()
    try:
        with pytest.raises(DigestValidationError):
            read.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, folder))
    finally:
        (folder / "more.py").unlink()


@pytest.mark.parametrize("backend", BACKENDS)
def test_metadata_says_what_build_toml_says(staged: Path, backend: str) -> None:
    from kernels._rust import Build

    said = metadata(staged, backend)
    build = (ROOT / "kernels" / "build.toml").read_text()
    assert said["backend"]["type"] == backend
    assert [str(b) for b in Build.open(ROOT / "kernels").general.backends] == BACKENDS
    for name in ("name", "license"):
        assert f'{name} = "{said[name]}"' in build
    assert f"version = {said['version']}\n" in build
    assert said["python-depends"] == []
    assert said["id"].startswith(f"_wq_kernels_{backend}_")
    assert said["id"].isidentifier()


def test_the_loader_takes_the_processors_that_the_kernels_run_on(staged: Path) -> None:
    from kernels.archs import _supports_cuda_capability

    archs = metadata(staged, "cuda")["backend"]["archs"]
    assert all(_supports_cuda_capability(archs, which) for which in [(8, 0), (8, 6), (8, 9), (9, 0), (10, 3), (12, 0)])
    assert not _supports_cuda_capability(archs, (7, 5))
    assert "archs" not in metadata(staged, "cpu")["backend"]


def test_with_a_variant_on_the_path_the_package_has_its_name(staged: Path, tmp_path: Path) -> None:
    folder = staged / "build" / "torch-cpu"
    name = metadata(staged, "cpu")["id"]
    assert run(PATH, folder, cwd=tmp_path).stdout.split() == [f"{name}.reference", f"{name}.dispatch", "select"]


def test_ops_have_a_namespace_of_their_own(staged: Path, tmp_path: Path) -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1]); import _ops; print(_ops.add_op_namespace_prefix('linear'))"
    names = {run(code, staged / "build" / f"torch-{b}", cwd=tmp_path).stdout.strip() for b in ("cpu", "cuda")}
    assert names == {f"{metadata(staged, b)['id']}::linear" for b in ("cpu", "cuda")}


def test_the_same_sources_give_the_same_bytes_and_nothing_is_overwritten(staged: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, SCRIPT, tmp_path / "again"], check=True, capture_output=True, timeout=120)
    assert {b: metadata(tmp_path / "again", b) for b in BACKENDS} == {b: metadata(staged, b) for b in BACKENDS}
    assert (tmp_path / "again" / "README.md").read_bytes() == (ROOT / "kernels" / "CARD.md").read_bytes()
    done = subprocess.run([sys.executable, SCRIPT, tmp_path / "again"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "exists" in done.stderr
    assert "Traceback" not in done.stderr
