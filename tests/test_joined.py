"""Configs of several schemes: who has which, and what vLLM, SGLang and GPTQModel make of them."""

from __future__ import annotations

import re
from typing import Any

import pytest

from wq import formats
from wq.errors import FormatError
from wq.formats import compressed_tensors, gptq
from wq.formats.stored import Stored
from wq.loaders import Checkpoint, judge
from wq.loaders.config import excluded, width
from wq.loaders.joined import targets
from wq.scheme import Scheme, Targets
from wq.verify.files import harmless
from wq.verify.found import Found

B0, B1 = "model.layers.0.", "model.layers.10."
E1 = f"{B1}block_sparse_moe.experts"
QKV = [f"{B0}self_attn.{part}_proj" for part in "qkv"]
WIDTHS = {
    **dict.fromkeys(QKV, 4),
    f"{B0}self_attn.o_proj": 8,
    f"{B0}mlp.gate_proj": 8,
    f"{B0}mlp.up_proj": 8,
    f"{B0}mlp.down_proj": 4,
    f"{B1}self_attn.o_proj": 4,
    **{f"{E1}.{expert}.{leaf}": 8 for expert in range(12) for leaf in ("w1", "w2", "w3")},
}
JOINED = {f"{B0}self_attn.qkv_proj": QKV, f"{B0}mlp.gate_up_proj": [f"{B0}mlp.gate_proj", f"{B0}mlp.up_proj"]}


def schemes(widths: dict[str, int] = WIDTHS, symmetric: bool = True) -> dict[str, Scheme]:
    return {name: Scheme(bits, 32, symmetric) for name, bits in widths.items()}


def config(format: str, widths: dict[str, int] = WIDTHS) -> dict[str, Any]:
    values: dict[str, Any] = formats.get(format).config(Scheme(4, 32), ["lm_head"], targets(schemes(widths)))
    return values


def test_layers_are_named_once_and_joined_ones_also_together() -> None:
    found = targets(schemes())
    assert {one.joined: list(one.names) for one in found if one.joined} == JOINED
    assert sorted(name for one in found for name in one.names) == sorted(name for name in WIDTHS if E1 not in name)
    (experts,) = (one.experts for one in found if one.experts)
    assert re.match(rf"{experts}\.\d+\.", f"language_model.{E1}.11.w2")
    assert not re.match(rf"{experts}\.", f"model.layers.110.{E1.partition('10.')[2]}.1.w1")


def test_parts_that_differ_have_no_name_together() -> None:
    found = targets(schemes({**WIDTHS, QKV[1]: 2}))
    assert {one.joined for one in found} == {"", f"{B0}mlp.gate_up_proj"}
    assert {one.scheme.bits for one in found if one.names == (QKV[1],)} == {2}


def test_names_in_the_model_are_there_too_where_they_differ() -> None:
    (one,) = targets({"language_model.model.layers.0.o": Scheme()}, {"language_model.model.layers.0.o": "model.o"})
    assert one.names == ("language_model.model.layers.0.o", "model.o")


def test_experts_of_two_stacks_are_told_by_their_whole_names() -> None:
    both = {f"{stack}.layers.0.mlp.experts.1.w1": Scheme(bits) for stack, bits in (("encoder", 4), ("decoder", 8))}
    for one in targets(both):
        named = "encoder" if one.scheme.bits == 4 else "decoder"
        assert [
            stack for stack in ("encoder", "decoder") if re.match(one.experts, f"{stack}.layers.0.mlp.experts")
        ] == [named]


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq"])
@pytest.mark.parametrize("class_first", [True, False])
def test_every_name_that_a_loader_looks_up_has_its_width(format: str, class_first: bool) -> None:
    said = config(format)
    for name, bits in WIDTHS.items():
        assert width(said, name, (name,), class_first) == bits
        assert not excluded(said, name)
    for name, parts in JOINED.items():
        assert width(said, name, tuple(parts), class_first) == WIDTHS[parts[0]]
    if format == "gptq":  # it asks for the module, not for its matrices
        assert width(said, E1, (E1,), class_first) == 8
        assert excluded(said, "lm_head")
    found = Found()
    assert harmless(said, found) == said
    assert not found.problems


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq"])
def test_loaders_take_four_and_eight_bits_side_by_side(format: str) -> None:
    shapes = {name: (256, 128) if name.endswith(("down_proj", "w2")) else (128, 256) for name in WIDTHS}
    layers = {name: Stored(format, scheme, shapes[name]) for name, scheme in schemes().items()}
    checkpoint = Checkpoint({"quantization_config": config(format)}, layers, frozenset({"lm_head"}))
    for loader in ("vllm", "sglang"):
        verdict = judge(checkpoint, loader)
        assert verdict["takes"], verdict["why"]


