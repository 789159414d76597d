"""Presets: what each stands for, and that what is said explicitly counts more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from wq import presets, quantize
from wq.errors import CalibrationError, UnknownNameError

TinyModel = Callable[..., Path]


def run(model: Path, folder: Path, **options: Any) -> dict[str, Any]:
    return quantize(model, folder, **{"calibration": "builtin", "seqlen": 32, "samples": 8, **options})


def test_balanced_is_the_default(tiny_model: TinyModel, tmp_path: Path) -> None:
    made = run(tiny_model(), tmp_path / "out")
    assert made["preset"] == "balanced"
    assert made["method"] == "gptq"
    assert made["without"] == []
    assert all("drift_share" in layer and "refinements" in layer for layer in made["layers"])


def test_fast_leaves_out_what_takes_time(tiny_model: TinyModel, tmp_path: Path) -> None:
    made = run(tiny_model(), tmp_path / "out", preset="fast", samples=None)
    assert made["without"] == ["refine", "sequence", "target"]
    assert made["calibration"]["samples"] == presets.PRESETS["fast"].samples
    assert not any("drift_share" in layer for layer in made["layers"])


@pytest.mark.parametrize("bits", [2, 3])
def test_best_teaches_blocks_and_the_whole_model(bits: int, tiny_model: TinyModel, tmp_path: Path) -> None:
    steps: list[tuple[int, int, float]] = []
    made = run(
        tiny_model(), tmp_path / "out", preset="best", samples=32, bits=bits, on_step=lambda *step: steps.append(step)
    )
    record = made["distillation"]
    assert record["codes"] == (bits == 2)
    assert (record["windows"], record["heldout_windows"]) == (7, 1)  # a quarter of all, which solvers did not see
    assert max(layer["tokens"] for layer in made["layers"]) == 21 * 32  # every eighth of their own is held out
    assert len(steps) == record["steps"] == steps[-1][0] == steps[-1][1]
    if record["kept"]:
        assert record["heldout_kl"]["after"] < record["heldout_kl"]["before"]
    assert all(("learned" in layer) == (bits == 2) for layer in made["layers"])
    assert (made["learning"] is not None) == (bits == 2)
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("of 14 layers learned with their block" in card) == (bits == 2)


@pytest.mark.parametrize(("samples", "reserve"), [(32, 8), (128, 32), (160, 40), (256, 128), (None, 256)])
def test_solvers_take_no_more_than_balanced_does(samples: int | None, reserve: int) -> None:
    made = presets.recipe("best", samples=samples)
    assert made.reserve == reserve
    assert made.samples - reserve <= 128


def test_best_without_the_memory_for_it_is_balanced_and_says_so(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presets, "free_bytes", lambda device: 1000)
    made = run(tiny_model(), tmp_path / "out", preset="best", samples=32)
    assert "of memory, and 1 kB is free" in made["distillation"]["reason"]
    assert "not distilled" in (tmp_path / "out" / "README.md").read_text()


def test_what_is_said_counts_more(tiny_model: TinyModel, tmp_path: Path) -> None:
    made = run(tiny_model(), tmp_path / "out", preset="best", method="rtn")
    assert made["method"] == "rtn"
    assert "distillation" not in made
    other = run(tiny_model(), tmp_path / "two", preset="fast", without=["order"])
    assert other["without"] == ["order", "refine", "sequence", "target"]


def test_what_no_one_knows_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="preset 'fastest' is unknown; wq has fast, balanced, best"):
        run(tiny_model(), tmp_path / "out", preset="fastest")
    with pytest.raises(
        UnknownNameError, match="gptq has no step 'luck' to leave out; it has importance, order, refine"
    ):
        run(tiny_model(), tmp_path / "out", without=["luck"])
    with pytest.raises(UnknownNameError, match="rtn has no step 'order'"):
        run(tiny_model(), tmp_path / "out", method="rtn", without=["order"])
    with pytest.raises(CalibrationError, match="preset best needs at least 32 windows"):
        run(tiny_model(), tmp_path / "out", preset="best", samples=31)
    assert not (tmp_path / "out").exists()
