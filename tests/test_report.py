"""The model card says what was measured, and what was not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from wq import report

REPORT: dict[str, Any] = {
    "model": "org/model",
    "repo": "org/model",
    "method": "gptq",
    "format": "compressed-tensors",
    "scheme": {"bits": 4, "group_size": 128, "symmetric": True, "scale_dtype": "bfloat16"},
    "dtype": "bfloat16",
    "calibration": {"source": "c4", "samples": 128, "seqlen": 512, "seed": 0, "sha256": "ab" * 32},
    "parameters": 1000,
    "quantized_parameters": 800,
    "source_dtype": "bfloat16",
    "source_bytes": 2_000_000,
    "checkpoint_bytes": 712_345,
    "fallbacks": [],
    "seconds": 12.3,
    "peak_rss_bytes": 1_500_000_000,
    "device": "cpu",
    "command": "wq quantize org/model -o out",
    "versions": {"wq": "0.1.0", "torch": "2.13.0"},
}


def header(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---")[1])


def test_the_header_is_what_the_hub_reads() -> None:
    values = header(report.card(REPORT))
    assert values["base_model"] == "org/model"
    assert values["base_model_relation"] == "quantized"
    assert values["library_name"] == "transformers"
    assert {"wq", "gptq", "4-bit", "compressed-tensors"} == set(values["tags"])


def test_a_local_model_is_no_base_model_on_the_hub() -> None:
    assert "base_model" not in header(report.card({**REPORT, "repo": None, "model": "/somewhere/model"}))
    assert "/somewhere" not in report.card({**REPORT, "repo": None, "model": "/somewhere/model"})


@pytest.mark.parametrize(("format", "symmetric", "stock"), [("compressed-tensors", True, True), ("awq", True, False)])
def test_the_card_promises_only_loaders_that_take_it(format: str, symmetric: bool, stock: bool) -> None:
    card = report.card({**REPORT, "format": format, "scheme": {**REPORT["scheme"], "symmetric": symmetric}})
    assert ("without wq" in card) == stock
    asymmetric = report.card({**REPORT, "scheme": {**REPORT["scheme"], "symmetric": False}})
    assert "WqConfig()" in asymmetric
    assert "without wq" not in asymmetric


@pytest.mark.parametrize(
    "text",
    [
        "quantized 800 of 1,000 parameters (80.0%)",
        "712 kB, from 2 MB of bfloat16",
        "128 × 512 tokens",
        "1.5 GB",
        "12 s",
    ],
)
def test_the_card_tells_what_was_done(text: str) -> None:
    assert text in report.card(REPORT)


def test_layers_that_fell_back_are_named() -> None:
    card = report.card({**REPORT, "fallbacks": [{"layer": "model.layers.3.mlp", "fallback": "saw nothing"}]})
    assert "`model.layers.3.mlp`: saw nothing" in card


def test_what_is_saved_can_be_loaded(tmp_path: Path) -> None:
    report.save(REPORT, tmp_path)
    assert report.load(tmp_path) == REPORT
    assert report.load(tmp_path / "elsewhere") is None


@pytest.mark.parametrize(("count", "text"), [(5, "5 B"), (1500, "1.5 kB"), (114e6, "114 MB"), (5.678e9, "5.68 GB")])
def test_sizes_are_for_people(count: float, text: str) -> None:
    assert report.size(count) == text
