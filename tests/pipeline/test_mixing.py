"""Widths for a budget, on tiny models: kept on disk, alike where loaders join, loaded and saved as they are."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from wq import report
from wq.checkpoint import read_headers
from wq.convert import convert
from wq.errors import BudgetError, FormatError, ModelError, SchemeError
from wq.hf import WqConfig, load
from wq.layers import ExpertWeight, WqLinear
from wq.loaders.joined import joined
from wq.pipeline import mixing, sensitivity
from wq.pipeline.quantizer import quantize
from wq.pipeline.units import together
from wq.quantized import describe, split
from wq.structure.towers import model_class
from wq.verify import verify

TEXTS = [f"{i} bottles of beer on the wall, {i} bottles of beer; take {i % 7} down." for i in range(99)]
SMALL: dict[str, Any] = {"group_size": 32, "calibration": TEXTS, "samples": 16, "seqlen": 48, "dtype": "float16"}
IDS = torch.arange(2, 50).reshape(2, 24)
TinyModel = Callable[..., Path]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def from_pretrained(folder: Path, **options: Any) -> Any:
    kind = model_class(AutoConfig.from_pretrained(folder))
    return kind.from_pretrained(folder, **{"dtype": torch.float32, "quantization_config": WqConfig(), **options})


def stored_widths(folder: Path) -> dict[str, int]:
    """By on-disk name, as the tensors and the config have it."""
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    return {n: describe(n, leaves, said).scheme.bits for n, leaves in split(read_headers(folder))[0].items()}


@pytest.fixture(scope="module")
def mixture(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Any]]:
    """`mixture(architecture, **options)`: the folder of a quantized model, and its report; made once."""
    made: dict[str, tuple[Path, Any]] = {}

    def get(architecture: str = "llama", **options: Any) -> tuple[Path, Any]:
        key = str((architecture, sorted(options.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp("mixed") / "out"
            wanted = {"method": "rtn", "target_bpw": 4.7, **SMALL, **options}
            made[key] = folder, quantize(tiny_model(architecture), folder, **wanted)
        return made[key]

    return get


ROUND_TRIPS = [
    ("llama", {}),
    ("llama", {"symmetric": False}),
    ("llama", {"format": "gptq"}),
    ("llama", {"format": "gptq", "symmetric": False, "target_bpw": 5.5}),
    ("llama", {"method": "gptq", "mix": (4, 8), "target_bpw": 6.3}),
    ("llama", {"method": "awq"}),
    ("gpt2", {}),
    ("phi", {"target_bpw": 5.5}),
    ("mamba", {}),
    ("mixtral", {}),
    ("mixtral", {"format": "gptq", "target_bpw": 5.3}),
    ("qwen3_moe", {}),
    ("gpt_oss", {}),
    ("deepseek_v3", {}),
    ("llava", {}),
    ("gemma3", {"format": "gptq", "target_bpw": 5.3}),
]


@pytest.mark.parametrize(("architecture", "options"), ROUND_TRIPS)
def test_a_mixture_loads_is_saved_and_passes_verify(
    architecture: str, options: dict[str, Any], mixture: Callable[..., tuple[Path, Any]], tmp_path: Path
) -> None:
    folder, made = mixture(architecture, **options)
    widths = stored_widths(folder)
    assert len({record["bits"] for record in made["layers"]}) > 1
    for record in made["layers"]:
        pieces = [bits for name, bits in widths.items() if name == record["layer"]]
        assert set(pieces) <= {record["bits"]}
    check = verify(folder)
    assert check["good"], check["problems"]
    model, _ = load(folder, dtype="float32")
    kinds = [m.scheme.bits for m in model.modules() if isinstance(m, (WqLinear, ExpertWeight))]
    assert len(set(kinds)) > 1
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name].to(tensor.dtype), tensor) for name, tensor in before.items())
    configs = [json.loads((f / "config.json").read_text())["quantization_config"] for f in (folder, tmp_path / "again")]
    assert configs[0] == configs[1]
    assert torch.equal(logits(from_pretrained(tmp_path / "again")), logits(model))
    text = model.generate(IDS[:1, :8], max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=1)
    assert text.shape == (1, 12)
    dense = from_pretrained(folder, quantization_config=WqConfig(dequantize=True))
    assert (logits(dense) - logits(model)).norm() / logits(model).norm() < 1e-5


@pytest.mark.parametrize("architecture", ["llama", "phi", "mixtral", "qwen3_moe", "deepseek_v3"])
def test_what_loaders_join_has_one_width(architecture: str, mixture: Callable[..., tuple[Path, Any]]) -> None:
    folder, made = mixture(architecture)
    widths = stored_widths(folder)
    for name, parts in joined(widths).items():
        assert len({widths[part] for part in parts}) == 1, name
    experts = {name.partition(".experts.")[0] for name in widths if ".experts." in name}
    for module in experts:
        assert len({bits for name, bits in widths.items() if name.startswith(f"{module}.experts.")}) == 1
    assert {verdict["loader"] for verdict in made["mixed"]["loaders"] if verdict["takes"]} >= {"vllm"}
    for verdict in made["mixed"]["loaders"]:  # what the report says is what `wq verify` finds on disk
        (found,) = verify(folder, verdict["loader"])["loaders"]
        assert (found["takes"], found["why"]) == (verdict["takes"], verdict["why"])


def test_four_and_eight_bits_are_read_by_all(mixture: Callable[..., tuple[Path, Any]]) -> None:
    folder, made = mixture("qwen3_moe", mix=(4, 8), format="gptq", target_bpw=6.3)
    assert {verdict["loader"] for verdict in made["mixed"]["loaders"] if verdict["takes"]} == {"vllm"}  # experts' sizes
    assert set(stored_widths(folder).values()) == {4, 8}
    folder, made = mixture("llama", mix=(4, 8), target_bpw=6.0, group_size=64)
    assert verify(folder, "vllm")["good"]


STOCK = """
import sys, torch, transformers
kind = getattr(transformers, transformers.AutoConfig.from_pretrained(sys.argv[1]).architectures[0])
model = kind.from_pretrained(sys.argv[1], dtype=torch.float32)
with torch.no_grad():
    torch.save(model(input_ids=torch.arange(2, 50).reshape(2, 24)).logits, sys.argv[2])
