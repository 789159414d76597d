"""Every dialect that wq reads, against decoders written here from the formats' documents, one Python integer a row.

Each layer must decode to the weight that its tensors say, and `from_packed` must give back the same bytes.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from wq import formats
from wq.errors import CheckpointError
from wq.formats import compressed_tensors
from wq.formats.stored import Packed, Stored
from wq.hf.conversion import dense
from wq.scheme import BITS, STORED_BITS, Scheme

NAME = "model.layers.1.mlp.down_proj"
GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("*.safetensors"))
OUT, IN, GROUPS = 64, 192, 6
Tensors = dict[str, Tensor]

# --- words, by hand ---


def stream(rows: list[list[int]], bits: int) -> Tensor:
    """Each row as one little-endian number, cut into int32 words."""
    count = -(-len(rows[0]) * bits // 32)
    return from_words([[cut(sum(v << i * bits for i, v in enumerate(row)), j) for j in range(count)] for row in rows])


def unstream(words: Tensor, bits: int, count: int) -> list[list[int]]:
    numbers = [sum((w % 2**32) << 32 * i for i, w in enumerate(row)) for row in words.tolist()]
    return [[(number >> i * bits) % 2**bits for i in range(count)] for number in numbers]


def aligned(rows: list[list[int]], bits: int) -> Tensor:
    """As many whole values as a word holds, the rest of the word empty."""
    each = 32 // bits
    return from_words(
        [
            [sum(v << i * bits for i, v in enumerate(row[j : j + each])) for j in range(0, len(row), each)]
            for row in rows
        ]
    )


def unaligned(words: Tensor, bits: int, count: int) -> list[list[int]]:
    each = 32 // bits
    return [[((row[i // each] % 2**32) >> i % each * bits) % 2**bits for i in range(count)] for row in words.tolist()]


def cut(number: int, word: int) -> int:
    return (number >> 32 * word) % 2**32


def from_words(rows: list[list[int]]) -> Tensor:
    return torch.tensor([[w - 2**32 if w >= 2**31 else w for w in row] for row in rows], dtype=torch.int32)


# --- decoders, from the documents ---


def weight(codes: list[list[int]], zeros: list[list[int]], scale: Tensor, group: list[int]) -> Tensor:
    """`scale * (code - zero)` for codes `[out][in]`, zeros `[out][groups]`, scale `[out, groups]`."""
    steps = [[code - z[g] for code, g in zip(row, group, strict=True)] for row, z in zip(codes, zeros, strict=True)]
    return torch.tensor(steps, dtype=torch.float32) * scale.float()[:, group]


def in_order(in_features: int, groups: int) -> list[int]:
    return [k // (in_features // groups) for k in range(in_features)]


def swap(rows: list[list[int]]) -> list[list[int]]:
    return [list(row) for row in zip(*rows, strict=True)]


def decode_gptq(t: Tensors, bits: int, version: int) -> Tensor:
    """qweight: a bit stream down each column. qzeros: one along each row; version 1 is one less, word by word."""
    groups, out_features = t["scales"].shape
    in_features = t["qweight"].shape[0] * 32 // bits
    qzeros = t["qzeros"]
    if version == 1 and bits != 3:
        ones = sum(1 << i for i in range(0, 32, bits))
        qzeros = from_words([[(word + ones) % 2**32 for word in row] for row in qzeros.tolist()])
    zeros = unstream(qzeros, bits, out_features)
    if version == 1 and bits == 3:
        zeros = [[(z + 1) % 8 for z in row] for row in zeros]
    group = t["g_idx"].tolist() if "g_idx" in t else in_order(in_features, groups)
    return weight(unstream(t["qweight"].t(), bits, in_features), swap(zeros), t["scales"].t(), group)


def decode_awq(t: Tensors) -> Tensor:
    """Eight neighbouring columns of out_features in a word, in the order 0 2 4 6 1 3 5 7."""

    def nibbles(words: Tensor) -> list[list[int]]:
        place = {column: nibble for nibble, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7))}
        rows = words.tolist()
        return [[((row[c // 8] % 2**32) >> 4 * place[c % 8]) & 15 for c in range(8 * len(row))] for row in rows]

    in_features, groups = t["qweight"].shape[0], t["scales"].shape[0]
    zeros = swap(nibbles(t["qzeros"]))
    return weight(swap(nibbles(t["qweight"])), zeros, t["scales"].t(), in_order(in_features, groups))


def decode_compressed(t: Tensors, bits: int, shape: tuple[int, int], old: bool = False) -> Tensor:
    """A stream along each row; zero points one along out_features; without them, the midpoint."""
    read = unaligned if old else unstream
    out_features, in_features = shape
    groups = t["weight_scale"].shape[1]
    zeros = [[1 << (bits - 1)] * groups] * out_features
    if "weight_zero_point" in t:
        zeros = swap(read(t["weight_zero_point"].t(), bits, out_features))
    group = t["weight_g_idx"].tolist() if "weight_g_idx" in t else in_order(in_features, groups)
    return weight(read(t["weight_packed"], bits, in_features), zeros, t["weight_scale"], group)


# --- layers, made here ---


def numbers(generator: torch.Generator, rows: int, columns: int, bits: int) -> list[list[int]]:
    """Any values, both ends among them."""
    values = torch.randint(2**bits, (rows, columns), generator=generator)
    values.view(-1)[:2] = torch.tensor([0, 2**bits - 1])
    return values.tolist()


def scales(generator: torch.Generator, rows: int, columns: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return (torch.randn(rows, columns, generator=generator) / 16).to(dtype)


def act_order(generator: torch.Generator, in_features: int, groups: int) -> Tensor:
    index = torch.tensor(in_order(in_features, groups), dtype=torch.int32)
    return index[torch.randperm(in_features, generator=generator)]


def gptq_layer(
    generator: torch.Generator,
    bits: int,
    version: int,
    symmetric: bool,
    groups: int = GROUPS,
    order: str = "in order",
    shape: tuple[int, int] = (OUT, IN),
    dtype: torch.dtype = torch.float16,
) -> Tensors:
    out_features, in_features = shape
    zeros = [[1 << (bits - 1)] * out_features] * groups if symmetric else numbers(generator, groups, out_features, bits)
    if version == 1 and bits == 3:
        qzeros = stream([[(z - 1) % 8 for z in row] for row in zeros], bits)
    else:
        ones = sum(1 << i for i in range(0, 32, bits)) if version == 1 else 0
        qzeros = from_words([[(word - ones) % 2**32 for word in row] for row in stream(zeros, bits).tolist()])
    layer = {
        "qweight": stream(numbers(generator, out_features, in_features, bits), bits).t().contiguous(),
        "qzeros": qzeros,
        "scales": scales(generator, groups, out_features, dtype),
        "g_idx": torch.tensor(in_order(in_features, groups), dtype=torch.int32),
    }
    if order == "act-order":
        layer["g_idx"] = act_order(generator, in_features, groups)
    if order == "no g_idx":
        del layer["g_idx"]
    return layer


def compressed_layer(
    generator: torch.Generator,
    bits: int,
    symmetric: bool,
    groups: int,
    shape: tuple[int, int],
    old: bool = False,
    g_idx: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensors:
    write = aligned if old else stream
    out_features, in_features = shape
    layer = {
        "weight_packed": write(numbers(generator, out_features, in_features, bits), bits),
        "weight_scale": scales(generator, out_features, groups, dtype),
        "weight_shape": torch.tensor(shape),
    }
    if not symmetric:
        layer["weight_zero_point"] = write(numbers(generator, groups, out_features, bits), bits).t().contiguous()
    if g_idx:
        layer["weight_g_idx"] = act_order(generator, in_features, groups)
    return layer


def compressed_config(**widths: int) -> dict[str, Any]:
    groups = {key: {"targets": ["Linear"], "weights": {"num_bits": bits}} for key, bits in widths.items()}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}


# --- the contract ---


def read(name: str, tensors: Tensors, shape: tuple[int, int], config: dict[str, Any] | None) -> tuple[Packed, Stored]:
    """Inspect and read; whatever is read must be given back bit for bit, and no input may change."""
    reader, before = formats.get(name), {leaf: t.clone() for leaf, t in tensors.items()}
    stored = reader.inspect(tensors, shape, config, tensors.__getitem__, NAME)
    packed = reader.to_packed(tensors, stored)
    back = reader.from_packed(packed, stored)
    assert back.keys() == tensors.keys()
    for leaf, original in before.items():
        assert torch.equal(tensors[leaf], original), leaf
        assert (back[leaf].dtype, back[leaf].shape) == (original.dtype, original.shape), leaf
        assert torch.equal(back[leaf], original), leaf
        assert back[leaf].is_contiguous(), leaf
    assert (packed.permutation is not None) is stored.permuted
    return packed, stored


def test_the_helpers_of_this_file_are_each_others_inverse(generator: torch.Generator) -> None:
    for bits in BITS:
        rows = numbers(generator, 3, 50, bits)
        assert unstream(stream(rows, bits), bits, 50) == rows
        assert unaligned(aligned(rows, bits), bits, 50) == rows


@pytest.mark.parametrize("order", ["in order", "act-order", "no g_idx"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_decodes_as_documented(
    bits: int, version: int, symmetric: bool, order: str, generator: torch.Generator
) -> None:
    tensors = gptq_layer(generator, bits, version, symmetric, order=order)
    config = {"quant_method": "gptq", "bits": bits, "checkpoint_format": "gptq" if version == 1 else "gptq_v2"}
    packed, stored = read("gptq", tensors, (OUT, IN), config)
    assert stored.scheme == Scheme(bits, IN // GROUPS, symmetric)
    assert stored.permuted is (order == "act-order")
    assert (packed.zero is None) is symmetric
    assert torch.equal(dense(packed, stored, torch.float32), decode_gptq(tensors, bits, version))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(32, 32), (64, 96), (96, 64)], ids=str)
@pytest.mark.parametrize(("bits", "symmetric"), product((2, 3, 4, 8), (True, False)))
def test_gptq_with_one_scale_for_each_row_has_no_groups(
    bits: int, symmetric: bool, shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator
) -> None:
    tensors = gptq_layer(generator, bits, 2, symmetric, 1, shape=shape, dtype=dtype)
    packed, stored = read("gptq", tensors, shape, {"checkpoint_format": "gptq_v2"})
    assert stored.scheme == Scheme(bits, -1, symmetric, str(dtype).removeprefix("torch."))
    assert torch.equal(dense(packed, stored, torch.float32), decode_gptq(tensors, bits, 2))


VERSIONS = [
    (1, {}),
    (1, {"checkpoint_format": None}),
    (1, {"checkpoint_format": "gptq"}),
    (1, {"packing_format": "auto_round:auto_gptq"}),
    (2, {"checkpoint_format": "gptq_v2"}),
    (2, {"packing_format": "auto_round"}),
    (2, {"packing_format": "auto_round:gptqmodel"}),
]


@pytest.mark.parametrize(("version", "config"), VERSIONS, ids=str)
def test_the_config_tells_the_version_of_zero_points(
    version: int, config: dict[str, Any], generator: torch.Generator
) -> None:
    tensors = gptq_layer(generator, 4, version, False)
    packed, stored = read("gptq", tensors, (OUT, IN), config)
    assert stored.variant == str(version)
    assert torch.equal(dense(packed, stored, torch.float32), decode_gptq(tensors, 4, version))
    other = decode_gptq(tensors, 4, 3 - version)
    assert not torch.equal(dense(packed, stored, torch.float32), other)


@pytest.mark.parametrize("zero", ["all zero", "one zero in each word", "zero between tops", "ascending"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_points_of_zero_survive_the_borrow_of_version_1(bits: int, zero: str, generator: torch.Generator) -> None:
    """GPTQModel subtracts a one from every field of a word at once: a zero borrows from its neighbour."""
    top = 2**bits - 1
    points = {
        "all zero": [0] * OUT,
        "one zero in each word": [0 if i % (32 // bits) == 0 else top for i in range(OUT)],
        "zero between tops": [0 if i % 3 == 1 else top for i in range(OUT)],
        "ascending": [i % (top + 1) for i in range(OUT)],
    }[zero]
    version2 = stream([points] * GROUPS, bits)
    if bits == 3:  # its fields straddle words; they are stored one by one
        version1 = stream([[(p - 1) % 8 for p in points]] * GROUPS, bits)
    else:
        ones = sum(1 << i for i in range(0, 32, bits))
        assert ones == {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}[bits]
        version1 = from_words([[(word - ones) % 2**32 for word in row] for row in version2.tolist()])
    tensors = gptq_layer(generator, bits, 2, False) | {"qzeros": version1}
    packed, stored = read("gptq", tensors, (OUT, IN), {"checkpoint_format": "gptq"})
    expected = decode_gptq(tensors | {"qzeros": version2}, bits, 2)
    assert packed.zero is not None
    assert unstream(packed.zero.t(), bits, OUT) == [points] * GROUPS
    assert torch.equal(dense(packed, stored, torch.float32), expected)


def test_a_group_index_may_name_its_groups_in_any_order(generator: torch.Generator) -> None:
    """Whole groups, the last one first: sorted within, but still another order of columns."""
    tensors = gptq_layer(generator, 4, 1, False)
    tensors["g_idx"] = tensors["g_idx"].flip(0).contiguous()
    packed, stored = read("gptq", tensors, (OUT, IN), None)
    assert stored.permuted
    assert torch.equal(dense(packed, stored, torch.float32), decode_gptq(tensors, 4, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("config", [None, {"version": "gemm"}, {"version": "GEMM"}, {"format": "gemm"}], ids=str)
@pytest.mark.parametrize("groups", [1, 4, 6])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_awq_decodes_as_documented(
    symmetric: bool, groups: int, config: dict[str, Any] | None, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Random words: every one of them is eight codes."""

    def words(rows: int) -> Tensor:
        return torch.randint(-(2**31), 2**31, (rows, 5), generator=generator).to(torch.int32)

    qzeros = torch.full((groups, 5), 0x88888888 - 2**32, dtype=torch.int32) if symmetric else words(groups)
    tensors = {"qweight": words(96), "qzeros": qzeros, "scales": scales(generator, groups, 40, dtype)}
    packed, stored = read("awq", tensors, (40, 96), config)
    size = -1 if groups == 1 else 96 // groups
    assert stored.scheme == Scheme(4, size, symmetric, str(dtype).removeprefix("torch."))
    assert torch.equal(dense(packed, stored, torch.float32), decode_awq(tensors))


