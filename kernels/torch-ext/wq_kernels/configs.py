"""Which tile a fused kernel uses, and into how many parts it splits the columns. Numbers only; no triton, no device.

The table is short because N and K are ordinary numbers to the kernels, not constants of compilation: what decides is
the processor and how many rows the input has. The split is a formula. Nothing is tuned while a model runs; a file
written by `wq tune`, named in WQ_CONFIG, overrides the table for one device and one version of triton.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

__all__ = [
    "BUCKETS",
    "ENVIRONMENT",
    "FUSED_ROWS",
    "Config",
    "Device",
    "bucket",
    "built_in",
    "choose",
    "overrides",
    "split",
]

ENVIRONMENT = "WQ_CONFIG"
BUCKETS = (16, 32, 64, 128, 256)  # rows of the input, rounded up
FUSED_ROWS = BUCKETS[-1]  # above, dequantizing once and the library's product win
WORKSPACE = 8 * 2**20  # bytes that the partial sums of a split may take


@dataclass(frozen=True)
class Config:
    """A tile of `rows_n` weights' rows by `rows_m` input rows, and how a thread block works on it.

    registers: the most a thread may have; 0 leaves it to the assembler. Raises ValueError for what cannot be compiled.
    """

    rows_n: int
    rows_m: int
    warps: int
    stages: int
    scale_weights: bool
    registers: int = 0

    def __post_init__(self) -> None:
        allowed: dict[str, tuple[Any, ...]] = {
            "rows_n": (16, 32, 64, 128, 256),
            "rows_m": (16, 32, 64, 128, 256),
            "warps": (1, 2, 4, 8, 16),
            "stages": tuple(range(1, 9)),
            "scale_weights": (False, True),
            "registers": (0, *range(32, 256)),
        }
        for name, values in allowed.items():
            value = getattr(self, name)
            if type(value) is not type(values[0]) or value not in values:
                raise ValueError(f"{name} is {value!r}; it must be one of {values[0]} to {values[-1]}")

    def constants(self, bits: int, block_groups: int, target: str) -> dict[str, Any]:
        """What the kernels are compiled with. block_groups: groups in a block of columns (see `layout`)."""
        return {
            "BITS": bits,
            "BLOCK_GROUPS": block_groups,
            "BN": self.rows_n,
            "BM": self.rows_m,
            "SCALE_WEIGHTS": self.scale_weights,
            "STAGES": self.stages,
            "TARGET": target,
        }

    def launch_options(self, target: str) -> dict[str, int]:
        """What Triton's launcher takes beside the constants. Only NVIDIA's assembler knows a limit of registers."""
        limit = {"maxnreg": self.registers} if self.registers and target == "ptx" else {}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return asdict(self)


@dataclass(frozen=True)
class Device:
    """What the choice depends on. architecture: `sm_90`, `gfx942`, or `cpu` for the interpreter."""

    name: str
    architecture: str
    processors: int


def _table(*configs: Config) -> dict[int, Config]:
    return dict(zip(BUCKETS, configs, strict=True))


# The first whose prefix fits. scripts/kernel_static_report.py compiles every entry: none spills, and the first bucket
# stays below 2.9 instructions of a thread for each weight. Up to 32 rows the scale goes to the float32 sums: more
# exact, and fewer instructions; above, the sums outnumber the weights. `mma` keeps its sums in the registers of the
# warps that dequantize, which holds 64 rows; Hopper's `wgmma` gets to 128. AMD's pipeline has two stages.
_FEW = (Config(128, 16, 4, 4, False), Config(128, 32, 4, 4, False))
TABLE: dict[str, dict[int, Config]] = {
    "sm_90": _table(*_FEW, Config(128, 64, 4, 3, True), *2 * (Config(128, 128, 8, 3, True),)),
    "sm_12": _table(*_FEW, *3 * (Config(128, 64, 8, 3, True),)),
    "gfx": _table(*(replace(config, stages=2) for config in _FEW), *3 * (Config(128, 64, 8, 2, True),)),
    "": _table(*_FEW, *3 * (Config(64, 64, 4, 4, True),)),
}


def bucket(m: int) -> int:
    """The smallest bucket that holds m rows. Raises ValueError above FUSED_ROWS."""
    for size in BUCKETS:
        if m <= size:
            return size
    raise ValueError(f"the fused kernel takes at most {FUSED_ROWS} rows, not {m}")


@cache
def choose(device: Device, m: int, bits: int, block_groups: int, triton_version: str) -> Config:
    """The tile for m rows, a bucket, on a device. block_groups: groups in a block of columns (1, or more if short)."""
    own = overrides(device.name, triton_version).get(m) if bits > 2 else None  # `wq tune` measures 4 bits
    return built_in(device, m, bits, block_groups) if own is None else own


def built_in(device: Device, m: int, bits: int, block_groups: int) -> Config:
    """`choose`, by the table alone."""
    if bits == 2:
        m = min(m, 32)  # blocks are twice as wide, and so is the input's part of shared memory
    config = next(table for prefix, table in TABLE.items() if device.architecture.startswith(prefix))[m]
    if block_groups == 1:
        return config
    # Several sums for each block: with many of them, scaling the weights is cheaper. Left to itself, the assembler
    # would rather spill two registers than run one thread block less.
    limit = 255 if config.rows_m <= 32 else 0
    return replace(config, scale_weights=block_groups * config.rows_m > 64, registers=limit)


@cache
def split(device: Device, config: Config, n: int, m: int, blocks: int) -> int:
    """How many thread blocks share the columns of one tile.

    Enough to fill the device: the number of waves of thread blocks, times the work of the longest one, is least. A
    thread block costs about two blocks of columns to start and to sum up, and works on four at least.
    """
    tiles = -(-n // config.rows_n) * -(-m // config.rows_m)
    resident = device.processors * max(1, 16 // config.warps)
    tile_bytes = 4 * config.rows_n * config.rows_m
    most = max(1, min(blocks // 4, WORKSPACE // (tiles * tile_bytes)))
    return min(range(1, most + 1), key=lambda parts: (-(-tiles * parts // resident) * (-(-blocks // parts) + 2), parts))


@cache
def overrides(device_name: str, triton_version: str) -> dict[int, Config]:
    """The entries of the file named in WQ_CONFIG that are for this device and this triton; none without the variable.

    Raises ValueError for a file that cannot be read, rather than running with other tiles than asked for.
    """
    file = os.environ.get(ENVIRONMENT)
    if not file:
        return {}
    try:
        entries = json.loads(Path(file).read_text(encoding="utf-8"))["tiles"]
        return {
            bucket(entry["rows"]): Config(**entry["config"])
            for entry in entries
            if (entry["device"], entry["triton"]) == (device_name, triton_version)
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{ENVIRONMENT}={file} is no file of tiles ({error}); write one with `wq tune`.") from error
