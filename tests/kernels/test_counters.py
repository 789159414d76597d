"""Launches that may run at the same time never share counters: streams, captured graphs, and an arena used up."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from wq_kernels import counters

CPU = torch.device("cpu")


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, bool], None]:
    """Say which stream is the current one, and whether it is being captured; a CPU has neither."""

    def say(stream: int, capturing: bool) -> None:
        monkeypatch.setattr(counters, "stream", lambda device: stream)
        monkeypatch.setattr(counters, "capturing", lambda device: capturing)

    return say


def memory(tensor: Tensor) -> range:
    return range(tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size())


def apart(tensors: list[Tensor]) -> bool:
    spans = sorted((memory(tensor) for tensor in tensors), key=lambda span: span.start)
    return all(left.stop <= right.start for left, right in pairwise(spans))


def test_a_stream_keeps_its_place_and_shares_it_with_no_other(now: Callable[[int, bool], None]) -> None:
    arena = counters.Arena(CPU)
    taken = []
    for stream in (0, 7, 9):
        now(stream, False)
        taken.append(arena.take(5))
        assert arena.take(3).data_ptr() == taken[-1].data_ptr()
    assert apart(taken)
    assert all(tensor.dtype == torch.int32 and tensor.numel() >= 5 and not tensor.any() for tensor in taken)


def test_every_captured_launch_has_a_piece_of_its_own_for_good(now: Callable[[int, bool], None]) -> None:
    arena = counters.Arena(CPU)
    now(3, False)
    eager = arena.take(100)
    now(3, True)
    captured = [arena.take(100) for _ in range(20)]
    assert apart([eager, *captured])
    assert [tensor.numel() for tensor in captured] == [100] * 20


def test_an_arena_that_is_used_up_gives_zeros_of_their_own(
    now: Callable[[int, bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counters, "_CAPTURED", 150)
    monkeypatch.setattr(counters, "_STREAMS", 2)
    arena = counters.Arena(CPU)
    whole = memory(arena._zeros)
    now(0, True)
    inside, outside = arena.take(100), arena.take(100)
    assert memory(inside).start in whole
    assert memory(outside).start not in whole
    taken = []
    for stream in range(3):
        now(stream, False)
        taken.append(arena.take(8))
    assert [memory(tensor).start in whole for tensor in taken] == [True, True, False]
    assert memory(arena.take(counters._PLACE + 1)).start not in whole
    assert not outside.any()
    assert not taken[-1].any()


def test_there_is_one_arena_for_a_device() -> None:
    assert counters.arena(CPU) is counters.arena(CPU)
    assert not counters.take(CPU, 4).any()
