"""scripts/bench_cpu.py: what it measures is what it says, and a contender that cannot run says why."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from wq.pipeline.quantizer import quantize
from wq_kernels import registry

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench_cpu.py"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return importlib.import_module("bench_cpu")


@pytest.mark.parametrize(
    ("dtype", "layout", "bound"),
    [
        ("bfloat16", "native", 4e-3),
        ("float32", "native", 1e-5),
        ("bfloat16", "int4pack", 4e-3),
        ("float32", "bags", 1e-5),
    ],
)
def test_a_product_is_checked_and_timed_for_every_number_of_rows(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, dtype: str, layout: str, bound: float
) -> None:
    kernel = registry.cpu_module(layout)
    if kernel.unusable(4):
        pytest.skip(f"here, {kernel.unusable(4)}")
    monkeypatch.setattr(registry, "CPU_LAYOUTS", (layout,))
    monkeypatch.setattr(bench, "ROWS", (1, 70))
    rows = bench.products("small", (64, 128), getattr(torch, dtype), 4, 7)
    assert [row["rows"] for row in rows] == [1, 70]
    for row in rows:
        assert (row["layout"], row["dtype"]) == (layout, dtype)
        assert row["relative_error"] < bound
        assert 0 < row["seconds"]["p10"] <= row["seconds"]["median"] <= row["seconds"]["p90"]
        assert row["speedup"]["median"] > 0
    assert ("kernel_seconds" in rows[0]) == (layout != "bags")
    assert "kernel_seconds" not in rows[1]


def test_ratios_are_those_of_a_round(bench: ModuleType) -> None:
    dense = argparse.Namespace(seconds={"decode": [4.0, 40.0, 8.0], "compiled": [2.0, 20.0, 4.0]})
    packed = argparse.Namespace(
        name="wq", about={"layers": ["x"]}, seconds={"decode": [2.0, 20.0, 4.0], "compiled": [1.0, 10.0, 2.0]}
    )
    row = bench.summary(packed, dense, 2)
    assert row["decode"]["speedup"] == {"median": 2.0, "p10": 2.0, "p90": 2.0}
    assert row["decode"]["tokens_per_second"] == 0.25
    assert row["compiled"]["speedup_over_dense_eager"]["median"] == 4.0


def test_contenders_run_in_turns_and_one_that_cannot_says_why(
    bench: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    dense = tiny_model()
    quantize(dense, tmp_path / "packed", method="rtn", group_size=32)
    python = tmp_path / "peers" / "gptqmodel" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')  # which has no gptqmodel
    python.chmod(0o755)
    given = ["model", dense, tmp_path / "packed", "--environments", tmp_path / "peers", "--gptq", tmp_path / "packed"]
    more = ["--rounds", "1", "--threads", "1", "--dtypes", "float32", "--out", tmp_path / "result.json"]
    monkeypatch.setattr(sys, "argv", ["bench_cpu.py", *map(str, given), *map(str, more)])
    monkeypatch.setattr(bench, "__file__", str(SCRIPT))
    bench.main()
    made = json.loads((tmp_path / "result.json").read_text())
    by_name = {row["contender"]: row for row in made["results"]}
    rounded = "wq, head in 8 bits"
    assert list(by_name) == ["dense", "wq", rounded, "gptqmodel"]
    assert "gptqmodel" in by_name["gptqmodel"]["error"]
    assert by_name["wq"]["layers"] == ["Linear", "WqLinear"]
    assert by_name[rounded]["layers"] == ["WqLinear"]
    for name in ("dense", "wq", rounded):
        assert by_name[name]["prefill"]["tokens_per_second"] > 0
        assert by_name[name]["first_token"]["speedup"]["median"] > 0
        assert by_name[name]["peak_bytes"] > 0


def test_the_plot_has_a_panel_for_each_dtype_and_model(bench: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib draws the plot; nothing else needs it")
    results = SCRIPT.parents[1] / "benchmarks" / "results"
    bench.plot(results / "2026-11-26-cpu.json", tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").read_text().count('id="axes_') == 4
