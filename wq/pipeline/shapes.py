"""Code run on tensors that have a shape and no values (device meta): the memory and the work that it would take.

What a block takes is spread over the model's own code, the statistics, the solver and the order in which they let go of
things. A formula for it would be wrong with the next change to any of them; so that very code is run, with a meter that
sees every operation. Where the code asks for a value, the answer is the one of a run in which nothing goes wrong.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

_aten = torch.ops.aten
_LESS = (_aten.le.Scalar, _aten.le.Tensor, _aten.lt.Scalar, _aten.lt.Tensor)
_FREE = (_aten.detach, _aten.empty, _aten.new_empty, _aten.empty_like)  # besides views: these touch no element


@dataclass(frozen=True)
class Work:
    """What code does. flops: of matrix products, a multiplication and an addition counted as two, and of
    factorizations. moved: bytes that all other operations read and write. calls: operations.
    """

    flops: float = 0.0
    moved: float = 0.0
    calls: float = 0.0

    def __add__(self, other: Work) -> Work:
        return self.plus(other)

    def plus(self, other: Work, times: float = 1.0) -> Work:
        """Both, the other so many times."""
        return Work(
            self.flops + times * other.flops, self.moved + times * other.moved, self.calls + times * other.calls
        )


class Meter(TorchDispatchMode):
    """Sees the operations on meta tensors that run inside of `with`.

    live, peak: bytes of the tensors made since, now and at most. work: what was done. share: of its rows `[n, k]`, the
    part of each column that a mask lets through which asks whether any of them is so: experts pick tokens like that.
    Other masks are taken to let all rows through.
    """

    def __init__(self, share: float = 1.0):
        super().__init__()
        self.share, self.work = share, Work()
        self.live = self.peak = 0
        self._columns = 1
        self._sizes: dict[int, int] = {}
        self._last: Any = None
        self._value = 1.0

    def know(self, tensors: Iterable[Tensor]) -> None:
        """Tensors that are there already: they and views of them count nothing."""
        for tensor in tensors:
            self._sizes.setdefault(tensor.untyped_storage()._cdata, 0)

    def take(self) -> tuple[int, Work]:
        """The peak and the work since this was last asked."""
        taken = self.peak, self.work
        self.peak, self.work = self.live, Work()
        return taken

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        last, self._last = self._last, func
        if func is _aten.any.dim:
            self._columns = args[0].shape[args[1]]
        known, out = self._answer(func, args, kwargs, last)
        if not known:
            out = func(*args, **kwargs)
        made = [tensor for tensor in tree_iter(out) if isinstance(tensor, Tensor) and tensor.is_meta]
        fresh = sum(self._note(tensor) for tensor in made)
        hidden = _workspace(func, args)
        self.peak = max(self.peak, self.live + hidden)
        self.work = self.work.plus(_work(func, args, kwargs, out, made, fresh))
        return out

    def _answer(self, func: Any, args: Any, kwargs: Any, last: Any) -> tuple[bool, Any]:
        """Whether an operation needs values, and what it gives in a run that goes well.

        Tensors that are compared are equal, conditions hold unless they ask for something small or negative, counts of
        what is wrong are 0, and numbers that should fall keep falling.
        """
        if func is _aten.equal.default:
            return True, True
        first = args[0] if args else None
        if not isinstance(first, Tensor) or not first.is_meta:
            return False, None
        if func is _aten._local_scalar_dense.default:
            return True, self._scalar(first.dtype, last)
        if func is _aten._grouped_mm.default:  # on meta it takes no float32
            return True, first.new_empty(first.shape[0], args[1].shape[-1])
        if func is _aten._to_copy.default and torch.device(kwargs.get("device") or "meta").type == "cpu":
            return True, torch.ones(first.shape, dtype=kwargs.get("dtype") or first.dtype)
        if func is _aten.index.Tensor and args[1][0] is not None and args[1][0].dtype is torch.bool:
            share = self.share * self._columns if last is _aten.any.dim else 1.0
            rows = math.ceil(min(share, 1.0) * args[1][0].numel())
            return True, first.new_empty(rows, *first.shape[args[1][0].dim() :])
        return False, None

    def _scalar(self, dtype: torch.dtype, last: Any) -> Any:
        if dtype is torch.bool:
            return last not in _LESS
        if not dtype.is_floating_point:
            return 0
        self._value *= 1 - 1e-9
        return self._value

    def _note(self, tensor: Tensor) -> int:
        """Follow a tensor's memory until it is freed; its bytes, 0 for one that was there."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return 0
        size = self._sizes[key] = storage.nbytes()
        self.live += size
        weakref.finalize(storage, self._free, key)
        return size

    def _free(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


def _workspace(func: Any, args: Any) -> int:
    """Bytes that an operation takes and gives back unseen."""
    if func is _aten.cholesky_solve.default:  # LAPACK wants both its matrices copied
        return int(args[1].nbytes)
    if func in (_aten.sum.default, _aten.sum.dim_IntList) and args[0].dtype is torch.bool:  # as int64
        return 8 * int(args[0].numel())
    return 0


def _work(func: Any, args: Any, kwargs: Any, out: Any, made: list[Tensor], fresh: int) -> Work:
    packet = func._overloadpacket
    if packet in flop_registry:
        return Work(flops=float(flop_registry[packet](*args, **kwargs, out_val=out)), calls=1)
    if packet in _FACTORIZATIONS:
        return Work(flops=float(_FACTORIZATIONS[packet](*args)), calls=1)
    in_place = func._schema.is_mutable
    if packet in _FREE or not (fresh or in_place):
        return Work(calls=1)
    touched = sum(t.nbytes for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)) + sum(t.nbytes for t in made)
    return Work(moved=float(touched), calls=1)


def _cubed(matrix: Tensor, share: float) -> float:
    return share * matrix.numel() * matrix.shape[-1]


_FACTORIZATIONS: dict[Any, Callable[..., float]] = {
    _aten.linalg_cholesky_ex: lambda a, *_: _cubed(a, 1 / 3),
    _aten.linalg_solve_triangular: lambda a, b, *_: b.numel() * a.shape[-1],
    _aten.cholesky_solve: lambda b, a, *_: 2 * b.numel() * a.shape[-1],
    _aten._linalg_solve_ex: lambda a, *_: _cubed(a, 2 / 3),
    _aten._grouped_mm: lambda a, b, *_: 2 * a.numel() * b.shape[-1],
}


class Attention(TorchFunctionMode):
    """Fused attention holds no scores, which its form on meta does: replaced by its result."""

    def __init__(self, meter: Meter):
        super().__init__()
        self._meter = meter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, value = (*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :]))[:3]
        if query.shape[-1] != value.shape[-1]:  # not fused on a CPU
            return func(*args, **kwargs)
        self._meter.work = self._meter.work.plus(Work(flops=4.0 * query.numel() * key.shape[-2], calls=1))
        return query.new_empty(query.shape)


@contextmanager
def metered(model: nn.Module, share: float = 1.0) -> Iterator[Meter]:
    """With a meter running over a model whose parameters are on meta; its buffers are, too, until the end."""
    kept = [(module, name, b) for module in model.modules() for name, b in module._buffers.items() if b is not None]
    meter = Meter(share)
    for module, name, buffer in kept:
        module._buffers[name] = buffer.to("meta")
    meter.know([*model.parameters(), *model.buffers()])
    try:
        with Attention(meter), meter, torch.no_grad():
            yield meter
    finally:
        for module, name, buffer in kept:
            module._buffers[name] = buffer
