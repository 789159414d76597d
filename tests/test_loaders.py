"""Which loaders take a checkpoint, against what the source of vLLM 0.33.0 and SGLang 0.5.23 says.

`scripts/check_vllm_config.py` compares the same tables and verdicts with the real vLLM, which is too large for a test.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from wq import formats, loaders, quantize
from wq.errors import UnknownNameError
from wq.formats.patterns import refuse_pattern
from wq.formats.stored import Stored
from wq.loaders import Checkpoint, judge, kernels
from wq.loaders.config import excluded, matches
from wq.loaders.joined import joined
from wq.loaders.kernels import Layer
from wq.scheme import Scheme
from wq.verify import verify

B0 = "model.layers.0."
SHAPES = {
    f"{B0}self_attn.q_proj": (256, 256),
    f"{B0}self_attn.k_proj": (128, 256),
    f"{B0}self_attn.v_proj": (128, 256),
    f"{B0}self_attn.o_proj": (256, 256),
    f"{B0}mlp.gate_proj": (512, 256),
    f"{B0}mlp.up_proj": (512, 256),
    f"{B0}mlp.down_proj": (256, 512),
}


def checkpoint(
    format: str = "compressed-tensors",
    bits: int = 4,
    group: int = 128,
    symmetric: bool = True,
    dense: tuple[str, ...] = (),
    said: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    shapes: dict[str, tuple[int, int]] = SHAPES,
    **stored: Any,
) -> Checkpoint:
    """One block of a llama, quantized but for `dense`, with the config that wq writes changed by `said`."""
    scheme = Scheme(bits, group, symmetric)
    layers = {name: Stored(format, scheme, shape, **stored) for name, shape in shapes.items() if name not in dense}
    left = [*dense, "lm_head"]
    method = formats.get(format).config(scheme, left) | (said or {})
    return Checkpoint((config or {}) | {"quantization_config": method}, layers, frozenset(left))


def takes(loader: str, **options: Any) -> bool | None:
    answer: bool | None = judge(checkpoint(**options), loader)["takes"]
    return answer


def only_reason(loader: str, **options: Any) -> dict[str, str]:
    (reason,) = judge(checkpoint(**options), loader)["why"]
    return dict(reason)


# Format, bits, group size, symmetric: whether transformers, vLLM and SGLang take it.
GRIDS: list[tuple[str, int, int, bool, tuple[bool, bool, bool]]] = [
    ("compressed-tensors", 4, 128, True, (True, True, True)),
    ("compressed-tensors", 4, 128, False, (False, True, True)),
    ("compressed-tensors", 4, 32, True, (True, True, True)),
    ("compressed-tensors", 4, -1, True, (True, True, True)),
    ("compressed-tensors", 4, 16, True, (True, True, False)),  # vLLM: ExLlama, Humming
    ("compressed-tensors", 4, 8, False, (False, False, False)),
    ("compressed-tensors", 8, 128, True, (True, True, True)),
    ("compressed-tensors", 8, 128, False, (False, True, False)),  # vLLM: Machete, Humming
    ("compressed-tensors", 2, 128, True, (True, True, False)),  # vLLM: Humming
    ("compressed-tensors", 3, 128, True, (True, True, False)),
    ("compressed-tensors", 3, 128, False, (False, True, False)),
    ("compressed-tensors", 6, 128, True, (True, True, False)),
    ("gptq", 4, 128, True, (True, True, True)),
    ("gptq", 8, -1, True, (True, True, True)),
    ("gptq", 4, 128, False, (True, False, False)),
    ("gptq", 2, 128, True, (True, False, False)),
    ("gptq", 3, 128, True, (True, False, False)),
    ("gptq", 4, 256, True, (True, False, False)),
    ("awq", 4, 128, False, (True, True, True)),
    ("awq", 4, 128, True, (True, True, True)),
    ("awq", 4, 16, False, (True, False, False)),
]


@pytest.mark.parametrize(("format", "bits", "group", "symmetric", "answers"), GRIDS)
def test_grids(format: str, bits: int, group: int, symmetric: bool, answers: tuple[bool, bool, bool]) -> None:
    made = {"format": format, "bits": bits, "group": group, "symmetric": symmetric}
    assert tuple(takes(loader, **made) for loader in loaders.VERSIONS) == answers


def test_vllm_has_two_kernels_at_least_for_what_wq_writes_by_default() -> None:
    for symmetric in (True, False):
        said = judge(checkpoint(symmetric=symmetric), "vllm")["kernels"]
        able = {name.partition(" ")[0] for name, refusal in said.items() if not refusal}
        assert {"Machete", "Marlin", "CPU"} <= able


@pytest.mark.parametrize("loader", ["vllm", "sglang"])
@pytest.mark.parametrize("format", list(formats.FORMATS))
@pytest.mark.parametrize(
    ("dense", "where"),
    [
        ((f"{B0}self_attn.q_proj",), f"{B0}self_attn.qkv_proj"),
        ((f"{B0}self_attn.k_proj", f"{B0}self_attn.v_proj"), f"{B0}self_attn.qkv_proj"),
        ((f"{B0}mlp.up_proj",), f"{B0}mlp.gate_up_proj"),
    ],
)
def test_fused_parts_must_be_all_packed_or_all_dense(
    dense: tuple[str, ...], where: str, format: str, loader: str
) -> None:
    reason = only_reason(loader, format=format, dense=dense)
    assert reason["where"] == where
    assert "they are not stored alike" in reason["problem"]
    assert f"{dense[0].rpartition('.')[2]} dense" in reason["measured"]
    assert judge(checkpoint(format=format, dense=dense), "transformers")["takes"]


def test_fused_parts_of_two_schemes_are_refused() -> None:
    made = checkpoint()
    layers = dict(made.layers)
    layers[f"{B0}mlp.up_proj"] = Stored("compressed-tensors", Scheme(8, 128), (512, 256))
    (reason,) = judge(Checkpoint(made.config, layers, made.dense), "vllm")["why"]
    assert reason["measured"] == (
        "gate_proj 4 bits symmetric in groups of 128, up_proj 8 bits symmetric in groups of 128"
    )


QKV = tuple(f"{B0}self_attn.{part}_proj" for part in "qkv")


@pytest.mark.parametrize(
    ("format", "loader", "answer"),
    [
        ("compressed-tensors", "vllm", True),
        ("compressed-tensors", "sglang", True),
        ("gptq", "vllm", True),  # it looks at the dtypes
        ("gptq", "sglang", False),  # it looks for qkv_proj
        ("awq", "vllm", True),
        ("awq", "sglang", False),
    ],
)
def test_fused_parts_that_are_all_dense_are_looked_up_differently(format: str, loader: str, answer: bool) -> None:
    assert takes(loader, format=format, dense=QKV) is answer
    if not answer:
        reason = only_reason(loader, format=format, dense=QKV)
        assert (reason["where"], reason["problem"]) == (
            f"{B0}self_attn.qkv_proj",
            "it is dense, and the config does not tell SGLang so",
        )


def test_a_row_of_one_group_is_alike_whatever_its_length() -> None:
    """down_proj's 512 columns are four groups of 128, an expert's 128 columns are one: both are groups of 128."""
    one = checkpoint(shapes={"a.q_proj": (128, 128), "a.k_proj": (128, 128)}, group=-1, said=None)
    assert one.grid("a.q_proj") == (4, -1, True)
    said = formats.get("gptq").config(Scheme(4, 128), [])
    assert Checkpoint({"quantization_config": said}, one.layers).grid("a.q_proj") == (4, 128, True)


def test_joined_names() -> None:
    names = ["q_proj", "a.q_proj", "a.k_proj", "a.o_proj", "b.up_proj", "m.experts.0.up_proj", "m.experts.0.gate_proj"]
    assert joined(names) == {
        "q_proj": ("q_proj",),
        "a.qkv_proj": ("a.q_proj", "a.k_proj"),
        "a.o_proj": ("a.o_proj",),
        "b.up_proj": ("b.up_proj",),
    }


def test_shapes() -> None:
    """vLLM pads to Marlin's tiles; SGLang does not, but has a second kernel for awq."""
    odd = {"model.layers.0.mlp.down_proj": (96, 320)}
    assert takes("vllm", shapes=odd, group=32)
    assert not takes("sglang", shapes=odd, group=32)
    assert takes("sglang", format="awq", shapes=odd, group=32, symmetric=False)
    said = judge(checkpoint(shapes=odd, group=32), "vllm")["kernels"]
    assert said["Machete (sm_90)"] == "model.layers.0.mlp.down_proj: groups of 32; it has -1, 64 or 128"
    assert not said["Marlin (sm_75 and newer)"]


