"""AWQ bit for bit against tensors that AutoAWQ packed, in both directions, and what it cannot hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from synthetic import solution

from wq.errors import FormatError
from wq.formats import awq as form
from wq.scheme import Scheme
from wq.solvers import Solution

GOLDEN = Path(__file__).parents[1] / "golden" / "awq_gemm_4bit.safetensors"
COLUMN_OF_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)


def test_tensors_are_those_of_the_owner_in_both_directions() -> None:
    golden = load_file(GOLDEN)
    s = Solution(*(golden.pop(name) for name in ("codes", "scale", "zero")), {})
    scheme = Scheme(4, 32, False)
    packed = form.pack(s, scheme)
    assert packed.keys() == golden.keys()
    for name, theirs in golden.items():
        assert (packed[name].shape, packed[name].dtype) == (theirs.shape, theirs.dtype)
        assert torch.equal(packed[name], theirs)
    back = form.unpack(golden, scheme, (32, 128))
    assert all(torch.equal(mine, given) for mine, given in zip(back[:3], s[:3], strict=True))


def test_each_nibble_holds_the_column_that_the_format_says(generator: torch.Generator) -> None:
    s = solution(generator, Scheme(4, 20, False), 16, 60)
    packed = form.pack(s, Scheme(4, 20, False))
    for name, values in (("qweight", s.codes), ("qzeros", s.zero)):
        for word in range(2):
            for nibble, column in enumerate(COLUMN_OF_NIBBLE):
                stored = (packed[name][:, word].long() >> 4 * nibble) & 15
                assert torch.equal(stored, values[8 * word + column].long())


def test_a_symmetric_grid_is_stored_with_the_zero_point_8(generator: torch.Generator) -> None:
    packed = form.pack(solution(generator, Scheme(4, 32), 16, 64), Scheme(4, 32))
    assert (packed["qzeros"] == 0x88888888 - 2**32).all()


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_other_widths_than_4_bits_are_refused_with_a_remedy(bits: int) -> None:
    with pytest.raises(FormatError, match=f"not {bits}") as caught:
        form.check(Scheme(bits, 32), (64, 64), "model.q_proj")
    assert "--bits 4" in str(caught.value)
    assert "compressed-tensors" in str(caught.value)


@pytest.mark.parametrize("out_features", [1, 7, 12, 4097])
def test_rows_that_do_not_fill_words_are_refused_with_the_layer_and_a_remedy(out_features: int) -> None:
    with pytest.raises(FormatError, match=rf"model\.q_proj: .* is {out_features}\.") as caught:
        form.check(Scheme(4, 32), (out_features, 64), "model.q_proj")
    assert "--format compressed-tensors" in str(caught.value)
    assert "--keep q_proj" in str(caught.value)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_scales_other_than_float16_are_refused(dtype: str) -> None:
    with pytest.raises(FormatError, match=f"q_proj.*float16.*{dtype}"):
        form.check(Scheme(4, 32, True, dtype), (64, 64), "q_proj")


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_config_says_what_readers_ask_for(symmetric: bool) -> None:
    assert form.config(Scheme(4, 128, symmetric), ["lm_head", "model.gate"]) == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head", "model.gate"],
    }
