"""How integers become a checkpoint. One format a file; a new one adds its file and one line to `FORMATS`.

A format is a module with

    QUANT_METHOD: str                               what `quantization_config["quant_method"]` says
    def check(scheme, shape, name) -> None          raise FormatError if it cannot hold this layer
    def pack(solution, scheme) -> dict              tensors by local name (`weight_packed`, ...)
    def unpack(tensors, scheme, shape) -> Solution  the inverse: `unpack(pack(s), ...) == s`, bit for bit
    def config(scheme, dense, mixed=()) -> dict     the `quantization_config` of config.json; `dense` lists the modules
                                                    (on-disk names) that stay as they were; `mixed` has all others, a
                                                    `Targets` for each, where not all have `scheme`

and, to read and rewrite files of any origin (see `wq.formats.stored`),

    LEAVES, inspect, to_packed, from_packed, convert_leaf

Pure functions of tensors. `pack` never changes its input and works on meta tensors, which is how the pipeline knows
every shape of a checkpoint before it computes one number.
"""

from __future__ import annotations

from types import ModuleType

from wq import registry

FORMATS: dict[str, str] = {
    "compressed-tensors": "wq.formats.compressed_tensors",
    "gptq": "wq.formats.gptq",
    "awq": "wq.formats.awq",
}


def get(name: str) -> ModuleType:
    """The format called `name`, also from entry points in group `wq.formats`. Raises UnknownNameError."""
    return registry.find("format", name, FORMATS, "wq.formats")