def test_zero_points_are_joined_word_by_word() -> None:
    shapes = dict.fromkeys(QKV, (100, 256))
    reason = only_reason("vllm", shapes=shapes, bits=3, symmetric=False)
    assert "ends inside a word" in reason["problem"]
    assert takes("vllm", shapes=shapes, bits=3)


def test_act_order() -> None:
    reason = only_reason("vllm", format="gptq", said={"desc_act": True})
    assert "act-order in groups" in reason["problem"]
    assert takes("vllm", format="gptq", group=-1, said={"desc_act": True})
    assert takes("sglang", format="gptq", said={"desc_act": True}, permuted=True)
    assert not takes("sglang", format="gptq", permuted=True)
    made = checkpoint()
    for order, answers in {"static": (True, True), "group": (False, True), "dynamic": (False, False)}.items():
        group = made.said["config_groups"]["group_0"]
        said = {"config_groups": {"group_0": group | {"weights": group["weights"] | {"actorder": order}}}}
        assert (takes("vllm", said=said), takes("sglang", said=said)) == answers


def test_a_packed_head_must_be_named() -> None:
    shapes = {"lm_head": (512, 256)}
    said: dict[str, Any] = {"ignore": []}
    assert "no target or flag" in only_reason("vllm", shapes=shapes, said=said)["measured"]
    named = checkpoint().said["config_groups"]["group_0"] | {"targets": ["Linear", "re:.*lm_head"]}
    assert takes("vllm", shapes=shapes, said=said | {"config_groups": {"group_0": named}})
    assert takes("vllm", format="gptq", shapes=shapes, said={"lm_head": True})


