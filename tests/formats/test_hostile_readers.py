"""Layers damaged in more than one place, and configs that contradict their tensors: an error by name, or the truth."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from synthetic import solution
from torch import Tensor
from transformers import AutoModelForCausalLM

from wq import WqConfig, formats, quantize
from wq.errors import CheckpointError, FormatError, SchemeError
from wq.formats.stored import Packed, Stored
from wq.scheme import Scheme
from wq_kernels import stream

NAME = "model.layers.3.mlp.down_proj"
OUT, IN = 64, 128
ALLOWED = (CheckpointError, FormatError, SchemeError)
Tensors = dict[str, Tensor]

SOURCES = {
    "gptq-4-sym": ("gptq", Scheme(4, 32)),
    "gptq-3-asym": ("gptq", Scheme(3, 32, False)),
    "gptq-8-channel": ("gptq", Scheme(8, -1, False)),
    "awq-asym": ("awq", Scheme(4, 32, False)),
    "awq-channel": ("awq", Scheme(4, -1)),
    "compressed-4-sym": ("compressed-tensors", Scheme(4, 32)),
    "compressed-5-asym": ("compressed-tensors", Scheme(5, 32, False)),
    "compressed-8-channel": ("compressed-tensors", Scheme(8, -1, False)),
}


def made(source: str) -> tuple[str, Tensors, dict[str, Any]]:
    """A whole layer, and the config of its checkpoint."""
    name, scheme = SOURCES[source]
    form = formats.get(name)
    return name, form.pack(solution(torch.Generator().manual_seed(0), scheme, OUT, IN), scheme), form.config(scheme, [])


DIMENSIONS = (0, 1, 2, 4, 5, 8, 12, 16, 20, 32, 48, 64, 128, 256)
DTYPES = (torch.int32, torch.int64, torch.int16, torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.bool)


def damage(tensors: Tensors, chance: random.Random) -> tuple[Tensors, str]:
    """One to three changes, each of which may be none; and what they were."""
    changed, said = dict(tensors), []
    for _ in range(chance.randint(1, 3)):
        leaf = chance.choice(sorted(changed) or ["none"])
        if leaf == "none":
            break
        tensor, kind = changed[leaf], chance.choice(["shape", "dtype", "absent", "transpose", "slice", "values"])
        if kind == "absent":
            del changed[leaf]
        elif kind == "shape":
            shape = [chance.choice(DIMENSIONS) for _ in range(chance.choice((0, 1, 2, 2, 2, 3)))]
            changed[leaf] = torch.zeros(shape, dtype=tensor.dtype)
        elif kind == "dtype":
            changed[leaf] = tensor.to(chance.choice(DTYPES))
        elif kind == "transpose":
            changed[leaf] = tensor.t().contiguous() if tensor.ndim == 2 else tensor
        elif kind == "slice" and tensor.ndim:
            axis = chance.randrange(tensor.ndim)
            changed[leaf] = tensor.narrow(axis, 0, chance.randint(0, tensor.shape[axis])).contiguous()
        elif kind == "values" and tensor.dtype is torch.int32 and tensor.numel():
            changed[leaf] = tensor.clone()
            place = chance.randrange(tensor.numel())
            changed[leaf].view(-1)[place] = chance.choice([-(2**31), -1, 0, 2**31 - 1])
        said.append(f"{leaf} {kind}")
    return changed, ", ".join(said)


@pytest.mark.parametrize("source", SOURCES)
def test_random_damage_is_an_error_by_name_or_a_layer_that_comes_back_bit_for_bit(source: str) -> None:
    """Nothing but wq's own errors leaves `inspect`, and nothing it lets through fails later or loses a bit."""
    name, whole, config = made(source)
    reader, refused, failures = formats.get(name), 0, []
    for seed in range(250):
        tensors, what = damage(whole, random.Random(f"{source} {seed}"))
        case = f"{source} {seed}: {what}"
        try:
            stored = reader.inspect(tensors, (OUT, IN), config, tensors.__getitem__, NAME)
        except ALLOWED as error:
            refused += 1
            if NAME not in str(error):
                failures.append(f"{case}: does not name the layer: {error}")
            continue
        except Exception as error:
            failures.append(f"{case}: {type(error).__name__}: {error}")
            continue
        try:
            back = reader.from_packed(reader.to_packed(tensors, stored), stored)
        except Exception as error:
            failures.append(f"{case}: accepted, then {type(error).__name__}: {error}")
            continue
        for leaf in tensors.keys() - {"weight_shape"}:  # of which wq writes what the model says
            if (
                leaf not in back
                or back[leaf].dtype != tensors[leaf].dtype
                or not torch.equal(back[leaf], tensors[leaf])
            ):
                failures.append(f"{case}: {leaf} does not come back")
    assert not failures, "\n".join(failures[:20])
    assert 80 < refused < 250


