"""Which loaders take a quantized checkpoint, and why not: their rules as data, checked without installing one.

    kernels   what each of their kernels multiplies
    config    what a `quantization_config` says of a layer, as loaders read it
    rules     how vLLM, SGLang and transformers come to their answer

The facts were read in the source of vLLM 0.33.0, SGLang 0.5.23, transformers 5.24 with compressed-tensors 0.20, and
humming-kernels 0.1.19 (which vLLM requires on CUDA). Where to look for the next version:

    vLLM    layers/quantization/{auto_gptq,auto_awq}.py, compressed_tensors/, utils/{marlin,machete,gptq}_utils.py;
            kernels/linear/__init__.py (order of kernels) and mixed_precision/*.py (`can_implement` of each);
            layers/fused_moe/oracle/int_wna16.py (experts). Its AllSpark and act-order kernels are gone.
    SGLang  layers/quantization/{gptq,awq,compressed_tensors}/, marlin_utils.py, __init__.py (gptq's own kernel is gone)

What is judged is how a checkpoint is quantized, on one device; not whether the loader has the architecture.
"""

from __future__ import annotations

from typing import Any

from wq.errors import UnknownNameError
from wq.loaders import rules
from wq.loaders.rules import Checkpoint

VERSIONS = {"transformers": "5.24", "vllm": "0.33.0", "sglang": "0.5.23"}
METHODS = ("compressed-tensors", "gptq", "awq")  # whose rules are here

__all__ = ["METHODS", "VERSIONS", "Checkpoint", "check_name", "judge"]


def check_name(loader: str) -> None:
    """Raise UnknownNameError unless the rules of `loader` are known."""
    if loader not in VERSIONS:
        raise UnknownNameError(f"loader {loader!r} is unknown. Use {', '.join(VERSIONS)}.")


def judge(checkpoint: Checkpoint, loader: str) -> dict[str, Any]:
    """Whether a loader takes a checkpoint.

    `{"loader", "version", "takes", "why", "kernels", "notes"}`: takes is None for a method whose rules are not here;
    why lists `{where, problem, measured, hint}`; kernels says of each kernel why it multiplies not all layers, or "".
    Raises UnknownNameError for a loader not in VERSIONS.
    """
    check_name(loader)
    verdict = rules.Verdict(checkpoint)
    takes: bool | None = None
    if checkpoint.method in METHODS:
        rules.JUDGES[loader](verdict)
        takes = not verdict.found
    else:
        verdict.notes.append(f"the rules for quant_method {checkpoint.method!r} are not known to wq")
    return {
        "loader": loader,
        "version": VERSIONS[loader],
        "takes": takes,
        "why": verdict.reasons(),
        "kernels": verdict.kernels,
        "notes": verdict.notes,
    }
