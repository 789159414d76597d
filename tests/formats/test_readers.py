"""Readers of other people's files: what they say is what an independent decoder says, and every bit comes back."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from wq import formats
from wq.errors import CheckpointError, FormatError, SchemeError
from wq.formats.stored import Stored
from wq.hf.conversion import dense

OUT, IN = 32, 64


def fields(words: Tensor, bits: int, count: int) -> Tensor:
    """Values of a little-endian bit stream, one after the other, int64 `[rows, count]`."""
    rows = []
    for row in words.tolist():
        stream = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(row))
        rows.append([(stream >> (bits * i)) & ((1 << bits) - 1) for i in range(count)])
    return torch.tensor(rows)


def stream(values: Tensor, bits: int) -> Tensor:
    """The inverse of `fields`: int32 words."""
    rows = []
    for row in values.tolist():
        number = sum(value << (bits * i) for i, value in enumerate(row))
        count = -(-len(row) * bits // 32)
        words = [(number >> (32 * i)) & 0xFFFFFFFF for i in range(count)]
        rows.append([word - 2**32 if word >= 2**31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32)


def aligned(values: Tensor, bits: int) -> Tensor:
    """`32 // bits` values in a word, as older compressed-tensors packed."""
    each = 32 // bits
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % each))
    return torch.cat([stream(part, bits) for part in padded.split(each, 1)], 1)


class Made:
    """A random layer in some format, and what it means."""

    def __init__(self, format: str, bits: int, symmetric: bool, group: int, dialect: str = ""):
        self.format, self.config = format, {}
        groups = IN // group
        codes = torch.randint(0, 1 << bits, (OUT, IN))
        zero = torch.full((OUT, groups), 1 << (bits - 1)) if symmetric else torch.randint(0, 1 << bits, (OUT, groups))
        scale = (torch.rand(OUT, groups) + 0.1).half()
        index = torch.arange(IN) // group
        if "act-order" in dialect:
            index = index[torch.randperm(IN)]
        self.weight = scale.float()[:, index] * (codes - zero[:, index]).float()
        if format == "compressed-tensors":
            self.config = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": bits}}}}
            pack = aligned if "aligned" in dialect else stream
            self.tensors = {
                "weight_packed": pack(codes, bits),
                "weight_scale": scale,
                "weight_shape": torch.tensor([OUT, IN]),
            }
            if not symmetric:
                self.tensors["weight_zero_point"] = pack(zero.t(), bits).t().contiguous()
            if "act-order" in dialect:
                self.tensors["weight_g_idx"] = index.int()
        elif format == "gptq":
            version = 2 if "v2" in dialect else 1
            self.config = {"checkpoint_format": "gptq_v2" if version == 2 else "gptq", "bits": bits}
            points = stream(zero.t(), bits)
            if version == 1 and bits == 3:
                points = stream((zero.t() - 1) % 8, bits)
            elif version == 1:
                points = points - sum(1 << i for i in range(0, 32, bits))
            self.tensors = {
                "qweight": stream(codes, bits).t().contiguous(),
                "qzeros": points,
                "scales": scale.t().contiguous(),
            }
            if "no g_idx" not in dialect:
                self.tensors["g_idx"] = index.int()
        else:
            self.config = {"version": "gemm"}
            order = [0, 2, 4, 6, 1, 3, 5, 7]

            def shuffled(values: Tensor) -> Tensor:
                return stream(values.reshape(len(values), -1, 8)[..., order].flatten(1), 4)

            self.tensors = {
                "qweight": shuffled(codes.t()),
                "qzeros": shuffled(zero.t()),
                "scales": scale.t().contiguous(),
            }

    def inspect(self, config: Any = None) -> Stored:
        reader = formats.get(self.format)
        chosen = self.config if config is None else config
        return reader.inspect(self.tensors, (OUT, IN), chosen, self.tensors.__getitem__, "a.layer")


CASES = [
    *(("compressed-tensors", b, s, g, "") for b in range(2, 9) for s in (True, False) for g in (16, IN)),
    *(("compressed-tensors", b, s, 16, "aligned") for b in (3, 5, 6, 7) for s in (True, False)),
    *(("compressed-tensors", 4, s, 16, "act-order") for s in (True, False)),
    *(
        ("gptq", b, s, g, f"{v} {d}")
        for b, s, g in itertools.product((2, 3, 4, 8), (True, False), (16, IN))
        for v in ("v1", "v2")
        for d in ("", "no g_idx", "act-order")
        if not (d == "act-order" and g == IN)
    ),
    *(("awq", 4, s, g, "") for s in (True, False) for g in (16, IN)),
]
each_case = pytest.mark.parametrize(
    "case", CASES, ids=lambda c: f"{c[0]}-{c[1]}-{'sym' if c[2] else 'asym'}-{c[3]}-{c[4]}"
)


@each_case
def test_a_layer_means_what_an_independent_decoder_says_and_comes_back_bit_for_bit(case: Any) -> None:
    made = Made(*case)
    info = made.inspect()
    assert (info.scheme.bits, info.permuted) == (case[1], "act-order" in case[4])
    reader = formats.get(made.format)
    packed = reader.to_packed(made.tensors, info)
    assert torch.equal(dense(packed, info, torch.float32), made.weight)
    back = reader.from_packed(packed, info)
    assert back.keys() == made.tensors.keys()
    for name, tensor in made.tensors.items():
        assert back[name].dtype == tensor.dtype, name
        assert torch.equal(back[name], tensor), name


def test_zero_points_that_are_all_the_midpoint_are_not_kept() -> None:
    for format, bits in (("gptq", 8), ("awq", 4)):
        assert Made(format, bits, True, 16, "v1").inspect().scheme.symmetric
        assert not Made(format, bits, False, 16, "v1").inspect().scheme.symmetric


def test_the_group_that_names_a_layer_says_its_width() -> None:
    made = Made("compressed-tensors", 7, True, 16, "aligned")  # 7 bits aligned take the words of 8
    groups = {
        "a": {"targets": ["Linear"], "weights": {"num_bits": 8}},
        "b": {"targets": ["re:.*other"], "weights": {"num_bits": 4}},
        "c": {"targets": ["re:a[.]lay.*"], "weights": {"num_bits": 7}},
    }
    assert made.inspect({"config_groups": groups}).scheme.bits == 7
    del groups["c"]
    assert made.inspect({"config_groups": groups}).scheme.bits == 8


# --- hostile ---

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
DTYPES = (torch.int64, torch.int16, torch.uint8, torch.float64, torch.bool, torch.float16, torch.int32)
SOURCES = [
    ("compressed-tensors", 4, True, 16, ""),
    ("compressed-tensors", 4, False, 16, ""),
    ("compressed-tensors", 3, False, 16, "aligned"),
    ("compressed-tensors", 4, True, 16, "act-order"),
    ("gptq", 4, True, 16, "v1"),
    ("gptq", 3, False, 16, "v2 act-order"),
    ("awq", 4, False, 16, ""),
]
UNUSED = {"weight_shape"}  # the model says it


def mutations() -> list[tuple[Any, str, str]]:
    found = []
    for source in SOURCES:
        for leaf, tensor in Made(*source).tensors.items():
            if leaf in UNUSED:
                continue
            for what, change in SHAPES.items():
                # Twice the scales of a symmetric layer are those of groups half as long.
                halves = (leaf, what) == ("weight_scale", "twice the columns") and source[2] and not source[4]
                if change(tensor).shape != tensor.shape and not halves:
                    found.append((source, leaf, what))
            fits = (torch.float16, torch.bfloat16, torch.float32) if tensor.is_floating_point() else (tensor.dtype,)
            found += [(source, leaf, str(dtype)) for dtype in DTYPES if dtype not in fits]
            if leaf not in ("g_idx", "weight_g_idx", "weight_zero_point"):  # without these it is another, whole layer
                found.append((source, leaf, "absent"))
    return found


MUTATIONS = mutations()


def test_there_are_hundreds_of_hostile_layers() -> None:
    assert len(MUTATIONS) >= 300


@pytest.mark.parametrize(("source", "leaf", "what"), MUTATIONS, ids=str)
def test_a_tensor_that_does_not_fit_is_refused_by_name(source: Any, leaf: str, what: str) -> None:
    made = Made(*source)
    if what == "absent":
        del made.tensors[leaf]
    elif what in SHAPES:
        made.tensors[leaf] = SHAPES[what](made.tensors[leaf])
    else:
        made.tensors[leaf] = made.tensors[leaf].to(getattr(torch, what.removeprefix("torch.")))
    with pytest.raises(CheckpointError, match=r"a\.layer"):
        made.inspect()


INDICES: dict[str, Callable[[Tensor], Tensor]] = {
    "negative": lambda g: g.index_fill(0, torch.tensor([5]), -1),
    "as many as groups": lambda g: g.index_fill(0, torch.tensor([5]), IN // 16),
    "2**31 - 1": lambda g: g.index_fill(0, torch.tensor([0]), 2**31 - 1),
    "the least": lambda g: g.index_fill(0, torch.tensor([IN - 1]), -(2**31)),
    "unequal groups": lambda g: g.index_fill(0, torch.tensor([IN - 1]), 0),
    "one group": lambda g: torch.zeros_like(g),
}


@pytest.mark.parametrize("what", INDICES)
@pytest.mark.parametrize("source", [s for s in SOURCES if "act-order" in s[4] or s[0] == "gptq"], ids=str)
def test_an_index_of_groups_that_cannot_be_is_refused(source: Any, what: str) -> None:
    made = Made(*source)
    leaf = "g_idx" if "g_idx" in made.tensors else "weight_g_idx"
    made.tensors[leaf] = INDICES[what](made.tensors[leaf])
    with pytest.raises(CheckpointError, match=r"a\.layer.*group"):
        made.inspect()


CONFIGS: list[Any] = [
    {"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 10**9}}}},
    {"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 0}}}},
    {"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": -4}}}},
    {"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 2**63}}}},
    {"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 8}}}},
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_config_that_contradicts_the_tensors_is_refused(config: Any) -> None:
    with pytest.raises((CheckpointError, SchemeError, FormatError), match=r"a\.layer"):
        Made("compressed-tensors", 4, True, 16).inspect(config)


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
    assert Made("compressed-tensors", 4, True, 16).inspect(config).scheme.bits == 4


@pytest.mark.parametrize("layout", ["marlin", "gptq_p", 7, ["gptq"], "auto_round:fp8"], ids=str)
def test_a_gptq_layout_that_wq_does_not_know_is_refused(layout: Any) -> None:
    with pytest.raises((CheckpointError, FormatError), match=r"a\.layer"):
        Made("gptq", 4, True, 16, "v1").inspect({"checkpoint_format": layout})
    with pytest.raises((CheckpointError, FormatError), match=r"a\.layer"):
        Made("awq", 4, True, 16).inspect({"version": layout})
