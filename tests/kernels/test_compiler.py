"""Compiling an op once: what is kept, what is refused, what is left when it fails."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from wq_kernels import compiler, native

pytestmark = pytest.mark.skipif(bool(compiler.refusal()), reason=f"here, {compiler.refusal()}")

SOURCE = """
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
using torch::stable::Tensor;
Tensor twice(const Tensor& x) { return torch::stable::new_empty(x, {FACTOR * x.size(0)}); }
STABLE_TORCH_LIBRARY(WQ_NAMESPACE, library) { library.def("twice(Tensor x) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(WQ_NAMESPACE, CPU, library) { library.impl("twice", TORCH_BOX(&twice)); }
"""


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where what is compiled goes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "wq"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Its own in every test: a library once loaded stays."""
    path = tmp_path / "example.cpp"
    path.write_text(f"// {tmp_path}\n{SOURCE}")
    return path


def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """A compiler that does what a shell script says."""
    tool = tmp_path / "pretended"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("CXX", str(tool))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_wherever_it_can_be_compiled_the_kernel_is_used(bits: int) -> None:
    """Its own tests are left out where it is not."""
    assert native.unusable(bits) == ""


def test_an_op_is_compiled_once_and_kept(kept: Path, source: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "wq_kernels.compiler"):
        space = compiler.load(source, FACTOR=2)
        assert space.twice(torch.ones(3)).shape == (6,)
        again = compiler.load(source, FACTOR=2)
    assert again.name == space.name
    assert [message.split(",")[0] for message in caplog.messages] == [f"compiling {space.name}"]
    assert [file.name.rpartition("-")[0] for file in kept.iterdir()] == [space.name]
    other = compiler.load(source, FACTOR=3)
    assert other.twice(torch.ones(3)).shape == (9,)
    assert space.twice(torch.ones(3)).shape == (6,)


@pytest.mark.parametrize(
    "damage", [lambda whole: whole[:1000], lambda whole: whole[:-1] + bytes([whole[-1] ^ 1]), lambda whole: b""]
)
def test_a_damaged_library_is_compiled_again(
    damage: Callable[[bytes], bytes], kept: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = compiler.find()
    pretend(tmp_path, monkeypatch, f'touch {tmp_path}/called; exec {done} "$@"')
    code = f"import sys; sys.path[:0] = {sys.path!r}\nfrom pathlib import Path\nfrom wq_kernels import compiler\n"
    code += f"print(compiler.load(Path({str(source)!r}), FACTOR=2).name)"
    first = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    (library,) = kept.iterdir()
    library.write_bytes(damage(library.read_bytes()))
    (tmp_path / "called").unlink()
    second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (tmp_path / "called").exists()
    assert second.stdout == first.stdout
    (tmp_path / "called").unlink()
    subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo warning: old >&2; echo 'x.cpp:3: error: no such thing' >&2; exit 1", "error: no such thing"),
        ("exit 3", "pretended failed: it said nothing"),
        ("exit 0", "could not be run"),
        ('while [ "$1" != -o ]; do shift; done; echo junk > "$2"', "does not load"),
    ],
    ids=["an error", "silence", "nothing made", "junk"],
)
def test_a_compiler_that_fails_says_why_in_a_line(
    script: str, message: str, kept: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(tmp_path, monkeypatch, script)
    with pytest.raises(compiler.CompileError, match=message) as caught:
        compiler.load(source, FACTOR=2)
    assert "\n" not in str(caught.value)
    assert list(kept.iterdir()) == []


def test_no_compiler_and_other_systems_are_said_beforehand(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert compiler.refusal() == "no C++ compiler is installed"
    with pytest.raises(compiler.CompileError, match=r"no C\+\+ compiler"):
        compiler.load(source, FACTOR=2)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert compiler.refusal() == "nothing is compiled on darwin"


def test_a_folder_that_cannot_be_written_is_said(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(compiler.CompileError, match="could not be run"):
        compiler.load(source, FACTOR=2)


def test_many_at_once_each_find_a_whole_library(kept: Path, source: Path) -> None:
    code = f"import sys; sys.path[:0] = {sys.path!r}\nfrom pathlib import Path\nimport torch\n"
    code += f"from wq_kernels import compiler\nspace = compiler.load(Path({str(source)!r}), FACTOR=2)\n"
    code += "assert space.twice(torch.ones(2)).shape == (4,)"
    failed: list[str] = []

    def run() -> None:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
        failed.extend([done.stderr] if done.returncode else [])

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len(list(kept.iterdir())) == 1


@pytest.mark.parametrize(
    ("level", "lacks", "expected"),
    [
        ("AVX512", set(), {"-mavx512f", "-mavx512bf16", "-mavx2"}),
        ("AVX512", {"avx512_bf16"}, {"-mavx512f", "-mavx2"}),
        ("AVX512", {"avx512_f"}, {"-mavx2", "-mfma"}),
        ("AVX2", set(), {"-mavx2", "-mfma"}),
        ("AVX2", {"fma3"}, set()),
        ("DEFAULT", set(), set()),
    ],
)
def test_what_the_compiler_may_use_is_what_processor_and_torch_do(
    level: str, lacks: set[str], expected: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    able = {name: name not in lacks for name in compiler._AVX512 | compiler._BFLOAT16} | {"architecture": "x86_64"}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: level)
    assert expected <= set(compiler.processor())
    assert bool(compiler.processor()) == bool(expected)
    assert ("-mavx512bf16" in compiler.processor()) == ("-mavx512bf16" in expected)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able | {"architecture": "arm64"})
    assert compiler.processor() == []
