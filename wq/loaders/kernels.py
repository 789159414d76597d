"""What the kernels of vLLM 0.33.0 and SGLang 0.5.23 multiply, as data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from wq.scheme import PER_CHANNEL, STORED_BITS

MARLIN_GROUPS = (PER_CHANNEL, 32, 64, 128)


@dataclass(frozen=True)
class Layer:
    """A layer as a loader multiplies it, its fused parts joined. group: -1 is one scale for each output row."""

    name: str
    bits: int
    group: int
    symmetric: bool
    rows: int
    columns: int


@dataclass(frozen=True)
class Kernel:
    """What a kernel multiplies.

    device: where it runs. symmetric, asymmetric: bits. groups: sizes, or None for any. rows, columns: what
    out_features and in_features must be multiples of. only: a condition of its own, and what a layer that fails it has.
    """

    name: str
    device: str
    symmetric: tuple[int, ...]
    asymmetric: tuple[int, ...]
    groups: tuple[int, ...] | None = None
    rows: int = 1
    columns: int = 1
    only: tuple[Callable[[Layer], bool], str] | None = None

    @property
    def label(self) -> str:
        return f"{self.name} ({self.device})"

    def refusal(self, layer: Layer) -> str:
        """Why it does not multiply this layer; empty if it does."""
        bits = self.symmetric if layer.symmetric else self.asymmetric
        grid = "symmetric" if layer.symmetric else "asymmetric"
        if layer.bits not in bits:
            return f"{layer.bits} bits {grid}; it has {either(bits) if bits else 'no'} bits {grid}"
        if self.groups is not None and layer.group not in self.groups:
            return f"groups of {layer.group}; it has {either(self.groups)}"
        if layer.rows % self.rows:
            return f"out_features {layer.rows}; it needs a multiple of {self.rows}"
        if layer.columns % self.columns:
            return f"in_features {layer.columns}; it needs a multiple of {self.columns}"
        return "" if self.only is None or self.only[0](layer) else self.only[1]


def _grouped(layer: Layer) -> bool:
    return layer.group != PER_CHANNEL


def _nests(layer: Layer) -> bool:
    """Humming's groups divide its blocks of 2ⁿ ≥ 32 columns, or are whole blocks; at least 16 for 16-bit inputs."""
    return layer.group in (PER_CHANNEL, 16) or layer.group % 32 == 0


def _tiled(layer: Layer) -> bool:
    """A tile of Marlin: 64 rows by 128 columns, or 128 by 64. vLLM pads to one, SGLang does not."""
    return (layer.rows % 64 == 0 and layer.columns % 128 == 0) or (layer.rows % 128 == 0 and layer.columns % 64 == 0)


def _even(layer: Layer) -> bool:
    return layer.group == PER_CHANNEL or layer.group % 2 == 0


MACHETE = Kernel("Machete", "sm_90", (4, 8), (4, 8), (PER_CHANNEL, 64, 128), rows=128, columns=64)
MARLIN = Kernel("Marlin", "sm_75 and newer", (4, 8), (4,), MARLIN_GROUPS)
CPU = Kernel("CPU", "CPU", (4,), (4,), rows=32, columns=32, only=(_even, "groups of an odd size"))
AWQ = Kernel("AWQ", "sm_75 and newer", (4,), (4,), MARLIN_GROUPS, rows=8)  # for shapes that Marlin leaves, in both

# In the order in which vLLM asks them, but that on sm_90 Humming comes before Marlin. Conch, an optional package, is
# left out. Compared with vLLM's own `can_implement` by scripts/check_vllm_config.py.
VLLM = (
    MACHETE,
    MARLIN,
    Kernel("ExLlama", "CUDA and ROCm, float16", (4, 8), (), rows=8, only=(_grouped, "one scale a row")),
    Kernel("Triton", "CUDA and ROCm", (4,), (4,), (*MARLIN_GROUPS, 256), rows=8),
    Kernel("Humming", "sm_75 and newer", STORED_BITS, STORED_BITS, only=(_nests, "groups that do not nest in 2ⁿ ≥ 32")),
    CPU,
)
VLLM_AWQ = (MACHETE, MARLIN, AWQ, CPU)
_TILE = "a shape that is no multiple of 64 × 128 or 128 × 64 (rows × columns)"
SGLANG = (Kernel("Marlin", "sm_80 and newer", (4, 8), (4,), MARLIN_GROUPS, only=(_tiled, _TILE)),)
SGLANG_AWQ = (*SGLANG, AWQ)


def either(values: Iterable[Any]) -> str:
    """`-1, 32 or 64`."""
    *most, last = map(str, values)
    return f"{', '.join(most)} or {last}" if most else last
