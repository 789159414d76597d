"""scripts/bench_processes.py: real runs in one and two processes, and what they say of a window."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


def test_each_number_of_processes_is_run_and_compared(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "scripts")
    bench = importlib.import_module("bench_processes")
    given = [tiny_model(), "--calibration", "builtin", "--samples", "8", "16", "--seqlen", "32"]
    monkeypatch.setattr(sys, "argv", ["bench_processes.py", *map(str, given), "--output", str(tmp_path / "made.json")])
    bench.main()
    made = json.loads((tmp_path / "made.json").read_text())
    assert [row["processes"] for row in made["rows"]] == [1, 2]
    first = made["rows"][0]["seconds_per_window"]
    for row in made["rows"]:
        few, many = row["seconds"]
        assert min(few, many) > 0
        assert row["seconds_per_window"] == pytest.approx((many - few) / 8, abs=2e-3)  # of rounded seconds
        assert row["speedup"] == pytest.approx(first / row["seconds_per_window"], abs=6e-3)