@pytest.mark.parametrize("shape", [(64, 192), (33, 160), (7, 224)], ids=str)
@pytest.mark.parametrize("channel", [True, False], ids=["channel", "group"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", STORED_BITS)
def test_compressed_tensors_decode_as_documented(
    bits: int, symmetric: bool, channel: bool, shape: tuple[int, int], generator: torch.Generator
) -> None:
    groups = 1 if channel else shape[1] // 32
    tensors = compressed_layer(generator, bits, symmetric, groups, shape)
    for config in (None, compressed_config(group_0=bits)):
        packed, stored = read("compressed-tensors", tensors, shape, config)
        assert stored.scheme == Scheme(bits, -1 if channel else 32, symmetric, "bfloat16")
        assert compressed_tensors.is_plain(stored)
        assert torch.equal(dense(packed, stored, torch.float32), decode_compressed(tensors, bits, shape))


@pytest.mark.parametrize("g_idx", [True, False], ids=["act-order", "in order"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_the_packing_of_older_versions_is_told_from_the_number_of_words(
    bits: int, symmetric: bool, g_idx: bool, generator: torch.Generator
) -> None:
    shape = (200, 192)
    tensors = compressed_layer(generator, bits, symmetric, GROUPS, shape, old=True, g_idx=g_idx)
    packed, stored = read("compressed-tensors", tensors, shape, compressed_config(group_0=bits))
    assert not compressed_tensors.is_plain(stored)
    assert stored.scheme == Scheme(bits, 32, symmetric, "bfloat16")
    assert packed.packed.shape == (200, 192 * bits // 32)
    assert torch.equal(dense(packed, stored, torch.float32), decode_compressed(tensors, bits, shape, old=True))


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", BITS)
def test_compressed_tensors_in_act_order_decode_as_documented(
    bits: int, symmetric: bool, generator: torch.Generator
) -> None:
    shape = (33, 192)
    tensors = compressed_layer(generator, bits, symmetric, GROUPS, shape, g_idx=True, dtype=torch.float16)
    packed, stored = read("compressed-tensors", tensors, shape, compressed_config(group_0=bits))
    assert stored.permuted
    assert not compressed_tensors.is_plain(stored)
    assert torch.equal(dense(packed, stored, torch.float32), decode_compressed(tensors, bits, shape))
    tensors["weight_g_idx"] = torch.tensor(in_order(192, GROUPS), dtype=torch.int32)
    packed, stored = read("compressed-tensors", tensors, shape, None)
    assert not stored.permuted
    assert compressed_tensors.is_plain(stored)


SEVERAL = {
    "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": {"num_bits": 4}},
        "group_1": {"targets": ["re:.*down_proj$", "re:.*lm_head"], "weights": {"num_bits": 8}},
        "group_2": {"targets": ["model.layers.0.mlp.up_proj", "layers.1.mlp.up_proj"], "weights": {"num_bits": 3}},
    }
}
NAMED = [
    ("model.layers.0.self_attn.q_proj", 4),
    ("model.layers.0.mlp.down_proj", 8),
    ("model.layers.0.mlp.up_proj", 3),
    ("model.layers.1.mlp.up_proj", 3),
    ("lm_head", 8),
]


@pytest.mark.parametrize(("name", "bits"), NAMED)
def test_several_config_groups_give_each_layer_the_width_of_the_one_that_names_it(
    name: str, bits: int, generator: torch.Generator
) -> None:
    shape = (64, 192)
    for width in BITS:
        tensors = compressed_layer(generator, width, True, GROUPS, shape)
        if width in ({bits} if bits != 4 else {3, 4, 8}):  # named by class only: any group's width
            stored = compressed_tensors.inspect(tensors, shape, SEVERAL, tensors.__getitem__, name)
            assert stored.scheme.bits == width
        else:
            with pytest.raises(CheckpointError, match=rf"{name}\.weight_packed holds {width} bits.*config\.json says"):
                compressed_tensors.inspect(tensors, shape, SEVERAL, tensors.__getitem__, name)


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_one_tensor_at_a_time_converts_as_all_of_them(name: str, generator: torch.Generator) -> None:
    """How experts are read, in files that hold each of them apart."""
    if name == "gptq":
        tensors = gptq_layer(generator, 4, 1, False, order="no g_idx")
    else:
        words = torch.randint(-(2**31), 2**31, (IN + GROUPS, OUT // 8), generator=generator).to(torch.int32)
        tensors = {"qweight": words[:IN], "qzeros": words[IN:], "scales": scales(generator, GROUPS, OUT)}
    packed, stored = read(name, tensors, (OUT, IN), None)
    one = {leaf: formats.get(name).convert_leaf(leaf, tensor, stored) for leaf, tensor in tensors.items()}
    assert packed.zero is not None
    assert torch.equal(one["qweight"], packed.packed)
    assert torch.equal(one["scales"], packed.scale)
    assert torch.equal(one["qzeros"], packed.zero)


@pytest.mark.parametrize("file", GOLDEN, ids=lambda file: file.stem)
def test_files_of_the_formats_owners_decode_to_what_they_packed(file: Path) -> None:
    tensors = load_file(file)
    codes, zero, scale = (tensors.pop(name) for name in ("codes", "zero", "scale"))
    name, bits = file.stem.split("_")[0], int(file.stem[-4])
    config = {"checkpoint_format": "gptq_v2" if "v2" in file.stem else "gptq"} if name == "gptq" else {}
    packed, stored = read(name, tensors, (32, 128), config)
    assert stored.scheme == Scheme(bits, 32, "asym" not in file.stem and name == "gptq")
    expected = weight(codes.tolist(), zero.tolist(), scale, in_order(128, 4))
    assert torch.equal(dense(packed, stored, torch.float32), expected)
    ours = decode_awq(tensors) if name == "awq" else decode_gptq(tensors, bits, 2 if "v2" in file.stem else 1)
    assert torch.equal(ours, expected)


def test_there_are_golden_files_of_both_owners() -> None:
    assert {file.stem.split("_")[0] for file in GOLDEN} == {"awq", "gptq"}
    assert len(GOLDEN) == 9
