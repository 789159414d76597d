"""Ask the real vLLM: its config parser, its choice of kernels, and its model classes, without a GPU.

vLLM's wheel is for CUDA, but its Python runs on torch for the CPU. This script lets it believe that quantized layers
are on a Hopper GPU, while tensors stay on the CPU, and

    tables        compares `can_implement` of its kernels with `wq.loaders.kernels`, over a grid of layers
    checkpoints   builds vLLM's model for each folder, loads every tensor, compares what lies in each joined layer with
                  the checkpoint, and the outcome with what `wq.loaders` says; for compressed-tensors, also the weight
                  that vLLM's own code unpacks with wq's, bit for bit

Nothing of a kernel runs. vLLM is no dependency of wq: unpack its wheel somewhere, install what its imports ask for with
`pip install --no-deps --target`, put both on PYTHONPATH with wq, and

    python scripts/check_vllm_config.py --out result.json [FOLDER ...]     without folders: tiny models, made here
"""

# ruff: noqa: E402  (vLLM decides on import what it runs on)
from __future__ import annotations

import argparse
import itertools
import json
import os
import platform as machine
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
import vllm.platforms
from vllm.platforms.cpu import CpuPlatform

vllm.platforms._current_platform = CpuPlatform()  # before anything asks which it is

from safetensors.torch import load_file
from vllm.config import DeviceConfig, LoadConfig, ModelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import destroy_model_parallel, init_distributed_environment, initialize_model_parallel
from vllm.model_executor.kernels.linear import MPLinearLayerConfig, mixed_precision
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import compressed_tensors_wNa16 as wna16
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.platforms.interface import DeviceCapability, PlatformEnum

from wq import quantize, quantized
from wq.checkpoint import read_headers, read_tensor
from wq.hf.conversion import dense, read
from wq.loaders import kernels
from wq.loaders.joined import FUSED
from wq.verify import verify

TESTS = Path(__file__).resolve().parents[1] / "tests"
QUANTIZED = (
    "vllm.model_executor.layers.quantization",
    "vllm.model_executor.kernels",
    "vllm.model_executor.layers.fused_moe",
)
CLASSES = {
    "Machete": "Machete",
    "Marlin": "Marlin",
    "ExLlama": "Exllama",
    "Triton": "TritonW4A16",
    "Humming": "Humming",
}

MOES = ("mixtral", "qwen3_moe", "gpt_oss")
TEXT = {"calibration": "builtin", "samples": 8, "seqlen": 64}
# What is made without folders: the name, the architecture, and options of `wq.quantize`.
TINY: list[tuple[str, str, dict[str, Any]]] = [
    *(
        (f"{format} {bits}-bit {'sym' if symmetric else 'asym'} g{group}", "llama",
         {"format": format, "bits": bits, "symmetric": symmetric, "group_size": group})
        for format, widths in (("compressed-tensors", (2, 3, 4, 8)), ("gptq", (2, 3, 4, 8)), ("awq", (4,)))
        for bits in widths for symmetric in (True, False) for group in (32, 64, -1)
    ),
    ("compressed-tensors, tied", "qwen3", {}),
    ("compressed-tensors, o_proj kept", "llama", {"keep": ["o_proj"]}),
    ("compressed-tensors, qkv kept", "llama", {"keep": [r"layers\.0\.self_attn\.[qkv]_proj"]}),
    ("compressed-tensors, q_proj alone kept", "llama", {"keep": [r"layers\.0\.self_attn\.q_proj"]}),
    ("gptq, qkv kept", "llama", {"keep": [r"layers\.0\.self_attn\.[qkv]_proj"], "format": "gptq"}),
    ("gptq, q_proj alone kept", "llama", {"keep": [r"layers\.0\.self_attn\.q_proj"], "format": "gptq"}),
    ("awq, qkv kept", "llama", {"keep": [r"layers\.0\.self_attn\.[qkv]_proj"], "format": "awq"}),
    ("awq, up_proj alone kept", "llama", {"keep": [r"layers\.0\.mlp\.up_proj"], "format": "awq"}),
    *((f"compressed-tensors, {a}", a, {}) for a in ("qwen2", "mistral", "phi", "phi3", "opt", "falcon")),
    ("compressed-tensors, gemma2 in float16", "gemma2", {}),
    ("compressed-tensors, gemma2 in bfloat16", "gemma2", {"dtype": "bfloat16"}),
    *((f"{f}, {a}", a, {"format": f}) for a in MOES for f in ("compressed-tensors", "gptq", "awq")),
    ("compressed-tensors, experts kept", "mixtral", {"keep": ["experts"]}),
    ("gptq, experts kept", "mixtral", {"keep": ["experts"], "format": "gptq"}),
    ("awq, experts kept", "mixtral", {"keep": ["experts"], "format": "awq"}),
    *(
        (f"{format}, {mix} bits mixed, {a}", a, {"format": format, "mix": mix, "target_bpw": bpw, **TEXT})
        for format, more in (("compressed-tensors", 0), ("gptq", 0.6))
        for mix, bpw in (((4, 8), 6.3 + more), ((2, 3, 4, 8), 4.7 + more))
        for a in ("llama", "phi", "qwen3_moe", "mixtral")
    ),
]  # fmt: skip


