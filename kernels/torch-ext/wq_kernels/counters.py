"""The counters with which thread blocks that share a tile tell who is last. They are zero before and after a launch.

Two launches that may run at the same time must not share counters, and a CUDA graph keeps those it was captured with.
So there is one arena for each device, made before any graph is: a stream has a place of its own in it for ordinary
launches, and every captured launch gets a piece for itself, for good. When the arena is used up, a launch gets zeros of
its own, which costs a small kernel each time.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .configs import WORKSPACE
from .target import capturing, stream

__all__ = ["Arena", "arena", "take"]

_PLACE = WORKSPACE // (2 * 4 * 16 * 16)  # counters: the most tiles that can be split, in the smallest tiles there are
_STREAMS = 64
_CAPTURED = 2**20  # counters for captured launches: a model with 224 layers takes some ten thousand


class Arena:
    """The counters of one device."""

    def __init__(self, device: torch.device):
        self._zeros = torch.zeros(_STREAMS * _PLACE + _CAPTURED, dtype=torch.int32, device=device)
        self._streams: dict[int, Tensor] = {}
        self._next = _STREAMS * _PLACE

    def take(self, tiles: int) -> Tensor:
        """Zeros for at least so many tiles, for a launch on the current stream."""
        device = self._zeros.device
        if capturing(device):
            start, self._next = self._next, self._next + tiles
            if self._next <= self._zeros.numel():
                return self._zeros[start : start + tiles]
        elif tiles <= _PLACE:
            key = stream(device)
            if key not in self._streams and len(self._streams) < _STREAMS:
                start = len(self._streams) * _PLACE
                self._streams[key] = self._zeros[start : start + _PLACE]
            if key in self._streams:
                return self._streams[key]
        return torch.zeros(tiles, dtype=torch.int32, device=device)


@cache
def arena(device: torch.device) -> Arena:
    """The arena of a device, made when it is first asked for: by `fused.self_test`, before there are graphs."""
    return Arena(device)


def take(device: torch.device, tiles: int) -> Tensor:
    """Counters for a launch of so many tiles on the current stream of a device."""
    return arena(device).take(tiles)
