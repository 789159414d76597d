"""A decoder as a row of blocks: find them, catch what goes into them, run one at a time.

No table of models. The blocks are the module list that holds most of the linear weights. What a model passes to each
block (masks, positions) is caught by running the model once with every block replaced by a recorder that hands its
input on unchanged, so the embedding and whatever else surrounds the blocks is the model's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from wq.errors import ModelError
from wq.solvers import Statistics


@dataclass
class Call:
    """What a block is called with besides the hidden states: the same for every batch of one shape, as a rule."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Captured:
    """The stream of hidden states in front of the blocks, and how to call each of them.

    hidden: one `[batch, tokens, hidden_size]` for each batch. calls: `calls[block][batch]`.
    keyword: the name hidden states are passed by, or None if they come first.
    """

    hidden: list[Tensor]
    calls: list[list[Call]]
    keyword: str | None = None

    def run(self, block: nn.Module, index: int, batch: int) -> Tensor:
        """The block's output, `[batch, tokens, hidden_size]`, for one batch of the current hidden states."""
        call = self.calls[index][batch]
        if self.keyword is None:
            out = block(self.hidden[batch], *call.args, **call.kwargs)
        else:
            out = block(*call.args, **{self.keyword: self.hidden[batch]}, **call.kwargs)
        return out[0] if isinstance(out, tuple) else out

    def advance(self, block: nn.Module, index: int) -> None:
        """Replace the hidden states by the block's output."""
        for batch in range(len(self.hidden)):
            self.hidden[batch] = self.run(block, index, batch)


class _Stop(Exception):
    """Ends a forward pass whose rest is not needed."""


@torch.no_grad()
def capture(model: nn.Module, blocks: nn.ModuleList, batches: Iterable[Tensor], name: str) -> Captured:
    """Run the model around its blocks on token batches `[batch, tokens]`; block 0 and all outside must be loaded.

    Raises ModelError if the model changes hidden states between blocks, which a block-by-block run would miss.
    """
    captured = Captured([], [[] for _ in blocks])
    recorder = _Recorder(captured, name)
    with recorder.installed(blocks):
        for tokens in batches:
            recorder.begin()
            model(input_ids=tokens, use_cache=False)
            if recorder.seen != len(blocks):
                raise ModelError(f"{name}: {recorder.seen} of {len(blocks)} blocks ran; wq needs all of them in a row.")
    return captured


@dataclass
class _Recorder:
    """Stands in for every block during `capture`."""

    captured: Captured
    name: str
    seen: int = 0
    as_tuple: bool | None = None
    last: Tensor | None = None
    pool: list[Tensor] = field(default_factory=list)

    @contextmanager
    def installed(self, blocks: nn.ModuleList) -> Iterator[None]:
        originals = [block.forward for block in blocks]
        try:
            for index, block in enumerate(blocks):
                block.forward = self._stand_in(index, originals[index])
            yield
        finally:
            for block in blocks:
                del block.forward  # the class's own shows again

    def begin(self) -> None:
        self.seen, self.last = 0, None

    def _stand_in(self, index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def record(*args: Any, **kwargs: Any) -> Any:
            hidden = self._take(index, args, kwargs)
            if self.as_tuple is None:  # how this model's blocks return is only known from one that ran
                self.as_tuple = isinstance(original(*args, **kwargs), tuple)
            self.seen, self.last = self.seen + 1, hidden
            return (hidden,) if self.as_tuple else hidden

        return record

    def _take(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Note the call of block `index` and return its hidden states."""
        keyword = None if args else next((k for k, v in kwargs.items() if _is_hidden(v)), None)
        if not args and keyword is None:
            raise ModelError(f"{self.name}: block {index} is called without hidden states; wq cannot follow it.")
        hidden = args[0] if args else kwargs[keyword]  # type: ignore[index]
        if self.seen and hidden is not self.last:
            raise ModelError(
                f"{self.name}: the model changes hidden states between blocks {index - 1} and {index}, "
                "so its blocks cannot be run one after another. Use --method rtn, which runs none."
            )
        if index == 0:
            self.captured.hidden.append(hidden)
            self.captured.keyword = keyword
        rest = {key: self._intern(value) for key, value in kwargs.items() if key != keyword}
        self.captured.calls[index].append(Call(tuple(map(self._intern, args[1:])), rest))
        return hidden

    def _intern(self, value: Any) -> Any:
        """The same tensor for equal ones: masks and positions repeat for every block and batch."""
        if isinstance(value, Tensor):
            for known in self.pool:
                if known is value or (known.shape == value.shape and known.dtype == value.dtype and known.equal(value)):
                    return known
            self.pool.append(value)
        elif isinstance(value, tuple):
            return tuple(map(self._intern, value))
        return value


def _is_hidden(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 3


@torch.no_grad()
def trace(block: nn.Module, linears: dict[str, nn.Linear], run: Callable[[], Tensor]) -> tuple[list[list[str]], dict]:
    """Which layers read the same input, in the order they run; and the module that produced each such input, if one.

    Layers are grouped by the identity of the tensor they get, so q/k/v and gate/up come out together without a table.
    Layers that did not run are in no group. The producers are `{first layer of the group: (name, module)}`.
    """
    seen: list[tuple[Tensor, list[str]]] = []
    outputs: list[tuple[Tensor, str, nn.Module]] = []
    names = {id(module): name for name, module in linears.items()}

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        for tensor, group in seen:
            if tensor is args[0]:
                group.append(names[id(module)])
                return
        seen.append((args[0], [names[id(module)]]))

    handles = [linear.register_forward_pre_hook(enter) for linear in linears.values()]
    for name, module in block.named_modules():
        if name and not any(module.children()):

            def leave(module: nn.Module, args: Any, out: Any, name: str = name) -> None:
                outputs.append((out, name, module))

            handles.append(module.register_forward_hook(leave))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    producers = {}
    for tensor, group in seen:
        source = next(((name, module) for out, name, module in outputs if out is tensor), None)
        if source is not None:
            producers[group[0]] = source
    return [list(dict.fromkeys(group)) for _, group in seen], producers


@torch.no_grad()
def collect(readers: list[nn.Linear], run: Callable[[int], Any], batches: int) -> list[Statistics]:
    """Statistics of each reader's input over all batches; a pass stops once the last reader has its input."""
    sums = [_SecondMoment(reader) for reader in readers]
    left = 0

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal left
        next(total for total in sums if total.reader is module).add(args[0])
        left -= 1
        if not left:
            raise _Stop

    handles = [reader.register_forward_pre_hook(enter) for reader in readers]
    try:
        for batch in range(batches):
            left = len(readers)
            with suppress(_Stop):
                run(batch)
    finally:
        for handle in handles:
            handle.remove()
    return [total.result() for total in sums]


class _SecondMoment:
    """Sums x xᵀ over tokens, in float32."""

    def __init__(self, reader: nn.Linear):
        self.reader, self.tokens = reader, 0
        size = reader.in_features
        self.total = torch.zeros(size, size, dtype=torch.float32, device=reader.weight.device)

    def add(self, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).float()
        self.total.addmm_(rows.t(), rows)
        self.tokens += rows.shape[0]

    def result(self) -> Statistics:
        return Statistics(self.total / max(self.tokens, 1), self.tokens)
