"""Values of scales, zero points and dense tensors, one piece of one tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from wq.checkpoint import Entry, pieces, read_tensor
from wq.formats.stored import Stored
from wq.verify.contents import Contents
from wq.verify.found import Found
from wq_kernels import stream as bits

_SCALES = ("weight_scale", "scales")


def check_values(entries: Mapping[str, Entry], contents: Contents, found: Found) -> None:
    """Every scale and dense value, one piece of one tensor at a time. Codes are in range as their words are."""
    layers = [name for name, stored in contents.layers.items() if stored.variant != "gemv"]  # it pads rows with zeros
    scales = {f"{name}.{leaf}" for name in layers for leaf in _SCALES} | {f"{n}_scale" for n in contents.whole}
    for name, entry in entries.items():
        if entry.dtype.is_floating_point:
            _finite(name, entry, name in scales, found)
    for name, stored in contents.layers.items():
        if stored.format == "gptq" and stored.variant.startswith("1") and not stored.scheme.symmetric:
            _first_version(name, entries[f"{name}.qzeros"], stored, found)


def _finite(name: str, entry: Entry, is_scale: bool, found: Found) -> None:
    broken, zero, first = 0, 0, -1
    seen = 0
    for piece in pieces(entry):
        values = piece if piece.dtype.itemsize > 1 else piece.float()
        bad = ~torch.isfinite(values)
        none = values == 0 if is_scale else torch.zeros_like(bad)
        broken, zero = broken + int(bad.sum()), zero + int(none.sum())
        if first < 0 and (bad | none).any():
            first = seen + int((bad | none).nonzero()[0])
        seen += len(piece)
    if broken:
        found.problem(name, "has values that are not finite", f"{broken} of {seen}, the first at {first}")
    if zero:
        found.problem(name, "has scales of zero", f"{zero} of {seen}, the first at {first}")


def _first_version(name: str, entry: Entry, stored: Stored, found: Found) -> None:
    """Version 1 stores a zero point less one. All ones stand for 0 or for one more than fits, as a reader likes."""
    points = bits.unpack(read_tensor(entry), stored.scheme.bits, stored.shape[0])
    wrapped = int((points == stored.scheme.levels - 1).sum())
    if wrapped:
        found.warn(
            f"{name}.qzeros",
            "has zero points that readers of gptq version 1 disagree about",
            f"{wrapped} of {points.numel()} are stored as {stored.scheme.levels - 1}",
            "Write it again as gptq_v2 or compressed-tensors.",
        )
