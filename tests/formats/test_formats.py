"""The contract that every registered format keeps, and the registry."""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest
import torch
from synthetic import solution

from wq import formats
from wq.errors import FormatError, GroupSizeError, UnknownNameError
from wq.formats import FORMATS
from wq.scheme import BITS, Scheme

NAMES = sorted(FORMATS)
SHAPES = ((32, 96), (40, 96), (33, 96), (7, 160), (1, 20), (64, 160), (31, 100))
GROUPS = (32, 20, -1)


def fits(name: str, scheme: Scheme, shape: tuple[int, int]) -> bool:
    try:
        formats.get(name).check(scheme, shape, "layer")
    except (FormatError, GroupSizeError):
        return False
    return True


CASES = [
    (name, scheme, shape)
    for name, bits, symmetric, group, shape in product(NAMES, BITS, (True, False), GROUPS, SHAPES)
    if fits(name, scheme := Scheme(bits, group, symmetric), shape)
]


def name_of(value: object) -> str:
    if isinstance(value, Scheme):
        return f"{value.bits}bit-{'sym' if value.symmetric else 'asym'}-{value.group_size}"
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


cases = pytest.mark.parametrize(("name", "scheme", "shape"), CASES, ids=name_of)


def test_every_format_and_width_is_among_the_cases() -> None:
    lacking = {"awq": {2, 3, 5, 6, 7, 8}, "gptq": {5, 6, 7}, "compressed-tensors": set()}
    expected = {(name, b, s) for name, b, s in product(NAMES, BITS, (True, False)) if b not in lacking[name]}
    assert {(name, scheme.bits, scheme.symmetric) for name, scheme, _ in CASES} == expected
    assert {shape for name, _, shape in CASES if name == "compressed-tensors"} == set(SHAPES)
    assert {shape for name, _, shape in CASES if name == "awq"} == {s for s in SHAPES if s[0] % 8 == 0}


@cases
def test_unpacking_gives_back_every_bit(
    name: str, scheme: Scheme, shape: tuple[int, int], generator: torch.Generator
) -> None:
    form, s = formats.get(name), solution(generator, scheme, *shape)
    before = [t.clone() for t in s[:3]]
    packed = form.pack(s, scheme)
    words = {key: t.clone() for key, t in packed.items()}
    back = form.unpack(packed, scheme, shape)
    for mine, now, then in zip(back[:3], s[:3], before, strict=True):
        assert (mine.shape, mine.dtype) == (then.shape, then.dtype)
        assert torch.equal(mine, then)
        assert torch.equal(now, then)
        assert mine.is_contiguous()
    assert all(torch.equal(packed[key], words[key]) for key in words)
    assert all(t.is_contiguous() for t in packed.values())


@cases
def test_packing_meta_tensors_gives_the_same_names_shapes_and_dtypes(
    name: str, scheme: Scheme, shape: tuple[int, int], generator: torch.Generator
) -> None:
    s = solution(generator, scheme, *shape)
    ghost = s._replace(**{key: getattr(s, key).to("meta") for key in ("codes", "scale", "zero")})
    real, meta = ({key: (t.shape, t.dtype) for key, t in formats.get(name).pack(x, scheme).items()} for x in (s, ghost))
    assert real == meta


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", NAMES)
def test_scales_are_stored_as_they_are_or_refused(name: str, dtype: str, generator: torch.Generator) -> None:
    form, scheme = formats.get(name), Scheme(4, 32, False, dtype)
    if not fits(name, scheme, (32, 64)):
        assert dtype != "float16"
        with pytest.raises(FormatError, match=f"layers.0.q_proj.*{dtype}"):
            form.check(scheme, (32, 64), "layers.0.q_proj")
        return
    s = solution(generator, scheme, 32, 64)
    back = form.unpack(form.pack(s, scheme), scheme, (32, 64))
    assert back.scale.dtype is getattr(torch, dtype)
    assert torch.equal(back.scale, s.scale)


@pytest.mark.parametrize("name", NAMES)
def test_a_group_that_does_not_divide_is_refused_with_the_layer(name: str) -> None:
    with pytest.raises(GroupSizeError, match=r"model\.layers\.7\.mlp\.down_proj: in_features 96"):
        formats.get(name).check(Scheme(), (64, 96), "model.layers.7.mlp.down_proj")


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_the_config_is_json_names_the_method_and_does_not_depend_on_the_order_of_dense(
    name: str, symmetric: bool
) -> None:
    form, scheme = formats.get(name), Scheme(4, 64, symmetric)
    dense = ["lm_head", "model.layers.1.mlp.gate", "model.layers.0.mlp.gate"]
    given = list(dense)
    values = form.config(scheme, dense)
    assert values["quant_method"] == form.QUANT_METHOD
    assert json.loads(json.dumps(values)) == values
    assert values == form.config(scheme, dense[::-1])
    assert dense == given


def test_an_unknown_format_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(UnknownNameError, match="'gguf'") as caught:
        formats.get("gguf")
    assert all(name in str(caught.value) for name in FORMATS)


def test_one_line_registers_a_format(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("elsewhere_format")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(FORMATS, "elsewhere", module.__name__)
    assert formats.get("elsewhere") is module


def test_an_installed_package_offers_a_format_but_never_replaces_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "offered_format.py").write_text("QUANT_METHOD = 'offered'\n")
    info = tmp_path / "offered_format-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: offered-format\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[wq.formats]\noffered = offered_format\ngptq = offered_format\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "offered_format", raising=False)
    assert formats.get("offered").QUANT_METHOD == "offered"
    assert formats.get("gptq").QUANT_METHOD == "gptq"
    with pytest.raises(UnknownNameError, match="offered"):
        formats.get("absent")