class Hopper(CpuPlatform):
    """What quantized layers are told that they run on."""

    _enum = PlatformEnum.CUDA

    def is_cpu(self) -> bool:
        return False

    def is_cuda(self) -> bool:
        return True

    def is_cuda_alike(self) -> bool:
        return True

    @classmethod
    def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
        return DeviceCapability(9, 0)


@contextmanager
def on_hopper() -> Iterator[None]:
    """Within it, the modules of quantized layers see a Hopper GPU, with vLLM's required packages installed."""
    changed: list[tuple[Any, str, Any]] = []
    replaced = {"current_platform": Hopper(), "has_humming": lambda: True}
    for name, module in list(sys.modules.items()):
        for attribute, value in replaced.items():
            if name.startswith(QUANTIZED) and attribute in vars(module):
                changed.append((module, attribute, getattr(module, attribute)))
                setattr(module, attribute, value)
    try:
        yield
    finally:
        for module, attribute, value in changed:
            setattr(module, attribute, value)


def compare_tables() -> dict[str, Any]:
    """Every kernel of ours against its namesake, on a grid of layers."""
    types = {True: wna16.WNA16_SUPPORTED_TYPES_MAP, False: wna16.WNA16_ZP_SUPPORTED_TYPES_MAP}
    sizes = (32, 48, 64, 96, 128, 192, 256, 320, 2880)
    differences, count = [], 0
    for ours in kernels.VLLM:
        if ours.name == "Humming":
            continue  # its `can_implement` refuses nothing; our rule is its own package's
        theirs = getattr(mixed_precision, f"{CLASSES.get(ours.name, 'CPUWNA16')}LinearKernel")
        for bits, symmetric, group, rows, columns in itertools.product(
            range(2, 9), (True, False), (-1, 16, 32, 64, 128, 256), sizes, sizes
        ):
            if group > 0 and columns % group:
                continue
            shape = (columns, rows)
            config = MPLinearLayerConfig(shape, shape, types[symmetric][bits], torch.float16, group, not symmetric)
            if ours is kernels.CPU:
                taken, why = theirs.can_implement(config)
            else:
                with on_hopper():
                    taken, why = theirs.can_implement(config)
            refusal = ours.refusal(kernels.Layer("layer", bits, group, symmetric, rows, columns))
            count += 1
            if taken != (not refusal):
                differences.append({"kernel": ours.name, "layer": str(config), "vllm": why, "wq": refusal})
    return {"compared": count, "differences": len(differences), "first": differences[:5]}


def check_folder(name: str, folder: Path) -> dict[str, Any]:
    """Build and load a folder in vLLM, and compare with what wq says."""
    (verdict,) = verify(folder, "vllm")["loaders"]
    result: dict[str, Any] = {"checkpoint": name, "wq_says": verdict["takes"], "why": verdict["why"][:2]}
    try:
        model, loaded = load(folder)
    except Exception as error:
        result |= {"vllm_takes": False, "error": f"{type(error).__name__}: {str(error).strip()[:300]}"}
    else:
        # Scales of the cache are not in a checkpoint, and zero points of experts are skipped on a symmetric grid.
        empty = (".attn.", ".w13_qzeros", ".w2_qzeros")
        left = [n for n in dict(model.named_parameters()) if n not in loaded and not any(part in n for part in empty)]
        result |= {"vllm_takes": not left, "not_loaded": left, **compare_layers(model, folder)}
    result["agree"] = result["vllm_takes"] == result["wq_says"]
    return result


def load(folder: Path) -> tuple[Any, set[str]]:
    """vLLM's model with the folder's tensors, and the names of the parameters that got theirs."""
    model_config = ModelConfig(model=str(folder), enforce_eager=True, max_model_len=64)
    config = VllmConfig(model_config=model_config, device_config=DeviceConfig(device="cpu"), load_config=LoadConfig())
    with set_current_vllm_config(config):
        if not torch.distributed.is_initialized():
            init_distributed_environment(1, 0, f"file://{tempfile.mkdtemp()}/store", 0, backend="gloo")
        destroy_model_parallel()  # experts have a group of their own
        initialize_model_parallel(1, 1)
        with on_hopper():
            model = initialize_model(config)
        return model, model.load_weights(load_file(folder / "model.safetensors").items())