def test_other_layouts_and_methods() -> None:
    assert "format 'int-quantized'" in only_reason("vllm", said={"format": "int-quantized"})["measured"]
    old = judge(checkpoint(bits=3, variant="aligned"), "vllm")
    assert not old["takes"]
    unknown = judge(checkpoint(said={"quant_method": "auto-round"}), "vllm")
    assert unknown["takes"] is None
    assert "auto-round" in unknown["notes"][0]


def test_reasons_of_many_blocks_are_one() -> None:
    shapes = {f"model.layers.{i}.mlp.down_proj": (96, 320) for i in range(5)}
    assert only_reason("sglang", shapes=shapes, group=32)["where"] == "model.layers.0.mlp.down_proj and 4 more"


def test_dense_vision_towers_are_left_alone() -> None:
    tower = {f"vision.layers.0.self_attn.{part}_proj" for part in "qkv"}
    made = checkpoint(format="gptq")
    assert judge(Checkpoint(made.config, made.layers, made.dense | tower), "sglang")["takes"]


E0 = "model.layers.0.mlp.experts"


def experts(hidden: int = 256, intermediate: int = 128, **options: Any) -> Checkpoint:
    shapes = {
        f"{E0}.{expert}.{name}": (hidden, intermediate) if name == "down_proj" else (intermediate, hidden)
        for expert in range(2)
        for name in ("gate_proj", "up_proj", "down_proj")
    }
    return checkpoint(shapes=shapes, **options)


def test_packed_experts() -> None:
    assert judge(experts(), "vllm")["takes"]
    assert judge(experts(), "sglang")["takes"]
    assert judge(experts(), "transformers")["takes"]
    assert not judge(experts(format="gptq"), "transformers")["takes"]
    assert judge(experts(hidden=192, group=-1), "vllm")["why"][0]["measured"].endswith("hidden size 192")
    assert judge(experts(hidden=192, group=64), "vllm")["takes"]


