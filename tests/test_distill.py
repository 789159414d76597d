"""Distillation on packed folders: it lowers KL where it may, and leaves everything else as it was."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch
from torch import Tensor

from wq import distill as distilling
from wq import load, quantize
from wq.checkpoint import read_headers, read_tensor
from wq.distill import Pupil, Rates, distill, mean_kl, put, required_by, required_bytes
from wq.errors import CalibrationError, ModelError
from wq.journal import Journal
from wq.verify import verify

TinyModel = Callable[..., Path]

FAST = Rates(scales=5e-3, vectors=5e-3, epochs=3, batch=2)


def windows(count: int = 16) -> Tensor:
    """Text-like ids: short cycles, so that there is something to learn."""
    generator = torch.Generator().manual_seed(3)
    start = torch.randint(2, 200, (count, 1), generator=generator)
    return start + torch.arange(24) % 7


def packed(base: Path, folder: Path, **options: object) -> Path:
    quantize(base, folder, method="rtn", **{"bits": 3, "group_size": 32, **options})
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: read_tensor(entry) for name, entry in read_headers(folder).items()}


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llama", {"symmetric": True}),
        ("llama", {"symmetric": False}),
        ("llama", {"bits": 4, "format": "gptq", "symmetric": False}),
        ("llama", {"bits": 4, "format": "awq", "symmetric": False}),
        ("gpt2", {}),
        ("qwen2", {}),
        ("mixtral", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_kl_falls_and_what_may_not_change_does_not(
    architecture: str, options: dict[str, object], tiny_model: TinyModel, tmp_path: Path
) -> None:
    base = tiny_model(architecture)
    folder = packed(base, tmp_path / "out", **options)
    before = tensors(folder)
    done = distill(folder, base, windows(), rates=FAST)
    assert done["kept"]
    assert done["heldout_kl"]["after"] < done["heldout_kl"]["before"]
    after = tensors(folder)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    allowed = ("weight_scale", "scales", "norm.weight", "bias", "ln_1.weight", "ln_2.weight", "ln_f.weight")
    assert all(name.endswith(allowed) for name in changed), changed
    assert not any("experts" in name for name in changed)
    student, teacher = (load(source, dtype="float32")[0] for source in (folder, base))
    found = mean_kl(teacher, student, windows()[[7, 15]])  # the packed layers compute what was learned
    assert found == pytest.approx(done["heldout_kl"]["after"], rel=1e-3)


def test_codes_learn_where_they_are_asked_to(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = packed(tiny_model("llama"), tmp_path / "out", bits=2)
    before = tensors(folder)
    done = distill(folder, tiny_model("llama"), windows(), rates=Rates(codes=0.02, epochs=16, batch=2))
    after = tensors(folder)
    assert done["kept"]
    assert done["codes"]
    assert any(not torch.equal(before[name], after[name]) for name in before if name.endswith("weight_packed"))
    assert verify(folder)["layers"] == 14


def test_codes_start_as_they_were(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder, base = packed(tiny_model("llama"), tmp_path / "out", symmetric=False), tiny_model("llama")
    teacher, _ = load(base, dtype="float32")
    fixed, free = (Pupil(folder, teacher, torch.device("cpu"), codes) for codes in (False, True))
    for name, learner in free.layers.items():
        assert torch.equal(learner.codes().detach(), fixed.layers[name].codes())
    before = tensors(folder)
    free.settle()
    put(free.entries, free.tensors())
    after = tensors(folder)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_is_no_better_on_windows_held_out_is_not_kept(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = packed(tiny_model("llama"), tmp_path / "out")
    before = tensors(folder)
    done = distill(folder, tiny_model("llama"), windows(), rates=Rates(scales=30.0, vectors=30.0))
    assert not done["kept"]
    after = tensors(folder)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_two_runs_agree(tiny_model: TinyModel, tmp_path: Path) -> None:
    folders = [packed(tiny_model("llama"), tmp_path / name) for name in ("one", "two")]
    for folder in folders:
        distill(folder, tiny_model("llama"), windows(), rates=FAST)
    one, two = map(tensors, folders)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_without_bfloat16_and_without_room_for_notes(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    monkeypatch.setattr(distilling, "_NOTE_EVERY", -1.0)
    monkeypatch.setattr(Journal, "has_room", lambda *_: False)
    folder, notes = packed(tiny_model("llama"), tmp_path / "out"), tmp_path / "notes"
    notes.mkdir()
    seen: list[bool] = []
    done = distill(
        folder,
        tiny_model("llama"),
        windows(),
        rates=FAST,
        journal=Journal(notes),
        on_step=lambda *_: seen.append(any(notes.iterdir())),
    )
    assert done["kept"]
    assert len(seen) == done["steps"]
    assert not any(seen)


def test_what_cannot_be_distilled_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = packed(tiny_model("llama"), tmp_path / "out")
    with pytest.raises(CalibrationError, match="5 calibration windows; distillation needs at least 8"):
        distill(folder, tiny_model("llama"), windows(5))
    pair = packed(tiny_model("t5"), tmp_path / "t5")
    with pytest.raises(ModelError, match="encoder-decoder"):
        distill(pair, tiny_model("t5"), windows())


def test_memory_is_known_before(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = packed(tiny_model("llama"), tmp_path / "out")
    base, _ = load(tiny_model("llama"))
    parameters = sum(parameter.numel() for parameter in base.parameters())
    layers = json.loads((folder / "wq_report.json").read_text())["layers"]
    quantized = sum(layer["shape"][0] * layer["shape"][1] for layer in layers)
    for rates, copies in ((Rates(), 2), (Rates(codes=1e-3), 5)):
        found = required_by(folder, 64, rates)
        assert found["two models"] == 8 * parameters
        assert found["weights of a step, gradients, moments"] == 4 * copies * quantized
        assert found == required_bytes(
            [layer["shape"] for layer in layers], parameters, base.config.vocab_size, 64, rates
        )


MEASURED = """
import json, sys, torch
from pathlib import Path
from wq.distill import Rates, distill, required_by
from wq.machine import keep_memory_tight, peak_rss_bytes, rss_bytes
import wq.hf
folder, base = map(Path, sys.argv[1:])
torch.set_num_threads(1)
keep_memory_tight()
tokens = torch.randint(2, 200, (16, 512))
before = rss_bytes()
distill(folder, base, tokens, rates=Rates(codes=1e-3))
print(json.dumps([peak_rss_bytes() - before, sum(required_by(folder, 512, Rates(codes=1e-3)).values())]))
"""


def test_memory_is_what_was_said(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "max_position_embeddings": 512}
    base = tiny_models.make(tmp_path / "base", "llama", **sizes)
    folder = packed(base, tmp_path / "out", bits=2)
    command = [sys.executable, "-c", MEASURED, str(folder), str(base)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak, said = json.loads(done.stdout.splitlines()[-1])
    assert said == pytest.approx(peak, rel=0.2)
