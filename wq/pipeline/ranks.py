"""The processes that share a run: one alone, as a rule, or those that `torchrun` or `accelerate launch` started.

Each has a share of the calibration windows. Sums over tokens are summed over all of them, rows of a weight and experts
are solved apart and exchanged, and the first one writes. Everything here is collective: all processes call it in the
same order, or all of them end.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from wq.errors import ProcessError, WqError, first_line

_TIMEOUT = datetime.timedelta(days=7)  # the others wait while the first one distils

T = TypeVar("T")


class Ranks:
    """One of `count` processes, number `rank`."""

    def __init__(self, rank: int = 0, count: int = 1):
        self.rank, self.count = rank, count

    @property
    def alone(self) -> bool:
        return self.count == 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This process's part of a row of things, as even as can be."""
        return slice(count * self.rank // self.count, count * (self.rank + 1) // self.count)

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up everyone's tensor, in place."""
        if not self.alone:
            with _together():
                dist.all_reduce(tensor)
        return tensor

    def gather(self, value: T) -> list[T]:
        """Everyone's value, small and without tensors."""
        if self.alone:
            return [value]
        found: list[Any] = [None] * self.count
        with _together():
            dist.all_gather_object(found, value)
        return found

    def join(self, tensor: Tensor) -> Tensor:
        """Everyone's tensor, joined along the first dimension, which alone may differ."""
        if self.alone:
            return tensor
        return torch.cat([self.tensor(tensor, source, len(tensor)) for source in range(self.count)])

    def tensor(self, tensor: Tensor, source: int, rows: int) -> Tensor:
        """The tensor of process `source`; those of others must only have its dtype and its shape behind `rows`."""
        rows = self.gather(rows)[source]
        found = tensor.contiguous() if self.rank == source else tensor.new_empty(rows, *tensor.shape[1:])
        if found.numel():
            with _together():
                dist.broadcast(found.view(-1).view(torch.uint8), source)  # as bytes: not all backends know all dtypes
        return found

    def first(self, work: Callable[[], T]) -> T:
        """What the first process makes, small and without tensors, for all.

        Raises what it is refused with; in the others ProcessError, for the first one speaks for all.
        """
        if self.alone:
            return work()
        told: list[Any] = [None, None]
        if self.is_first:
            try:
                told[0] = work()
            except WqError as error:
                told[1] = error
        with _together():
            dist.broadcast_object_list(told, 0)
        if told[1] is not None:
            raise told[1] if self.is_first else ProcessError(f"the first process was refused: {told[1]}")
        made: T = told[0]
        return made

    def wait(self) -> None:
        """Until all are here."""
        if not self.alone:
            with _together():
                dist.barrier()


@contextmanager
def _together() -> Iterator[None]:
    """What a backend says of a process that is gone, as an error of wq's own."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessError(f"another process of this run has ended ({first_line(error)}).") from error


def launched() -> bool:
    """Whether this process was started as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def assemble(device: str) -> Ranks:
    """Meet the processes that were started with this one. device: where they compute, a GPU for each process."""
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.device(device).type == "cuda" else "gloo", timeout=_TIMEOUT)
    return Ranks(dist.get_rank(), dist.get_world_size())
