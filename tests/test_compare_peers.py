"""scripts/compare_peers.py: texts that do not meet, intervals that are right, a report that is gone on with."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "compare_peers.py"


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")


def part(name: str) -> Any:
    return import_module(f"comparison.{name}")


# --- texts ---


def test_no_document_is_calibrated_on_and_evaluated_on(tmp_path: Path) -> None:
    documents = [f"Document {i} says {i * i}." for i in range(400)]
    again = [document.upper().replace(" ", "  ") for document in documents[:200]]
    (tmp_path / "c4.txt").write_text("\n".join([*documents, "", *again]))
    paths = part("texts").prepare(tmp_path, tmp_path / "c4.txt", tmp_path / "wiki.txt")
    learn, test = (paths[name].read_text().lower().split() for name in ("calibration", "web"))
    numbers = [{words[i + 1] for i, word in enumerate(words) if word == "document"} for words in (learn, test)]
    assert numbers[0].isdisjoint(numbers[1])
    assert numbers[0] | numbers[1] == {str(i) for i in range(400)}
    assert 60 < len(numbers[1]) < 140  # about a quarter


def test_the_order_of_the_file_moves_no_document_across() -> None:
    split = part("texts").split
    documents = [f"text number {i}" for i in range(100)]
    learn, test = split("\n".join(documents))
    backwards = split("\n".join(reversed(documents)))
    assert (learn[::-1], test[::-1]) == backwards


def test_code_is_the_same_each_time_and_of_many_files() -> None:
    code = part("texts").code
    assert code() == code()
    assert code().count("import ") > 100


# --- intervals ---


def test_a_row_that_is_always_half_as_far_has_a_ratio_of_one_half() -> None:
    theirs = torch.rand(50).tolist()
    ratio, low, high = part("telling").ratio_interval([value / 2 for value in theirs], theirs)
    assert (ratio, low, high) == pytest.approx((0.5, 0.5, 0.5))  # paired: what the text does to both cancels


def test_the_interval_holds_the_true_ratio_about_as_often_as_it_says() -> None:
    ratio_interval = part("telling").ratio_interval
    generator, held = torch.Generator().manual_seed(0), 0
    for _ in range(100):
        hard = torch.rand(100, generator=generator) + 0.1
        ours = 0.8 * hard * (1 + 0.5 * torch.randn(100, generator=generator))
        _, low, high = ratio_interval(ours.tolist(), hard.tolist())
        held += low < 0.8 < high
    assert 88 <= held <= 100


def test_other_text_is_not_compared() -> None:
    with pytest.raises(ValueError, match="not the same text"):
        part("telling").ratio_interval([1.0, 2.0], [1.0])


def test_blocks_are_contiguous_tokens_of_one_window() -> None:
    values = torch.arange(10.0).reshape(2, 5)
    assert part("scores").block_sums(values, 2).tolist() == [1, 5, 4, 11, 15, 9]


# --- the report ---


def row(name: str, bits: int, kl: float, seed: int = 0, **more: Any) -> dict[str, Any]:
    blocks = [kl * (1 + 0.1 * (i % 3)) for i in range(12)]
    figures = {"perplexity": 20.0, "kl": {"mean": kl, "median": kl / 2, "p99": 9 * kl}, "top1_agreement": 0.8}
    scores = {text: {**figures, "kl_blocks": blocks} for text in ("wikitext2", "code", "web")}
    sizes = {"bits_per_weight": bits + 0.25, "checkpoint_bytes": 10**8, "seconds": 9.0, "cpu_seconds": 8.0}
    made = {"row": name, "bits": bits, "symmetric": True, "seed": seed, "peak_rss_bytes": 10**9}
    return {**made, **sizes, "scores": scores, **more}


def report() -> dict[str, Any]:
    failed = {"row": "autoawq", "bits": 4, "symmetric": True, "seed": 0, "unsupported": "zero points only"}
    texts = {"wikitext2": {}, "code": {}, "web": {}}
    made = [row("wq balanced", 4, 0.12), row("hqq", 4, 0.2), row("auto-round light", 4, 0.06, 0)]
    made += [row("auto-round light", 4, 0.1, 1), row("wq balanced", 3, 0.5), row("hqq", 3, 2.0), failed]
    return {
        "model": "tiny",
        "settings": {"group": 64, "samples": 4, "seqlen": 256, "texts": texts},
        "dense_perplexity": {"wikitext2": 10.0, "code": 5.0, "web": 20.0},
        "rows": made,
    }


def test_the_table_sorts_by_kl_gives_intervals_and_names_what_is_missing() -> None:
    lines = part("telling").table(report(), "wq balanced").splitlines()
    told = [line for line in lines if line.startswith("| ") and "-bit" in line]
    assert [line.split(" | ")[0].strip("| ") for line in told] == [
        "auto-round light",
        "wq balanced",
        "hqq",
        "wq balanced",
        "hqq",
    ]
    assert "0.0800 (0.0600–0.1000, 2 seeds)" in told[0]
    assert "0.67 [0.67, 0.67]" in told[0]
    assert "4.00 [4.00, 4.00]" in told[4]
    assert lines[-1] == "- autoawq, 4-bit sym, seed 0: not supported: zero points only"


def test_comparisons_stay_within_bits_and_grid() -> None:
    found = part("telling").comparisons(report(), "wq balanced")
    assert {(c["row"], c["bits"]) for c in found} == {("hqq", 4), ("hqq", 3), ("auto-round light", 4)}
    assert all(c["interval"][0] <= c["kl_ratio"] <= c["interval"][1] for c in found)


def test_the_plot_names_every_line(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    part("telling").plot(report(), [tmp_path / "plot.svg", tmp_path / "plot.png"])
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    drawn = (tmp_path / "plot.svg").read_text()
    assert all(
        name in drawn for name in ("wq balanced", "hqq", "auto-round light")
    )  # matplotlib leaves them as comments


def test_names_are_moved_apart_and_no_further() -> None:
    spread = part("telling").spread
    assert spread([0.0, 0.5, 1.0], 0.1) == pytest.approx([0.0, 0.5, 1.0])
    assert spread([0.5, 0.5], 0.1) == pytest.approx([0.45, 0.55])
    moved = spread([0.0, 0.02, 0.03, 0.2], 0.1)
    assert moved[0] == 0  # not below the plot
    assert all(b - a > 0.1 - 1e-9 for a, b in pairwise(moved))


def test_error_lines_keep_their_message_and_lose_the_machines_folders(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("noise\nValueError: no file /home/somebody/x/y.bin\nINFO exiting\n")
    assert part("processes").last_words(log) == "ValueError: no file y.bin"
    log.write_text("unsupported: no such grid\nWARNING something\n")
    assert part("processes").last_words(log) == "unsupported: no such grid"


def test_memory_of_children_counts(tmp_path: Path) -> None:
    size = 150 * 2**20
    child = f"import time; x = bytearray({size}); time.sleep(1)"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    done = part("processes").run([sys.executable, "-c", program], tmp_path / "log", foreign=True)
    assert done.code == 0
    assert done.peak_rss_bytes > size


# --- scores and sizes ---


def test_a_model_is_no_distance_from_itself_and_some_from_another(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("llama")
    windows = torch.randint(2, 250, (2, 65), generator=torch.Generator().manual_seed(0))
    scorer = part("scores").Scorer(str(folder), {"text": windows})
    same = scorer.score()["text"]
    assert same["kl"]["mean"] == pytest.approx(0, abs=1e-9)
    assert same["top1_agreement"] == 1
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    dense = model(input_ids=windows).logits[:, :-1].double().log_softmax(-1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.2)
    scorer.put(model.state_dict())
    found = scorer.score()["text"]
    other = model(input_ids=windows).logits[:, :-1].double().log_softmax(-1)
    kl = (dense.exp() * (dense - other)).sum(-1)
    loss = -other.gather(-1, windows[:, 1:, None])
    assert found["kl"]["mean"] == pytest.approx(float(kl.mean()), rel=1e-4)
    assert found["perplexity"] == pytest.approx(float(loss.mean().exp()), rel=1e-4)
    assert sum(found["kl_blocks"]) == pytest.approx(float(kl.sum()), rel=1e-4)


def test_weights_that_are_missing_are_no_weights_of_the_model(tiny_model: Callable[..., Path]) -> None:
    scorer = part("scores").Scorer(str(tiny_model("llama")), {"text": torch.arange(2, 34).reshape(1, 32)})
    state = dict(scorer.model.state_dict())
    del state["model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match="up_proj"):
        scorer.put(state)


def test_a_code_in_each_byte_counts_at_its_own_width(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    layer = "model.layers.0.self_attn.q_proj"
    count = model.get_parameter(f"{layer}.weight").numel()
    codes = torch.zeros(model.get_parameter(f"{layer}.weight").shape, dtype=torch.int8)
    scale = torch.zeros(count // 64, dtype=torch.float16)
    save_file({f"{layer}.qdata": codes, f"{layer}.scale": scale}, tmp_path / "model.safetensors")
    assert part("scores").sizes(tmp_path, model, 3)["bits_per_weight"] == 3.25


# --- from end to end ---


def compare(folder: Path, model: Path, *more: str) -> subprocess.CompletedProcess[str]:
    shape = ["--samples", "2", "--seqlen", "64", "--windows", "1", "--eval-seqlen", "256", "--group", "32"]
    files = ["--calibration", folder / "c4.txt", "--wikitext", folder / "wiki.txt", "--output", folder / "made.json"]
    line = [sys.executable, SCRIPT, model, *shape, *files, "--environments", folder / "none", *more]
    return subprocess.run(line, capture_output=True, text=True)


def test_rows_are_measured_once_and_what_fails_is_recorded(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "c4.txt").write_text("\n".join(f"The {i}th sentence of {i + 7}." for i in range(300)))
    (tmp_path / "wiki.txt").write_text("Some other text. " * 50)
    rows = ["--only", "wq awq", "--only", "hqq", "--reference", "wq awq"]
    first = compare(tmp_path, tiny_model("llama"), *rows)
    assert first.returncode == 0, first.stderr
    made = json.loads((tmp_path / "made.json").read_text())
    ours, theirs = made["rows"]
    assert theirs["error"] == "no environment for hqq"
    assert set(ours["scores"]) == {"wikitext2", "code", "web"}
    assert ours["scores"]["web"]["kl"]["mean"] > 0
    assert ours["bits_per_weight"] == pytest.approx(4.5, abs=0.05)
    assert ours["peak_rss_bytes"] > 10**8
    assert str(tmp_path) not in (tmp_path / "made.json").read_text()
    digest = hashlib.sha256((tmp_path / "made.json").read_bytes()).hexdigest()
    second = compare(tmp_path, tiny_model("llama"), *rows)
    assert second.returncode == 0, second.stderr
    assert "wq awq, 4-bit" not in second.stdout.split("| ")[0]
    assert hashlib.sha256((tmp_path / "made.json").read_bytes()).hexdigest() == digest
    other = compare(tmp_path, tiny_model("llama"), *rows, "--samples", "3")
    assert "made with another samples" in other.stderr


# --- the ablation ---


def test_the_ablation_tells_what_forgetting_a_step_costs() -> None:
    import ablate

    full, worse, best = row("wq balanced", 4, 0.1), row("wq without target", 4, 0.12), row("wq best", 4, 0.08)
    made = {**report(), "rows": [full | {"seconds": 20.0}, worse | {"seconds": 15.0}, best | {"seconds": 50.0}]}
    lines = ablate.table(made).splitlines()[2:]
    assert len(lines) == 6  # two steps, three texts
    assert lines[0] == "| target | 4 sym | wikitext2 | 1.200 | 1.200 to 1.200 | 0.1000 | 5 |"
    assert lines[3] == "| what best adds | 4 sym | wikitext2 | 1.250 | 1.250 to 1.250 | 0.0800 | 30 |"


def test_the_ablation_has_a_row_for_every_step() -> None:
    import ablate

    from wq.pipeline import quantizer
    from wq.solvers import check_steps

    made = ablate.rows()
    for step in ablate.STEPS:
        assert made[f"wq without {step}"] == f"--without {step}"
    assert made["wq without any"].split()[1::2] == list(ablate.STEPS)
    assert check_steps("gptq", ablate.STEPS, quantizer.STEPS) == set(ablate.STEPS)
