"""Giving pages of mapped files back, and nothing else."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from wq.machine import Mapped

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc and madvise are Linux's")


def mapped_bytes(file: Path) -> int:
    """Resident bytes of the mappings of a file."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(maxsplit=1)[0]:
            inside = line.endswith(str(file))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def test_the_pages_of_a_mapped_tensor_go_and_come_back(tmp_path: Path) -> None:
    file = tmp_path.resolve() / "model.safetensors"
    expected = {name: torch.randn(1 << 20) for name in ("first", "second")}
    save_file(expected, file)
    with safe_open(file, "pt") as stored:
        tensors = {name: stored.get_slice(name)[...] for name in expected}
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)
        whole = mapped_bytes(file)
        assert whole >= 8 << 20
        mapped = Mapped([file])
        mapped.forget(tensors["first"])
        copy.deepcopy(mapped)  # a model that was loaded carries one
        assert whole - mapped_bytes(file) >= (4 << 20) - 8192  # but for pages that it shares
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_memory_that_is_no_mapping_of_the_files_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"other": torch.ones(4)}, file)
    mine = torch.randn(1 << 20)
    twin = mine.clone()
    for mapped in (Mapped([file]), Mapped([])):
        mapped.forget(mine)
        mapped.forget(mine[::2])
    assert torch.equal(mine, twin)
