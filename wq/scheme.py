"""What is stored for one weight: how many bits, in which groups, on which grid. No torch here."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from wq.errors import GroupSizeError, SchemeError

BITS = (2, 3, 4, 8)  # what wq quantizes to
STORED_BITS = tuple(range(2, 9))  # what it reads
SCALE_DTYPES = ("float16", "bfloat16", "float32")
PER_CHANNEL = -1


def check_quantizable(bits: int) -> None:
    """Raise SchemeError for a width that is read but not made: its grids are not searched as well as the others."""
    if bits not in BITS:
        known = ", ".join(map(str, BITS))
        raise SchemeError(f"bits is {bits!r}; wq quantizes to {known} bits. Use --bits 4.")


@dataclass(frozen=True)
class Scheme:
    """The integer grid of a weight `[out_features, in_features]`: `W[n, k] = scale[n, g] * (code[n, k] - zero[n, g])`.

    bits: 2 to 8; codes are unsigned, in `[0, 2**bits)`.
    group_size: how many neighbouring input columns share a scale; -1 is one scale for each output row.
    symmetric: the zero point is the midpoint `2**(bits - 1)` and is not stored; else an integer for each group.
    scale_dtype: the dtype in which the checkpoint stores scales; candidates are rounded to it before they are compared.

    Raises SchemeError for a value outside of these.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in STORED_BITS:
            raise SchemeError(f"bits is {self.bits!r}; wq reads 2 to 8 bits. Use --bits 4.")
        if type(self.group_size) is not int or (self.group_size != PER_CHANNEL and not 1 < self.group_size <= 2**20):
            raise SchemeError(
                f"group size is {self.group_size!r}; it must be a whole number from 2 to {2**20}, or -1 for one scale "
                "for each output row. Use --group 128."
            )
        if type(self.symmetric) is not bool:
            raise SchemeError(f"symmetric is {self.symmetric!r}; it must be True or False.")
        if self.scale_dtype not in SCALE_DTYPES:
            raise SchemeError(f"scale dtype is {self.scale_dtype!r}; it must be one of {', '.join(SCALE_DTYPES)}.")

    @property
    def levels(self) -> int:
        """How many codes there are."""
        return 1 << self.bits

    @property
    def midpoint(self) -> int:
        """The zero point of the symmetric grid."""
        return 1 << (self.bits - 1)

    def groups(self, in_features: int, name: str = "weight") -> int:
        """How many groups a row of `in_features` has. Raises GroupSizeError, naming `name`, when they do not fit."""
        if self.group_size == PER_CHANNEL:
            return 1
        if in_features % self.group_size:
            fits = [g for g in (256, 128, 96, 64, 48, 32, 16) if in_features % g == 0]
            use = f"Use --group {fits[0]}" if fits else "Use --group -1"
            raise GroupSizeError(
                f"{name}: in_features {in_features} is not a multiple of group size {self.group_size}. "
                f"{use}, or leave the layer dense with --keep {name.rpartition('.')[2]}."
            )
        return in_features // self.group_size

    def bits_per_weight(self, in_features: int) -> float:
        """Bits stored for each weight of a row of `in_features`, scales and zero points included."""
        scale_bits = 32 if self.scale_dtype == "float32" else 16
        per_group = scale_bits + (0 if self.symmetric else self.bits)
        return self.bits + per_group * self.groups(in_features) / in_features

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict; `from_dict` is its inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Scheme:
        """Rebuild a scheme; raises SchemeError for unknown keys and bad values."""
        unknown = set(values) - set(cls.__dataclass_fields__)
        if unknown:
            raise SchemeError(f"unknown scheme keys {sorted(unknown)}; known are {sorted(cls.__dataclass_fields__)}.")
        return cls(**values)


class Targets(NamedTuple):
    """Layers that have this scheme in a checkpoint of several, by what a config can call them.

    names: each layer's, on disk and, where that differs, in the model. joined: what loaders call all of them, if they
    join them into one layer. experts: instead of names, a regular expression for a module whose matrices these are.
    """

    scheme: Scheme
    names: tuple[str, ...]
    joined: str = ""
    experts: str = ""
