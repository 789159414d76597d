"""The scheme refuses what no checkpoint stores, names the layer and a remedy, and counts its own bits."""

from __future__ import annotations

import json
import re
from itertools import product
from typing import Any

import pytest

from wq.errors import GroupSizeError, SchemeError, WqError
from wq.scheme import BITS, PER_CHANNEL, SCALE_DTYPES, STORED_BITS, Scheme, check_quantizable

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("bits", [0, 1, 9, 16, -4, 10**9, True, "4", 4.0, NAN, None, [4]])
def test_bits_that_no_checkpoint_stores_are_refused_with_the_value_and_a_remedy(bits: Any) -> None:
    with pytest.raises(SchemeError, match=re.escape(repr(bits))) as caught:
        Scheme(bits=bits)
    assert "--bits 4" in str(caught.value)


@pytest.mark.parametrize("group", [0, 1, -2, -128, 2**20 + 1, 2**63, True, "128", 128.0, NAN, INF, None])
def test_group_sizes_out_of_range_are_refused_with_the_value_and_a_remedy(group: Any) -> None:
    with pytest.raises(SchemeError, match=re.escape(repr(group))) as caught:
        Scheme(group_size=group)
    assert "--group 128" in str(caught.value)


@pytest.mark.parametrize("symmetric", [1, 0, None, "true"])
def test_symmetric_must_be_a_bool(symmetric: Any) -> None:
    with pytest.raises(SchemeError, match="symmetric"):
        Scheme(symmetric=symmetric)


@pytest.mark.parametrize("dtype", ["int8", "torch.float16", "", None, 16, ["float16"]])
def test_scale_dtypes_that_are_not_stored_are_refused(dtype: Any) -> None:
    with pytest.raises(SchemeError, match="float16, bfloat16, float32"):
        Scheme(scale_dtype=dtype)


def test_a_scheme_error_is_caught_as_a_wq_error_and_as_a_value_error() -> None:
    with pytest.raises(WqError):
        Scheme(bits=9)
    with pytest.raises(ValueError, match="bits is 9"):
        Scheme(bits=9)


@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "dtype"), product(BITS, (2, 128, 2**20, PER_CHANNEL), (True, False), SCALE_DTYPES)
)
def test_a_scheme_survives_json(bits: int, group: int, symmetric: bool, dtype: str) -> None:
    scheme = Scheme(bits, group, symmetric, dtype)
    values = scheme.to_dict()
    assert values == {"bits": bits, "group_size": group, "symmetric": symmetric, "scale_dtype": dtype}
    assert Scheme.from_dict(json.loads(json.dumps(values))) == scheme


def test_unknown_keys_and_bad_values_are_refused_by_from_dict() -> None:
    with pytest.raises(SchemeError, match="desc_act"):
        Scheme.from_dict({"bits": 4, "desc_act": True})
    with pytest.raises(SchemeError, match="bits is 9"):
        Scheme.from_dict({"bits": 9})


def test_a_scheme_is_frozen_and_can_key_a_dict() -> None:
    with pytest.raises(AttributeError):
        Scheme().bits = 8  # type: ignore[misc]
    assert {Scheme(): 1}[Scheme(4, 128)] == 1


@pytest.mark.parametrize(
    ("in_features", "group", "groups"), [(4096, 128, 32), (96, 32, 3), (7, -1, 1), (64, 64, 1), (6, 2, 3)]
)
def test_groups_are_counted(in_features: int, group: int, groups: int) -> None:
    assert Scheme(group_size=group).groups(in_features) == groups


@pytest.mark.parametrize("in_features", [11008 + 16, 4096 + 64, 2880, 1536 + 96, 200, 48, 80, 24, 7, 1, 127])
@pytest.mark.parametrize("group", [128, 512, 300])
def test_a_group_that_does_not_divide_is_refused_with_a_group_that_does(in_features: int, group: int) -> None:
    with pytest.raises(GroupSizeError) as caught:
        Scheme(group_size=group).groups(in_features, "model.layers.3.mlp.down_proj")
    message = str(caught.value)
    assert "model.layers.3.mlp.down_proj: " in message
    assert re.search(rf"\b{in_features}\b.*\b{group}\b", message)
    assert "--keep down_proj" in message
    remedy = re.search(r"--group (-?\d+)", message)
    assert remedy is not None
    assert Scheme(group_size=int(remedy[1])).groups(in_features) >= 1


@pytest.mark.parametrize(
    ("scheme", "in_features", "expected"),
    [
        (Scheme(4, 128), 4096, 4.125),  # 16 / 128
        (Scheme(4, 128, False), 4096, 4.15625),  # (16 + 4) / 128
        (Scheme(4, 32, True, "float32"), 64, 5.0),  # 32 / 32
        (Scheme(3, 64, False, "bfloat16"), 192, 3.296875),  # (16 + 3) / 64
        (Scheme(2, 16, False), 16, 3.125),  # (16 + 2) / 16
        (Scheme(8, -1), 1024, 8.015625),  # 16 / 1024
        (Scheme(8, -1, False, "float32"), 40, 9.0),  # (32 + 8) / 40
    ],
)
def test_bits_per_weight_count_scales_and_zero_points(scheme: Scheme, in_features: int, expected: float) -> None:
    assert scheme.bits_per_weight(in_features) == expected


@pytest.mark.parametrize("bits", BITS)
def test_the_midpoint_halves_the_levels(bits: int) -> None:
    assert Scheme(bits).levels == 2**bits == 2 * Scheme(bits).midpoint


@pytest.mark.parametrize("bits", STORED_BITS)
def test_every_stored_width_is_a_scheme_and_some_are_only_read(bits: int) -> None:
    assert Scheme(bits=bits).levels == 2**bits
    if bits in BITS:
        check_quantizable(bits)
    else:
        with pytest.raises(SchemeError, match=f"bits is {bits}; wq quantizes to 2, 3, 4, 8"):
            check_quantizable(bits)
