"""Bit for bit against the installed compressed-tensors package, and its own parser on our config."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from synthetic import dense, solution

from wq.formats import compressed_tensors as form
from wq.scheme import BITS, Scheme

pytest.importorskip("compressed_tensors")

from compressed_tensors.compressors.pack_quantized import (
    PackedQuantizationCompressor,
    pack_to_int32,
    unpack_from_int32,
)
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, QuantizationStrategy

SCHEMES = [
    Scheme(bits, group, symmetric, "float32") for bits, symmetric, group in product(BITS, (True, False), (20, -1))
]
SHAPES = ((32, 160), (40, 100), (33, 60), (7, 20), (1, 40))
cases = pytest.mark.parametrize(
    ("scheme", "shape"),
    list(product(SCHEMES, SHAPES)),
    ids=lambda v: f"{v.bits}-{v.symmetric}-{v.group_size}" if isinstance(v, Scheme) else "x".join(map(str, v)),
)


def their_scheme(scheme: Scheme) -> QuantizationScheme:
    return QuantizationConfig(**form.config(scheme, [])).config_groups["group_0"]


@cases
def test_words_are_those_of_their_packer(scheme: Scheme, shape: tuple[int, int], generator: torch.Generator) -> None:
    s = solution(generator, scheme, *shape)
    packed = form.pack(s, scheme)
    codes, zero = ((t.int() - scheme.midpoint).to(torch.int8) for t in (s.codes, s.zero))
    assert torch.equal(packed["weight_packed"], pack_to_int32(codes, scheme.bits))
    assert torch.equal(unpack_from_int32(packed["weight_packed"], scheme.bits, torch.Size(shape)), codes)
    assert ("weight_zero_point" in packed) is not scheme.symmetric
    if not scheme.symmetric:
        stored = packed["weight_zero_point"]
        assert torch.equal(stored, pack_to_int32(zero, scheme.bits, packed_dim=0))
        assert torch.equal(unpack_from_int32(stored, scheme.bits, zero.shape, packed_dim=0), zero)


@cases
def test_their_compressor_writes_the_same_tensors_and_reads_ours(
    scheme: Scheme, shape: tuple[int, int], generator: torch.Generator
) -> None:
    s = solution(generator, scheme, *shape)
    weight = dense(s).float()
    state = {"weight": weight, "weight_scale": s.scale}
    if not scheme.symmetric:
        state["weight_zero_point"] = (s.zero.int() - scheme.midpoint).to(torch.int8)
    theirs = PackedQuantizationCompressor.compress(state, their_scheme(scheme))
    ours = form.pack(s, scheme)
    assert theirs.keys() == ours.keys()
    for name in theirs:
        assert (theirs[name].dtype, theirs[name].shape) == (ours[name].dtype, ours[name].shape)
        assert torch.equal(theirs[name], ours[name])
    back = form.unpack(theirs, scheme, shape)
    assert all(torch.equal(mine, given) for mine, given in zip(back[:3], s[:3], strict=True))
    restored = PackedQuantizationCompressor.decompress(ours, their_scheme(scheme))["weight"]
    assert torch.allclose(restored.double(), dense(s), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"{s.bits}-{s.symmetric}-{s.group_size}")
def test_their_config_class_reads_ours(scheme: Scheme) -> None:
    config = QuantizationConfig(**form.config(scheme, ["lm_head", "re:.*gate$"]))
    weights = config.config_groups["group_0"].weights
    assert weights is not None
    assert (weights.num_bits, weights.symmetric, weights.dynamic) == (scheme.bits, scheme.symmetric, False)
    channel = scheme.group_size == -1
    assert weights.strategy == (QuantizationStrategy.CHANNEL if channel else QuantizationStrategy.GROUP)
    assert weights.group_size == (None if channel else scheme.group_size)
    assert config.format == "pack-quantized"
    assert config.quantization_status == "compressed"
    assert config.ignore == ["lm_head", "re:.*gate$"]
    assert config.config_groups["group_0"].targets == ["Linear"]


@pytest.mark.parametrize("bits", BITS)
def test_shapes_are_documented_ones(bits: int, generator: torch.Generator) -> None:
    packed = form.pack(solution(generator, Scheme(bits, 20, False), 33, 100), Scheme(bits, 20, False))
    assert packed["weight_packed"].shape == (33, -(-100 * bits // 32))
    assert packed["weight_scale"].shape == (33, 5)
    assert packed["weight_zero_point"].shape == (-(-33 * bits // 32), 5)
    assert packed["weight_shape"].tolist() == [33, 100]
    assert packed["weight_shape"].dtype is torch.int64


def test_a_pattern_that_would_run_for_ever_matches_nothing() -> None:
    """Unguarded, this takes 2 to the length of the name steps."""
    weights = {"num_bits": 4}
    config = {"config_groups": {"group_0": {"targets": [r"re:(([a-z])+.)+[A-Z]([a-z])+$"], "weights": weights}}}
    name = "model.layers.0." + "a" * 60
    assert form.declared_weights(config, name) == [weights]  # as of a group that names only classes
