"""Regenerate ``tests/golden``: small tensors packed by the packages that own the AWQ and GPTQ formats.

The owners' unpacked source trees must be importable, for example::

    PYTHONPATH=autoawq-0.2.9:gptqmodel-7.7.0:auto_gptq-0.7.1 python scripts/make_golden.py --out tests/golden

Only the owners' functions write the packed tensors; this script makes the inputs and reads the result back with its
own bit reader. With the optional ``auto_gptq``, GPTQ v1 must also come out of its packer bit for bit.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import sys
import types
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

# gptqmodel would otherwise try to build a C++ packer on first use.
os.environ.setdefault("GPTQMODEL_DISABLE_PACK_EXT", "1")

N, K, GROUP = 32, 128, 32
G_IDX = torch.arange(K, dtype=torch.int32) // GROUP
Packed = dict[str, Tensor]
Owner = tuple[str, str, str]  # package, version, function
CHECKPOINT_NAMES = ("qweight", "qzeros", "scales", "g_idx")
AWQ_NIBBLE_TO_COLUMN = [0, 2, 4, 6, 1, 3, 5, 7]


def make_inputs(bits: int, symmetric: bool, seed: int) -> Packed:
    """Seeded codes [N,K], zeros [N,G] and fp16 scales [N,G]; every value of the range occurs, both ends included."""
    rng, top, groups = np.random.default_rng(seed), 2**bits, K // GROUP
    codes = rng.permutation(np.arange(N * K) % top).reshape(N, K)
    zero = np.full((N, groups), top // 2) if symmetric else rng.integers(0, top, (N, groups))
    if not symmetric:
        zero[0, 0], zero[1, 0], zero[-1, -1] = 0, top - 1, 0
    scale = torch.from_numpy(rng.uniform(0.01, 0.05, (N, groups))).half()
    return {"codes": torch.from_numpy(codes).byte(), "zero": torch.from_numpy(zero).byte(), "scale": scale}


def as_linear(x: Packed) -> nn.Linear:
    """A float32 layer with W = scale * (code - zero), which the owners' rounding maps back to exactly these codes."""
    zero, scale = (x[k].float().repeat_interleave(GROUP, dim=1) for k in ("zero", "scale"))
    layer = nn.Linear(K, N, bias=False)
    layer.weight.data = scale * (x["codes"].float() - zero)
    return layer


def read_bits(words: Tensor, bits: int) -> np.ndarray:
    """Read each row of int32 words as one little-endian bit stream of codes."""
    raw = np.ascontiguousarray(words.numpy(), dtype="<i4").view(np.uint8)
    stream = np.unpackbits(raw, axis=1, bitorder="little").reshape(len(raw), -1, bits)
    return (stream * (1 << np.arange(bits))).sum(axis=2)


def check(packed: Packed, x: Packed, bits: int, awq: bool, stored_minus: int = 0) -> None:
    """GPTQ: codes run down K inside a column of qweight, zeros along N inside a row of qzeros.
    AWQ GEMM: both run along N, eight columns a word, nibble i holding column AWQ_NIBBLE_TO_COLUMN[i] of the eight.
    """
    rows = (packed["qweight"] if awq else packed["qweight"].t(), packed["qzeros"])
    codes, zeros = (read_bits(words, bits) for words in rows)
    if awq:
        back = np.argsort(AWQ_NIBBLE_TO_COLUMN)
        codes, zeros = (v.reshape(len(v), -1, 8)[:, :, back].reshape(len(v), -1) for v in (codes, zeros))
    assert np.array_equal(codes.T if awq else codes, x["codes"].numpy())
    assert np.array_equal(zeros.T + stored_minus, x["zero"].numpy())
    assert torch.equal(packed["scales"], x["scale"].t())
    assert torch.equal(packed.get("g_idx", G_IDX), G_IDX)


def buffers(module: nn.Module) -> Packed:
    return {k: getattr(module, k).contiguous().clone() for k in CHECKPOINT_NAMES if hasattr(module, k)}