@pytest.mark.parametrize(
    "shape", [(OUT * 2, IN), (OUT, IN * 2), (OUT // 2, IN), (OUT, IN // 2), (OUT + 1, IN)], ids=str
)
@pytest.mark.parametrize("source", SOURCES)
def test_a_layer_of_another_shape_than_the_models_is_refused(source: str, shape: tuple[int, int]) -> None:
    name, tensors, config = made(source)
    with pytest.raises(ALLOWED, match=r"down_proj"):
        formats.get(name).inspect(tensors, shape, config, tensors.__getitem__, NAME)


ABSURD: list[Any] = [None, "four", "", [4], {"a": 1}, 4.0, True, 0, -4, 10**30, float("nan")]
FIELDS = ["bits", "group_size", "sym", "desc_act", "zero_point", "dynamic", "lm_head", "pack_dtype", "extra_config"]
FIELDS += ["config_groups", "ignore"]


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("source", SOURCES)
def test_an_absurd_value_in_the_config_is_an_error_by_name_or_changes_nothing(source: str, field: str) -> None:
    name, tensors, config = made(source)
    reader = formats.get(name)
    honest = reader.inspect(tensors, (OUT, IN), config, tensors.__getitem__, NAME)
    wrong = []
    for value in ABSURD:
        try:
            found = reader.inspect(tensors, (OUT, IN), config | {field: value}, tensors.__getitem__, NAME)
        except ALLOWED as error:
            wrong += [] if NAME in str(error) else [(value, error)]
        else:
            wrong += [] if found == honest else [(value, found)]
    assert not wrong


# --- one change, always refused ---


def layer(name: str, scheme: Scheme, variant: str = "", permuted: bool = False) -> tuple[str, Tensors]:
    """A whole layer in a dialect that wq reads and does not write."""
    one = solution(torch.Generator().manual_seed(0), scheme, OUT, IN)
    zero = None if scheme.symmetric else stream.pack(one.zero.t(), scheme.bits).t().contiguous()
    order = torch.randperm(IN, generator=torch.Generator().manual_seed(1)).to(torch.int32) if permuted else None
    packed = Packed(stream.pack(one.codes, scheme.bits), one.scale, zero, order)
    return name, formats.get(name).from_packed(packed, Stored(name, scheme, (OUT, IN), variant, permuted))


WHOLE = {source: made(source)[:2] for source in SOURCES} | {
    "compressed-3-old": layer("compressed-tensors", Scheme(3, 32, False), "aligned"),
    "compressed-act-order": layer("compressed-tensors", Scheme(4, 32), "with g_idx", True),
    "gptq-act-order": layer("gptq", Scheme(4, 32, False), "2", True),
}
SAID: dict[str, Any] = {source: made(source)[2] for source in SOURCES} | {
    "compressed-3-old": {"config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 3}}}},
    "compressed-act-order": {"config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 4}}}},
    "gptq-act-order": {"checkpoint_format": "gptq_v2"},
}

SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "a row less": lambda t: t[:-1],
    "a row more": lambda t: torch.cat([t, t[:1]]),
    "a column less": lambda t: t[..., :-1] if t.ndim > 1 else t[:-1],
    "twice the columns": lambda t: torch.cat([t, t], -1),
    "flat": lambda t: t.flatten() if t.ndim > 1 else t[None],
    "one more dimension": lambda t: t[None],
    "empty": lambda t: t[:0],
    "no dimension": lambda t: t.flatten()[0],
}


def changes() -> list[tuple[str, str, str]]:
    """Source, tensor, and what is done to it: whatever does not leave another, whole layer."""
    found = []
    for source, (_, tensors) in WHOLE.items():
        for leaf, tensor in tensors.items():
            if leaf == "weight_shape":
                continue
            found += [(source, leaf, what) for what, to in SHAPES.items() if to(tensor).shape != tensor.shape]
            floats = (torch.float16, torch.bfloat16, torch.float32)
            fits = floats if tensor.is_floating_point() else (tensor.dtype,)
            found += [(source, leaf, str(dtype)) for dtype in DTYPES if dtype not in fits]
            if leaf not in ("g_idx", "weight_g_idx", "weight_zero_point"):
                found.append((source, leaf, "absent"))
    return found


CHANGES = changes()


def test_there_are_hundreds_of_changes() -> None:
    assert len(CHANGES) >= 300


@pytest.mark.parametrize(("source", "leaf", "what"), CHANGES, ids=str)
def test_a_tensor_that_does_not_fit_is_refused_by_name(source: str, leaf: str, what: str) -> None:
    name, whole = WHOLE[source]
    tensors = dict(whole)
    if what == "absent":
        del tensors[leaf]
    elif what in SHAPES:
        tensors[leaf] = SHAPES[what](tensors[leaf])
    else:
        tensors[leaf] = tensors[leaf].to(getattr(torch, what.removeprefix("torch.")))
    with pytest.raises(CheckpointError, match=NAME):
        formats.get(name).inspect(tensors, (OUT, IN), SAID[source], tensors.__getitem__, NAME)


INDICES: dict[str, Callable[[Tensor], Tensor]] = {
    "negative": lambda g: g.index_fill(0, torch.tensor([5]), -1),
    "as many as groups": lambda g: g.index_fill(0, torch.tensor([5]), IN // 32),
    "2**31 - 1": lambda g: g.index_fill(0, torch.tensor([0]), 2**31 - 1),
    "the least": lambda g: g.index_fill(0, torch.tensor([IN - 1]), -(2**31)),
    "unequal groups": lambda g: g.index_fill(0, (g != 0).nonzero()[0], 0),
    "one group": lambda g: torch.zeros_like(g),
}


@pytest.mark.parametrize("what", INDICES)
@pytest.mark.parametrize("source", ["gptq-4-sym", "gptq-3-asym", "gptq-act-order", "compressed-act-order"])
def test_an_index_of_groups_that_cannot_be_is_refused(source: str, what: str) -> None:
    name, tensors = WHOLE[source]
    leaf = "g_idx" if "g_idx" in tensors else "weight_g_idx"
    tensors = tensors | {leaf: INDICES[what](tensors[leaf])}
    with pytest.raises(CheckpointError, match=f"{NAME}.*group"):
        formats.get(name).inspect(tensors, (OUT, IN), SAID[source], tensors.__getitem__, NAME)


def refused(source: str, config: Any) -> None:
    name, tensors = WHOLE[source]
    with pytest.raises(ALLOWED, match=NAME):
        formats.get(name).inspect(tensors, (OUT, IN), config, tensors.__getitem__, NAME)


@pytest.mark.parametrize("bits", [10**9, 0, -4, 2**63, 8])
def test_a_width_that_contradicts_the_tensors_is_refused(bits: int) -> None:
    groups = {"g": {"targets": ["Linear"], "weights": {"num_bits": bits}}}
    refused("compressed-4-sym", {"config_groups": groups})


SENSELESS: list[Any] = [
    {},
    {"config_groups": None},
    {"config_groups": []},
    {"config_groups": {"g": None}},
    {"config_groups": {"g": {"weights": []}}},
    {"config_groups": {"g": {"targets": 7, "weights": {"num_bits": "four"}}}},
    {"config_groups": {"g": {"targets": ["re:("], "weights": {"num_bits": [4]}}}},
    {"config_groups": {"g": {"targets": [None, 3], "weights": {"num_bits": 4.0}}}},
]


@pytest.mark.parametrize("config", SENSELESS, ids=str)
def test_the_tensors_speak_for_themselves_when_the_config_says_nothing(config: Any) -> None:
    name, tensors = WHOLE["compressed-4-sym"]
    assert formats.get(name).inspect(tensors, (OUT, IN), config, tensors.__getitem__, NAME).scheme.bits == 4


@pytest.mark.parametrize("layout", ["marlin", "gptq_p", 7, ["gptq"], "auto_round:fp8"], ids=str)
def test_a_layout_that_wq_does_not_know_is_refused(layout: Any) -> None:
    refused("gptq-4-sym", {"checkpoint_format": layout})
    refused("awq-asym", {"version": layout})


# --- through from_pretrained ---


def test_the_rest_of_this_file_damages_what_loads(tmp_path: Path, checkpoint: Callable[[str], Path]) -> None:
    for name in ("gptq", "gptq act-order", "awq", "compressed-tensors"):
        assert AutoModelForCausalLM.from_pretrained(checkpoint(name), quantization_config=WqConfig())


@pytest.fixture(scope="module")
def checkpoint(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A quantized folder, asymmetric; `gptq act-order` has real groups of scattered columns."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp("hostile") / "out"
            options = {"group_size": 32, "symmetric": False, "dtype": "float16", "format": name.split()[0]}
            quantize(tiny_model(), folder, method="rtn", **options)
            made[name] = folder
            if "act-order" in name:
                rewrite(folder, folder, scatter, lambda c: c.update(desc_act=True))
        return made[name]

    return get


def scatter(tensors: Tensors) -> None:
    """Columns of every layer in another order than they were quantized in, as act-order leaves them."""
    for name in [name for name in tensors if name.endswith(".g_idx")]:
        order, words = torch.randperm(tensors[name].numel()), name.replace("g_idx", "qweight")
        codes = stream.unpack(tensors[words].t().contiguous(), 4, len(order))
        tensors[words] = stream.pack(codes[:, order], 4).t().contiguous()
        tensors[name] = tensors[name][order]


def rewrite(
    source: Path, target: Path, change: Callable[[Tensors], Any], configure: Callable[[dict[str, Any]], Any]
) -> Path:
    """A copy of a checkpoint with other tensors and another `quantization_config`."""
    if target != source:
        shutil.copytree(source, target)
    tensors, config = load_file(source / "model.safetensors"), json.loads((source / "config.json").read_text())
    change(tensors)
    configure(config["quantization_config"])
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    (target / "config.json").write_text(json.dumps(config))
    return target


Q = "model.layers.1.self_attn.q_proj"


def without(leaf: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.pop(f"{Q}.{leaf}")


def put(leaf: str, value: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({f"{Q}.{leaf}": value(tensors[f"{Q}.{leaf}"]).contiguous()})


def same(_: Any) -> None:
    """Change nothing."""


DAMAGES: dict[str, tuple[str, Callable[[Tensors], Any], str]] = {
    "gptq: codes missing": ("gptq", without("qweight"), r"\.qweight is missing"),
    "gptq: scales missing": ("gptq", without("scales"), r"\.scales is missing"),
    "gptq: zero points missing": ("gptq", without("qzeros"), r"\.qzeros is missing"),
    "gptq: a row less": ("gptq", put("qweight", lambda t: t[:-1]), r"\.qweight is"),
    "gptq: other columns": ("gptq", put("qweight", lambda t: t[:, :32]), r"\.qweight is \[8, 32\]"),
    "gptq: scales of 5 groups": ("gptq", put("scales", lambda t: t[:1].expand(5, -1)), r"5 groups do not divide"),
    "gptq: no groups": ("gptq", put("scales", lambda t: t[:0]), r"0 groups do not divide"),
    "gptq: codes int64": ("gptq", put("qweight", lambda t: t.long()), r"\.qweight is torch\.int64"),
    "gptq: scales int32": ("gptq", put("scales", lambda t: t.int()), r"\.scales is torch\.int32"),
    "gptq: a group of -1": ("gptq act-order", put("g_idx", lambda t: t - 1), r"column \d+ is in group -1"),
    "gptq: a group too many": ("gptq act-order", put("g_idx", lambda t: t + 1), r"is in group 2; there are groups 0"),
    "gptq: one group": ("gptq act-order", put("g_idx", lambda t: t * 0), r"group 0 has 64 columns"),
    "gptq: short g_idx": ("gptq act-order", put("g_idx", lambda t: t[:-1]), r"\.g_idx is \[63\]"),
    "awq: codes missing": ("awq", without("qweight"), r"\.qweight is missing"),
    "awq: scales missing": ("awq", without("scales"), r"\.scales is missing"),
    "awq: zero points missing": ("awq", without("qzeros"), r"\.qzeros is missing"),
    "awq: zero points of 3 groups": ("awq", put("qzeros", lambda t: t[:1].expand(3, -1)), r"\.qzeros is \[3, 8\]"),
    "awq: scales of 3 groups": ("awq", put("scales", lambda t: t[:1].expand(3, -1)), r"3 groups do not divide"),
    "awq: zero points int64": ("awq", put("qzeros", lambda t: t.long()), r"\.qzeros is torch\.int64"),
}


@pytest.mark.parametrize("dequantize", [False, True], ids=["packed", "dequantized"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_gptq_or_awq_checkpoint_is_refused_by_layer(
    damage: str, dequantize: bool, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    name, change, message = DAMAGES[damage]
    folder = rewrite(checkpoint(name), tmp_path / "damaged", change, same)
    with pytest.raises(CheckpointError, match=rf"{Q}.*{message}|{Q}{message}"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=WqConfig(dequantize=dequantize))


def weights(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda config: config["config_groups"]["group_0"]["weights"].update(values)


def targets(*names: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda config: config["config_groups"]["group_0"].update(targets=list(names))


CONTRADICTIONS: dict[str, tuple[str, Callable[[Tensors], Any], Callable[[dict[str, Any]], Any]]] = {
    "asymmetric, zero points gone": ("compressed-tensors", without("weight_zero_point"), same),
    "act-order, g_idx gone": ("gptq act-order", without("g_idx"), same),
    "gptq bits": ("gptq", same, lambda c: c.update(bits=8)),
    "awq bits": ("awq", same, lambda c: c.update(bits=8)),
    "gptq group size": ("gptq", same, lambda c: c.update(group_size=64)),
    "awq group size": ("awq", same, lambda c: c.update(group_size=64)),
    "compressed-tensors group size": ("compressed-tensors", same, weights(group_size=64)),
    "weight_shape": ("compressed-tensors", put("weight_shape", lambda t: t.flip(0) + 1), same),
}


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_a_checkpoint_that_contradicts_its_config_is_refused(
    what: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    name, change, configure = CONTRADICTIONS[what]
    folder = rewrite(checkpoint(name), tmp_path / "damaged", change, configure)
    with pytest.raises(ALLOWED):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=WqConfig())


TARGETS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a number": lambda c: c["config_groups"]["group_0"].update(targets=5),
    "a pattern that overflows": targets("re:a{99999999999}"),
    "a pattern too deep": targets("re:" + "(" * 3000 + ")" * 3000),
}


@pytest.mark.parametrize("what", TARGETS)
def test_targets_that_make_no_sense_are_refused_or_name_no_layer(
    what: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = rewrite(checkpoint("compressed-tensors"), tmp_path / "damaged", same, TARGETS[what])
    with contextlib.suppress(*ALLOWED):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=WqConfig())


def test_groups_of_one_column_are_refused_by_name() -> None:
    tensors = {"weight_packed": torch.zeros(8, 8, dtype=torch.int32), "weight_scale": torch.ones(8, 64)}
    with pytest.raises(ALLOWED, match=NAME):
        formats.get("compressed-tensors").inspect(tensors, (8, 64), None, tensors.__getitem__, NAME)