@pytest.mark.parametrize(
    ("format", "bits", "answers"),
    [("compressed-tensors", 3, (True, False)), ("compressed-tensors", 2, (True, False)), ("gptq", 3, (False, False))],
)
def test_each_layer_is_judged(format: str, bits: int, answers: tuple[bool, bool]) -> None:
    """vLLM has a kernel for all widths of compressed-tensors, Humming; SGLang has none."""
    widths = {name: 4 for name in WIDTHS if E1 not in name} | {f"{B0}mlp.down_proj": bits}
    layers = {name: Stored(format, scheme, (128, 256)) for name, scheme in schemes(widths).items()}
    checkpoint = Checkpoint({"quantization_config": config(format, widths)}, layers, frozenset({"lm_head"}))
    verdicts = [judge(checkpoint, loader) for loader in ("vllm", "sglang")]
    assert tuple(verdict["takes"] for verdict in verdicts) == answers
    for verdict in verdicts:
        assert all(reason["where"] == f"{B0}mlp.down_proj" for reason in verdict["why"])


def test_a_joined_layer_that_a_config_names_by_its_parts_only_is_refused_for_gptq() -> None:
    said = config("gptq")
    rules = {rule: values for rule, values in said["dynamic"].items() if "gate_up_proj" not in rule}
    layers = {name: Stored("gptq", scheme, (128, 256)) for name, scheme in schemes().items()}
    for loader, who in (("vllm", "vLLM"), ("sglang", "SGLang")):
        (reason,) = judge(Checkpoint({"quantization_config": said | {"dynamic": rules}}, layers), loader)["why"]
        assert reason["where"] == f"{B0}mlp.gate_up_proj"
        assert reason["problem"].startswith(f"{who} looks it up under this name")
        assert reason["measured"] == "4 bits said, 8 stored"


def test_a_group_for_all_linear_layers_hides_named_parts_from_sglang_alone() -> None:
    said = compressed_tensors.config(Scheme(4, 32), ["lm_head"])
    named = compressed_tensors.config(Scheme(), [], [Targets(Scheme(8, 32), tuple(QKV))])["config_groups"]["group_0"]
    said["config_groups"]["group_1"] = named
    layers = {name: Stored("compressed-tensors", Scheme(8, 32), (128, 256)) for name in QKV}
    checkpoint = Checkpoint({"quantization_config": said}, layers)
    assert judge(checkpoint, "vllm")["takes"]
    (reason,) = judge(checkpoint, "sglang")["why"]
    assert (reason["where"], reason["measured"]) == (f"{B0}self_attn.qkv_proj", "4 bits said, 8 stored")


# --- what formats write ---


def test_compressed_tensors_has_a_group_for_each_scheme_and_no_class() -> None:
    groups = config("compressed-tensors")["config_groups"]
    assert {group["weights"]["num_bits"] for group in groups.values()} == {4, 8}
    assert "Linear" not in [target for group in groups.values() for target in group["targets"]]
    from compressed_tensors.quantization import QuantizationConfig

    QuantizationConfig(**config("compressed-tensors"))


def test_gptq_has_rules_for_other_widths_only() -> None:
    rules = config("gptq")["dynamic"]
    assert set(map(str, rules.values())) == {"{'bits': 8}"}
    matched = {name for name in [*WIDTHS, *JOINED] for rule in rules if re.match(rule.removeprefix("+:"), name)}
    assert matched == {name for name, bits in WIDTHS.items() if bits == 8} | {f"{B0}mlp.gate_up_proj"}
    per_row = gptq.config(Scheme(4, 32), [], [Targets(Scheme(4, -1), ("a",))])
    assert per_row["dynamic"] == {"+:^a$": {"group_size": -1}}


def test_what_a_format_cannot_mix_is_refused() -> None:
    with pytest.raises(FormatError, match="awq has one scheme for all layers"):
        config("awq")
    assert formats.get("awq").config(Scheme(4, 32), [], targets(schemes(dict.fromkeys(WIDTHS, 4))))["bits"] == 4
    with pytest.raises(FormatError, match=r"o_proj: gptq has symmetric layers or asymmetric ones"):
        gptq.config(Scheme(4, 32), [], targets({f"{B0}self_attn.o_proj": Scheme(4, 32, False)}))