def pack_awq(x: Packed) -> tuple[Packed, Owner]:
    import awq
    from awq.modules.linear.gemm import WQLinear_GEMM

    # from_linear indexes scales and zeros by group first, so it takes them as [G,N].
    scales, zeros = x["scale"].float().t().contiguous(), x["zero"].float().t().contiguous()
    layer = WQLinear_GEMM.from_linear(as_linear(x), w_bit=4, group_size=GROUP, scales=scales, zeros=zeros)
    packed = buffers(layer)
    check(packed, x, 4, awq=True)
    return packed, ("autoawq", awq.__version__, "awq.modules.linear.gemm.WQLinear_GEMM.from_linear")


def pack_gptq(x: Packed, bits: int, v1: bool) -> tuple[Packed, Owner]:
    import gptqmodel
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import FORMAT, QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    def run(method: str) -> Packed:
        shape = {"bits": bits, "group_size": GROUP, "in_features": K, "out_features": N}
        layer = TorchLinear(**shape, sym=v1, desc_act=False, format=FORMAT.GPTQ if v1 else FORMAT.GPTQ_V2)
        getattr(layer, method)(as_linear(x), x["scale"].float(), x["zero"].float(), G_IDX)
        if v1:  # the packers always write v2 zeros; saving as "gptq" subtracts one from each afterwards
            convert_gptq_v2_to_v1_format_module(layer, QuantizeConfig(bits=bits))
        return buffers(layer)

    packed, other = run("pack_block"), run("pack_original")
    assert all(torch.equal(packed[k], other[k]) for k in packed), "gptqmodel's two packers disagree"
    check(packed, x, bits, awq=False, stored_minus=int(v1))
    then = " + gptqmodel.utils.model.convert_gptq_v2_to_v1_format_module" if v1 else ""
    return packed, ("gptqmodel", gptqmodel.__version__, f"{TorchLinear.__module__}.TorchLinear.pack_block{then}")


def compare_auto_gptq(packed: Packed, x: Packed, bits: int) -> str:
    """Pack the same v1 input with auto_gptq, when it is there, and insist on identical tensors."""
    if "auto_gptq" not in sys.modules:
        if (spec := importlib.util.find_spec("auto_gptq")) is None:
            return "(auto_gptq not importable, not compared)"
        # An empty package in its place: its own __init__ needs a transformers release of early 2024.
        sys.modules["auto_gptq"] = bare = types.ModuleType("auto_gptq")
        bare.__path__ = list(spec.submodule_search_locations or [])
    module = importlib.import_module("auto_gptq.nn_modules.qlinear.qlinear_cuda")
    layer = module.QuantLinear(bits, GROUP, K, N, bias=False)
    layer.pack(as_linear(x), x["scale"].float(), x["zero"].float())
    theirs = buffers(layer)
    theirs["scales"] = theirs["scales"].half()  # it keeps the dtype of the layer it was given
    assert all(torch.equal(packed[k], theirs[k]) for k in packed), "auto_gptq packs differently"
    return f"identical to auto_gptq {importlib.metadata.version('auto-gptq')}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("tests/golden"), help="existing folder for the files")
    args = parser.parse_args()
    gptq = [("gptq_v1_sym", True), ("gptq_v2_asym", False)]
    jobs = [("awq_gemm", False, 4), *((*kind, bits) for kind in gptq for bits in (2, 3, 4, 8))]
    for seed, (kind, symmetric, bits) in enumerate(jobs):
        x = make_inputs(bits, symmetric, seed)
        packed, owner = pack_awq(x) if kind == "awq_gemm" else pack_gptq(x, bits, v1=symmetric)
        header = dict(zip(("package", "version", "function"), owner, strict=True))
        header |= {"bits": str(bits), "group_size": str(GROUP), "symmetric": str(symmetric).lower()}
        note = compare_auto_gptq(packed, x, bits) if symmetric else ""
        path = args.out / f"{kind}_{bits}bit.safetensors"
        path.write_bytes(save({**packed, **x}, metadata=header))
        print(f"{path.name}: {path.stat().st_size} bytes, {owner[0]} {owner[1]}", note)


if __name__ == "__main__":
    main()