def test_experts_must_be_alike() -> None:
    made = experts()
    name = f"{E0}.1.up_proj"
    layers = {n: stored for n, stored in made.layers.items() if n != name}
    (reason,) = judge(Checkpoint(made.config, layers, made.dense | {name}), "vllm")["why"]
    assert (reason["where"], reason["measured"]) == (E0, "5 packed on 1 grids, 1 dense")


@pytest.mark.parametrize(("format", "answer"), [("compressed-tensors", True), ("gptq", False), ("awq", False)])
def test_dense_experts_are_told_one_by_one_and_gptq_and_awq_lack_a_word_for_all(format: str, answer: bool) -> None:
    names = tuple(f"{E0}.{expert}.{part}_proj" for expert in range(2) for part in ("gate", "up", "down"))
    assert takes("vllm", format=format, dense=names) is answer


def test_three_dimensional_experts_are_read_by_wq_alone() -> None:
    made = checkpoint()
    for loader in loaders.VERSIONS:
        verdict = judge(Checkpoint(made.config, made.layers, made.dense, frozenset({f"{E0}.down_proj"})), loader)
        assert not verdict["takes"]
        assert verdict["why"][0]["where"] == f"{E0}.down_proj"


# --- what a config says ---


def test_entries_of_ignore_are_names_or_patterns() -> None:
    assert matches("model.a.q_proj", "model.a.q_proj")
    assert not matches("model.a.q_proj", "q_proj")
    assert matches("model.a.q_proj", "re:.*q_proj")
    assert not matches("model.a.q_proj", "re:q_proj")  # from the start of the name


@pytest.mark.parametrize("pattern", [".*q_proj$", r"model\.layers\.\d+\..*", "(a|b)?x", "[a+*]+", "", "lm_head"])
def test_usual_patterns_are_run(pattern: str) -> None:
    assert refuse_pattern(pattern) == ""


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)*b", "(.*a){20}", ".*.*.*.*x", "(", "a" * 2000, "a{2,3}" * 5])
def test_patterns_that_could_hang_are_not_run(pattern: str) -> None:
    assert refuse_pattern(pattern)
    assert not matches("a" * 200, f"re:{pattern}")  # if it were run, this would not return


def test_a_target_by_name_leaves_all_others_dense() -> None:
    made = checkpoint().said
    group = made["config_groups"]["group_0"] | {"targets": [f"{B0}mlp.up_proj"]}
    said = made | {"config_groups": {"group_0": group}}
    assert excluded(said, f"{B0}mlp.down_proj")
    assert not excluded(said, f"{B0}mlp.up_proj")


def test_an_unknown_loader_is_named() -> None:
    with pytest.raises(UnknownNameError, match=r"'exllama' is unknown. Use transformers, vllm, sglang"):
        judge(checkpoint(), "exllama")


def test_kernels_say_what_they_lack() -> None:
    layer = Layer("x", 3, 128, True, 128, 128)
    assert kernels.MARLIN.refusal(layer) == "3 bits symmetric; it has 4 or 8 bits symmetric"
    assert kernels.MACHETE.refusal(Layer("x", 4, 128, True, 64, 128)) == "out_features 64; it needs a multiple of 128"


# --- and of what wq writes ---


@pytest.mark.parametrize(
    ("format", "keep", "answer"),
    [
        ("compressed-tensors", (), True),
        ("compressed-tensors", ("o_proj",), True),
        ("compressed-tensors", ("q_proj",), False),
        ("gptq", ("o_proj",), True),
        ("gptq", ("up_proj",), False),
        ("awq", ("down_proj",), True),
    ],
)
def test_checkpoints_of_wq(
    format: str, keep: tuple[str, ...], answer: bool, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    quantize(tiny_model(), tmp_path / "out", method="rtn", group_size=32, format=format, keep=keep, dtype="float16")
    report = verify(tmp_path / "out", "vllm")
    assert report["loaders"][0]["takes"] is answer, report["problems"]
    assert report["good"] is answer
