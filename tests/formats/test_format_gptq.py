"""GPTQ bit for bit against tensors that GPTQModel packed, version 1 and 2, in both directions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from synthetic import solution

from wq.errors import FormatError
from wq.formats import compressed_tensors
from wq.formats import gptq as form
from wq.scheme import Scheme
from wq.solvers import Solution

BITS = (2, 3, 4, 8)  # GPTQ's

GOLDEN = Path(__file__).parents[1] / "golden"
versions = pytest.mark.parametrize(("symmetric", "version"), [(True, "v1_sym"), (False, "v2_asym")])


@versions
@pytest.mark.parametrize("bits", BITS)
def test_tensors_are_those_of_the_owner_in_both_directions(bits: int, symmetric: bool, version: str) -> None:
    golden = load_file(GOLDEN / f"gptq_{version}_{bits}bit.safetensors")
    s = Solution(*(golden.pop(name) for name in ("codes", "scale", "zero")), {})
    scheme = Scheme(bits, 32, symmetric)
    packed = form.pack(s, scheme)
    assert packed.keys() == golden.keys()
    for name, theirs in golden.items():
        assert (packed[name].shape, packed[name].dtype) == (theirs.shape, theirs.dtype)
        assert torch.equal(packed[name], theirs)
    back = form.unpack(golden, scheme, (32, 128))
    assert all(torch.equal(mine, given) for mine, given in zip(back[:3], s[:3], strict=True))


@pytest.mark.parametrize("bits", BITS)
def test_version_1_is_for_symmetric_grids_and_stores_one_less_than_the_midpoint(
    bits: int, generator: torch.Generator
) -> None:
    scheme = Scheme(bits, 32)
    assert form.config(scheme, [])["checkpoint_format"] == "gptq"
    packed = form.pack(solution(generator, scheme, 64, 96), scheme)
    word = sum((scheme.midpoint - 1) << (i * bits) for i in range(32))
    signed = [(word >> 32 * i) % 2**32 for i in range(bits)]
    expected = torch.tensor([v - 2**32 if v >= 2**31 else v for v in signed], dtype=torch.int32)
    assert torch.equal(packed["qzeros"], expected.repeat(3, 2))


@pytest.mark.parametrize("bits", BITS)
def test_version_2_is_for_asymmetric_grids_and_stores_the_zero_point_zero(
    bits: int, generator: torch.Generator
) -> None:
    scheme = Scheme(bits, 32, False)
    assert form.config(scheme, [])["checkpoint_format"] == "gptq_v2"
    s = solution(generator, scheme, 32, 64)
    packed = form.pack(s._replace(zero=torch.zeros_like(s.zero)), scheme)
    assert (packed["qzeros"] == 0).all()


@pytest.mark.parametrize("group", [32, 48, -1])
def test_columns_name_their_group_in_order(group: int, generator: torch.Generator) -> None:
    scheme = Scheme(4, group)
    index = form.pack(solution(generator, scheme, 32, 96), scheme)["g_idx"]
    assert index.dtype is torch.int32
    assert index.tolist() == [k // (96 if group == -1 else group) for k in range(96)]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_words_are_the_transpose_of_compressed_tensors(bits: int, symmetric: bool, generator: torch.Generator) -> None:
    scheme = Scheme(bits, 32, symmetric)
    s = solution(generator, scheme, 64, 96)
    mine, other = form.pack(s, scheme), compressed_tensors.pack(s, scheme)
    assert torch.equal(mine["qweight"], other["weight_packed"].t())
    assert symmetric or torch.equal(mine["qzeros"], other["weight_zero_point"].t())


@pytest.mark.parametrize(
    ("shape", "label", "size"), [((40, 64), "out_features", 40), ((64, 80), "in_features", 80), ((8, 64), "out", 8)]
)
def test_sizes_that_do_not_fill_words_are_refused_with_the_layer_and_a_remedy(
    shape: tuple[int, int], label: str, size: int
) -> None:
    with pytest.raises(FormatError, match=rf"model\.q_proj: .*{label}.* is {size}") as caught:
        form.check(Scheme(4, 16), shape, "model.q_proj")
    assert "--format compressed-tensors" in str(caught.value)
    assert "--keep q_proj" in str(caught.value)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_scales_other_than_float16_are_refused(dtype: str) -> None:
    with pytest.raises(FormatError, match=f"q_proj.*float16.*{dtype}"):
        form.check(Scheme(4, 32, True, dtype), (64, 64), "q_proj")


@pytest.mark.parametrize("bits", BITS)
def test_the_config_says_what_readers_ask_for(bits: int) -> None:
    values = form.config(Scheme(bits, -1), ["lm_head"])
    assert values == {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": -1,
        "sym": True,
        "desc_act": False,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
    }


def test_dense_modules_are_excluded_by_rules_that_match_them_and_nothing_else() -> None:
    dense = ["lm_head", "model.layers.1.mlp.gate", "model.vision.0"]
    rules = form.config(Scheme(), dense)["dynamic"]
    assert all(rule.startswith("-:") and value == {} for rule, value in rules.items())
    names = [*dense, "model.layers.1.mlp.gate_proj", "model.layers.11.mlp.gate", "model.visionX0", "x.model.vision.0"]
    excluded = {name for name in names for rule in rules if re.match(rule[2:], name)}
    assert excluded == set(dense[1:])