assert not any(name == "wq" or name.startswith("wq.") for name in sys.modules)
"""


@pytest.mark.parametrize("architecture", ["llama", "llava"])  # the latter has other names on disk than in the model
def test_transformers_without_wq_computes_the_same(
    architecture: str, mixture: Callable[..., tuple[Path, Any]], tmp_path: Path
) -> None:
    folder, _ = mixture(architecture)
    subprocess.run([sys.executable, "-c", STOCK, folder, tmp_path / "logits"], check=True, cwd=tmp_path)
    stock = torch.load(tmp_path / "logits", weights_only=True)
    ours = logits(from_pretrained(folder))
    assert (stock - ours).norm() / stock.norm() < 1e-5


@pytest.mark.parametrize(("source", "to"), [("compressed-tensors", "gptq"), ("gptq", "compressed-tensors")])
def test_a_mixture_is_converted_with_every_weight_the_same(
    source: str, to: str, mixture: Callable[..., tuple[Path, Any]], tmp_path: Path
) -> None:
    folder, _ = mixture("mixtral", format=source, target_bpw=5.3)
    convert(folder, tmp_path / "other", to=to)
    assert stored_widths(tmp_path / "other") == stored_widths(folder)
    assert verify(tmp_path / "other")["good"]
    assert torch.equal(logits(from_pretrained(tmp_path / "other")), logits(from_pretrained(folder)))
    with pytest.raises(FormatError, match="awq holds 4 bits"):
        convert(folder, tmp_path / "awq", to="awq")


# --- the budget ---


@pytest.mark.parametrize("bpw", [2.6, 3.5, 4.25, 6.0, 8.4])
def test_bits_a_weight_are_kept_on_disk(bpw: float, mixture: Callable[..., tuple[Path, Any]]) -> None:
    folder, made = mixture(target_bpw=bpw)
    packed, _ = split(read_headers(folder))
    stored = 8 * sum(entry.bytes for leaves in packed.values() for entry in leaves.values())
    reached = stored / made["quantized_parameters"]
    assert made["mixed"]["bits_per_weight"] == pytest.approx(reached)
    assert 0.9 * bpw < reached <= bpw  # its units are few


@pytest.mark.parametrize("architecture", ["llama", "mixtral", "qwen3_vl_moe"])
def test_a_size_is_that_of_the_file(
    architecture: str, mixture: Callable[..., tuple[Path, Any]], tiny_model: TinyModel, tmp_path: Path
) -> None:
    """To the byte: what one mixture takes buys at least as good a one, and never a larger one."""
    folder, made = mixture(architecture)
    size = (folder / "model.safetensors").stat().st_size
    assert made["checkpoint_bytes"] == size
    options = {"method": "rtn", **SMALL, "target_size": size}
    again = quantize(tiny_model(architecture), tmp_path / "again", **options)
    assert again["checkpoint_bytes"] <= size
    assert again["mixed"]["target"] == {"checkpoint_bytes": size}
    assert again["mixed"]["expected_kl"] <= made["mixed"]["expected_kl"] * (1 + 1e-9)


def test_the_choice_is_the_best_of_all(mixture: Callable[..., tuple[Path, Any]]) -> None:
    """No unit's width can be exchanged for another without more bytes or more damage."""
    _, made = mixture("llama", target_bpw=3.9)
    units = made["mixed"]["units"]
    assert sum(unit["kl"][str(unit["bits"])] for unit in units) == pytest.approx(made["mixed"]["expected_kl"])
    for unit in units:
        damage = [unit["kl"][str(bits)] for bits in made["mixed"]["widths"]]
        assert damage == sorted(damage, reverse=True)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "below": ({"target_bpw": 1.5}, BudgetError, r"--target-bpw 1.5: .* takes 2\.\d+ to 8\.\d+ bits a weight with"),
    "above": ({"target_bpw": 9}, BudgetError, r"--target-bpw 9: .* takes 2\.\d+ to 8\.\d+ bits a weight with"),
    "below, bytes": ({"target_size": 1000}, BudgetError, r"--target-size 1000: .* takes \d+ to \d+ bytes with"),
    "above, MB": ({"target_size": "3 MB"}, BudgetError, r"--target-size 3 MB: .* takes 0\.1\d+ to 0\.1\d+ MB with"),
    "choice": ({"target_bpw": 3, "mix": (4, 8)}, BudgetError, "takes 4.* to 8.* with a choice of 4, 8 bits"),
    "both": ({"target_bpw": 3, "target_size": "1GB"}, BudgetError, "give one of them"),
    "bits too": ({"target_bpw": 3, "bits": 4}, BudgetError, "--bits 4 is one width for all"),
    "no number": ({"target_bpw": float("nan")}, BudgetError, "must be a number of bits"),
    "no size": ({"target_size": "much"}, BudgetError, "'much'; it must be bytes, or a number and MB"),
    "mix alone": ({"mix": (4, 8)}, BudgetError, "need a budget"),
    "no widths": ({"target_bpw": 3, "mix": ()}, BudgetError, "no width to mix"),
    "odd width": ({"target_bpw": 3, "mix": (3, 5)}, SchemeError, "bits is 5"),
    "awq": ({"target_bpw": 3.5, "format": "awq"}, FormatError, "mixture .* cannot be written: awq holds 4 bits, not 2"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_refused_before_any_work(case: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    options, error, message = BAD[case]
    with pytest.raises(error, match=message):
        quantize(tiny_model(), tmp_path / "out", **{**SMALL, "calibration": "no/such-set", **options})
    assert list(tmp_path.iterdir()) == []


def test_the_limits_that_an_error_tells_can_be_asked_for(tiny_model: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(BudgetError) as caught:
        quantize(tiny_model(), tmp_path / "out", target_bpw=1, **SMALL)
    words = str(caught.value).split()
    for place, limit in enumerate((words[words.index("takes") + 1], words[words.index("to") + 1])):
        made = quantize(tiny_model(), tmp_path / str(place), method="rtn", target_bpw=float(limit), **SMALL)
        assert {unit["bits"] for unit in made["mixed"]["units"]} <= ({2}, {4, 8})[place]


@pytest.mark.parametrize("architecture", ["t5", "bart"])
def test_encoder_decoders_are_refused(architecture: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has an encoder; wq mixes widths in decoders only. Use --bits"):
        quantize(tiny_model(architecture), tmp_path / "out", target_bpw=3.5, **SMALL)


@pytest.mark.parametrize(
    ("text", "count", "unit"),
    [
        (5000, 5000, ""),
        ("5000", 5000, ""),
        ("4.5GB", 4500000000, "GB"),
        (" 2 mib ", 2 << 20, "MiB"),
        ("7kB", 7000, "kB"),
    ],
)
def test_sizes_are_read_as_people_write_them(text: int | str, count: int, unit: str) -> None:
    goal = mixing.parse(None, text, None, None)
    assert goal is not None
    assert (goal.size, goal.unit, goal.widths) == (count, unit, (2, 3, 4, 8))


# --- what is measured ---


def test_units_are_what_reads_one_input_and_what_loaders_join() -> None:
    names = ["a.q_proj", "a.k_proj", "a.v_proj", "a.o_proj", "m.up_proj", "m.gate_proj", "m.experts", "x.dt_proj"]
    assert together(names, []) == [
        ("a.q_proj", "a.k_proj", "a.v_proj"),
        ("a.o_proj",),
        ("m.up_proj", "m.gate_proj"),
        ("m.experts",),
        ("x.dt_proj",),
    ]
    assert together(names, [["m.up_proj", "a.k_proj"], ["a.o_proj"]])[0] == (*names[:3], "m.up_proj", "m.gate_proj")


def test_the_damage_of_a_unit_is_the_kl_of_the_model_with_it_alone_quantized(
    mixture: Callable[..., tuple[Path, Any]], tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a plain model on the same windows, one layer of it rounded in place."""
    from tiny_models import tokenizer

    from wq import grid
    from wq.pipeline import calibration
    from wq.scheme import Scheme
    from wq.solvers import rtn

    _, made = mixture("gemma2")
    tokens = calibration.load(TEXTS, tokenizer(), 16, 48).tokens[-4:]
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model("gemma2"), dtype=torch.float32)
    with torch.no_grad():
        dense = model(input_ids=tokens).logits.log_softmax(-1)
        for unit in made["mixed"]["units"]:
            saved = {}
            for layer in unit["layers"]:
                weight = model.get_submodule(f"{unit['block']}.{layer}").weight.data
                saved[layer] = weight.clone()
                found = rtn.solve(weight, None, Scheme(3, 32))  # `rtn` learns nothing from data
                weight.copy_(grid.dequantize(found.codes, found.scale, found.zero))
            ours = model(input_ids=tokens).logits.log_softmax(-1)
            kl = float((dense.exp() * (dense - ours)).sum(-1).mean())
            assert unit["kl"]["3"] == pytest.approx(kl, rel=0.02, abs=1e-7)
            for layer, weight in saved.items():
                model.get_submodule(f"{unit['block']}.{layer}").weight.data.copy_(weight)


def test_without_memory_for_all_streams_a_block_is_measured_at_once(
    mixture: Callable[..., tuple[Path, Any]], tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, alone = mixture("llama")
    monkeypatch.setattr(sensitivity, "STREAM_BYTES", 0)
    made = quantize(tiny_model(), tmp_path / "out", method="rtn", target_bpw=4.7, **SMALL)
    assert (alone["mixed"]["measured"], made["mixed"]["measured"]) == ("units", "blocks")
    for block in {unit["block"] for unit in made["mixed"]["units"]}:
        sums = [
            sum(unit["kl"]["3"] for unit in one["mixed"]["units"] if unit["block"] == block) for one in (alone, made)
        ]
        assert sums[0] == pytest.approx(sums[1], rel=0.5)  # alone or together, they damage about as much


def test_measuring_changes_nothing_that_is_quantized_later(
    mixture: Callable[..., tuple[Path, Any]], tiny_model: TinyModel, tmp_path: Path
) -> None:
    """One width is a choice, too: the tensors are those of an ordinary run."""
    quantize(tiny_model(), tmp_path / "plain", bits=4, method="gptq", **SMALL)
    size = (tmp_path / "plain" / "model.safetensors").stat().st_size
    made = quantize(tiny_model(), tmp_path / "out", mix=[4], method="gptq", target_size=size, **SMALL)
    assert {unit["bits"] for unit in made["mixed"]["units"]} == {4}
    plain, mixed = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "out"))
    assert plain.keys() == mixed.keys()
    assert all(torch.equal(plain[name], mixed[name]) for name in plain)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("plain", "out")]
    assert configs[0] == configs[1]


# --- what is told ---


def test_the_report_and_the_card_tell_the_widths(mixture: Callable[..., tuple[Path, Any]]) -> None:
    folder, made = mixture("deepseek_v3")
    assert json.loads((folder / "wq_report.json").read_text()) == made
    card = (folder / "README.md").read_text()
    assert f"{made['mixed']['bits_per_weight']:.4g} bits a weight of 4.7" in card
    assert "mlp.experts.gate_up_proj, mlp.experts.down_proj | – " in card  # its first block has no experts
    assert "-bit mixed" in card
    assert "read by wq, transformers, vllm" in card
    assert {record["bits"] for record in made["layers"]} == {unit["bits"] for unit in made["mixed"]["units"]}
    assert report.label(made) == f"{made['mixed']['bits_per_weight']:.3g}-bit mixed"


def test_progress_is_told(tiny_model: TinyModel, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    quantize(
        tiny_model(),
        tmp_path / "out",
        method="rtn",
        target_bpw=4,
        on_mix=lambda done, total: steps.append((done, total)),
        **SMALL,
    )
    assert steps == sorted(steps)
    assert steps[-1][0] == steps[-1][1]


def test_the_command_line_mixes_and_tells(tiny_model: TinyModel, tmp_path: Path) -> None:
    options = ["--calibration", "builtin", "--samples", "8", "--seqlen", "64", "--method", "rtn", "--group", "32"]
    command = [sys.executable, "-m", "wq", "quantize", str(tiny_model()), "-o", str(tmp_path / "out"), *options]
    done = subprocess.run([*command, "--target-bpw", "5", "--mix", "4,8"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "choosing widths" in done.stderr
    assert "bits a weight of 5: units" in done.stdout
    assert "read by wq, transformers, vllm" in done.stdout
    for extra, message in ((["--mix", "4;8", "--target-bpw", "5"], "no list of widths"), (["--mix", "4"], "budget")):
        failed = subprocess.run([*command, "--overwrite", *extra], capture_output=True, text=True)
        assert failed.returncode
        assert message in failed.stderr
        assert "Traceback" not in failed.stderr
