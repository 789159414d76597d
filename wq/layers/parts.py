"""Parts of tensors: what this process has of a DTensor, under tensor parallelism."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

Join = Callable[[Tensor], Tensor]


def local(tensor: Any) -> Tensor:
    """The part of a DTensor that this process has; another tensor as it is. Without gradient."""
    part: Tensor = (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach()
    return part


def join(tensor: Any) -> Join:
    """What makes a process's part the DTensor again that `tensor` is."""
    if not hasattr(tensor, "placements"):
        return _as_it_is
    from torch.distributed.tensor import DTensor

    known = {"shape": tensor.shape, "stride": tensor.stride(), "run_check": False}
    return partial(DTensor.from_local, device_mesh=tensor.device_mesh, placements=tensor.placements, **known)


def whole(tensor: Any) -> Tensor:
    """A DTensor's parts put together, on the CPU; another tensor as it is. Every process must call it."""
    full: Tensor = tensor.full_tensor().cpu() if hasattr(tensor, "full_tensor") else tensor
    return full


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