def compare_layers(model: Any, folder: Path) -> dict[str, Any]:
    """What lies in each quantized layer against the checkpoint, its parts joined along the rows."""
    said = quantized.read_config(folder)["quantization_config"]
    packed, _ = quantized.split(read_headers(folder))
    same, total, unpacked, kernel_names = 0, 0, [], set()
    for path, layer in model.named_modules():
        if not isinstance(layer, LinearBase):
            continue
        parent, _, leaf = path.rpartition(".")
        parts = [f"{parent}.{part}" for part in FUSED.get(leaf, (leaf,)) if f"{parent}.{part}" in packed] or [path]
        if parts[0] not in packed:
            continue
        rows = 1 if "qweight" in packed[parts[0]] else 0
        kernel = getattr(getattr(layer, "scheme", layer.quant_method), "kernel", None)
        kernel_names.add(type(kernel).__name__)
        for leaf in set(packed[parts[0]]) - {"weight_shape", "g_idx"}:
            tensors = [read_tensor(packed[part][leaf]) for part in parts]
            total += 1
            same += equal(getattr(layer, leaf), torch.cat(tensors, dim=rows), rows)
        # The compressed-tensors 0.17 that vLLM unpacks with packs 3 bits otherwise; vLLM's layers themselves do not.
        if hasattr(layer, "scheme") and 32 % layer.scheme.num_bits == 0:
            ours = torch.cat([weight(packed[part], said, part, layer.params_dtype) for part in parts])
            unpacked.append(equal(unpack_by_vllm(layer), ours, 0))
    made = {"tensors_equal": f"{same}/{total}", "kernels": sorted(kernel_names)}
    return made | ({"weights_equal": f"{sum(unpacked)}/{len(unpacked)}"} if unpacked else {})


def equal(theirs: torch.Tensor, ours: torch.Tensor, rows: int) -> bool:
    """Whether they are the same, but for the order of output rows: vLLM sorts Falcon's heads."""
    theirs, ours = theirs.data.contiguous(), ours.contiguous()
    return torch.equal(theirs, ours) or torch.equal(torch.unique(theirs, dim=rows), torch.unique(ours, dim=rows))


def unpack_by_vllm(layer: Any) -> torch.Tensor:
    """The weight `[out, in]` that vLLM's own unpacking (of its batch-invariant mode) multiplies with."""
    layer.scheme.use_batch_invariant = True
    wna16.matmul_batch_invariant = torch.matmul  # Triton's, elsewhere
    identity = torch.eye(layer.input_size, dtype=layer.params_dtype)
    return layer.scheme.apply_weights(layer, identity, None).t()


def weight(leaves: Any, said: dict[str, Any], name: str, dtype: torch.dtype) -> torch.Tensor:
    """The weight that wq multiplies with."""
    stored = quantized.describe(name, leaves, said)
    return dense(read({leaf: read_tensor(entry) for leaf, entry in leaves.items()}, stored), stored, dtype)


def tiny_checkpoints(folder: Path) -> Iterator[tuple[str, Path]]:
    sys.path.insert(0, str(TESTS))
    make = import_module("tiny_models").make
    for index, (name, architecture, options) in enumerate(TINY):
        source = folder / architecture
        if not source.exists():
            make(source, architecture)
        options = {"group_size": 32, "dtype": "float16", **options}
        quantize(source, folder / str(index), method="rtn", **options)
        yield name, folder / str(index)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--out", type=Path, help="write the result here as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folders = [(folder.name, folder) for folder in arguments.folders] or tiny_checkpoints(Path(scratch))
        results = [check_folder(name, folder) for name, folder in folders]
    wheels = ("vllm", "torch", "transformers", "compressed-tensors")
    report = {
        "date": date.today().isoformat(),
        "machine": f"CPU, {machine.machine()}; vLLM's layers told that they run on sm_90",
        "versions": {name: version(name) for name in wheels},
        "command": "python scripts/check_vllm_config.py --out ...",
        "tables": compare_tables(),
        "agree": f"{sum(r['agree'] for r in results)}/{len(results)}",
        "checkpoints": results,
    }
    for result in results:
        print(("  " if result["agree"] else "! "), json.dumps(result))
    print(json.dumps(report["tables"]), report["agree"])
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
