"""A model as a row of blocks: catch what goes into them, run one at a time, see which layers share an input.

No table of models. What a model passes to each block (masks, positions) is caught by running the module around the
blocks, its root, once with every block replaced by a recorder that hands its input on unchanged. So the embedding and
whatever else surrounds the blocks is the model's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from wq.errors import ModelError, first_line
from wq.structure.linears import is_linear


@dataclass
class Call:
    """What a block is called with besides the hidden states: the same for every batch of one shape, as a rule."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Captured:
    """The stream of hidden states in front of the blocks, and how to call each of them.

    hidden: one `[batch, tokens, hidden_size]` for each batch. calls: `calls[block][batch]`.
    rest: for each batch what the first block returned after the hidden states (T5's later blocks are handed its
    position bias), or None if it returned these alone, without a tuple.
    keyword: the name hidden states are passed by, or None if they come first.
    device: where blocks run, if hidden states may wait elsewhere.
    """

    hidden: list[Tensor]
    calls: list[list[Call]]
    rest: list[tuple[Any, ...] | None]
    keyword: str | None = None
    device: torch.device | None = None

    def run(self, block: nn.Module, index: int, batch: int) -> Tensor:
        """The block's output, `[batch, tokens, hidden_size]`, for one batch of the current hidden states."""
        call, waiting = self.calls[index][batch], self.hidden[batch]
        hidden = waiting if self.device is None else waiting.to(self.device)
        if self.keyword is None:
            out = block(hidden, *call.args, **call.kwargs)
        else:
            out = block(*call.args, **{self.keyword: hidden}, **call.kwargs)
        made: Tensor = out[0] if isinstance(out, (tuple, list)) else out
        return made.to(waiting.device)

    def returned(self, batch: int, hidden: Tensor) -> Any:
        """Hidden states as a block returns them."""
        rest = self.rest[batch]
        return hidden if rest is None else (hidden, *rest)

    def outputs(self, block: nn.Module, index: int) -> list[Tensor]:
        """What the block makes of all hidden states."""
        return [self.run(block, index, batch) for batch in range(len(self.hidden))]

    def advance(self, block: nn.Module, index: int) -> None:
        """Replace the hidden states by the block's output."""
        self.hidden = self.outputs(block, index)


class Stop(Exception):
    """Ends a forward pass whose rest is not needed."""


@torch.no_grad()
def capture(root: nn.Module, blocks: nn.ModuleList, inputs: Iterable[dict[str, Any]], name: str) -> Captured:
    """Run the root of some blocks on each of `inputs`; block 0 and all of the root outside of blocks must be loaded.

    Raises ModelError if the model changes hidden states between blocks, which a block-by-block run would miss.
    """
    captured = Captured([], [[] for _ in blocks], [])
    recorder = _Recorder(captured, name)
    with _replaced(blocks, recorder.stand_in):
        for call in inputs:
            recorder.begin()
            try:
                root(**call)
            except NotImplementedError as error:
                if "meta" not in str(error):
                    raise
                raise ModelError(  # a parameter without values: something ran that is neither block nor around one
                    f"{name}: {type(root).__name__} runs more than a row of blocks ({first_line(error)}). "
                    "Use --method rtn, which runs nothing."
                ) from error
            if recorder.seen != len(blocks):
                raise ModelError(f"{name}: {recorder.seen} of {len(blocks)} blocks ran; wq needs all of them in a row.")
    return captured


@torch.no_grad()
def finish(
    root: nn.Module, blocks: nn.ModuleList, inputs: Iterable[dict[str, Any]], captured: Captured
) -> list[Tensor]:
    """What the root makes of the current hidden states, as if its last block had returned them; one for each input."""
    ready = (captured.returned(batch, hidden) for batch, hidden in enumerate(captured.hidden))
    return [predict(root, blocks, call, one) for call, one in zip(inputs, ready, strict=True)]


def predict(root: nn.Module, blocks: nn.ModuleList, call: dict[str, Any], ready: Any) -> Tensor:
    """What the root makes of what its last block returns, `ready`; with gradients, where they are enabled."""
    with _replaced(blocks, lambda index, original: lambda *args, **kwargs: ready):
        made: Tensor = root(**call)[0]
    return made


@contextmanager
def _replaced(
    blocks: nn.ModuleList, stand_in: Callable[[int, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """With the `forward` of every block replaced by `stand_in(index, original)`."""
    originals = [block.forward for block in blocks]
    try:
        for index, block in enumerate(blocks):
            block.forward = stand_in(index, originals[index])
        yield
    finally:
        for block in blocks:
            del block.forward  # the class's own shows again


@dataclass
class _Recorder:
    """Stands in for every block during `capture`."""

    captured: Captured
    name: str
    seen: int = 0
    last: Tensor | None = None
    pool: list[Tensor] = field(default_factory=list)

    def begin(self) -> None:
        self.seen, self.last = 0, None

    def stand_in(self, index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def record(*args: Any, **kwargs: Any) -> Any:
            hidden = self._take(index, args, kwargs)
            if index == 0:
                self.captured.rest.append(self._rest(original, args, kwargs))
            self.seen, self.last = self.seen + 1, hidden
            return self.captured.returned(-1, hidden)

        return record

    def _rest(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """How blocks return is only known from one that ran; what else they return may differ from batch to batch."""
        known = self.captured.rest
        if known and not any(isinstance(value, Tensor) for value in known[-1] or ()):
            return known[-1]
        out = original(*args, **kwargs)
        return tuple(map(self._intern, out[1:])) if isinstance(out, (tuple, list)) else None

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
            if any(known is value for known in self.pool):
                return value
            for known in self.pool:
                if known.shape == value.shape and known.dtype == value.dtype and known.equal(value):
                    return known
            self.pool.append(value)
        elif isinstance(value, tuple):
            return tuple(map(self._intern, value))
        return value


def _is_hidden(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 3


class Traced(NamedTuple):
    """How data flows in a block.

    groups: layers that read the same input, in the order they run; a module of experts is a group of its own, what did
    not run is in no group. producers: `{first layer of a group: (name, module)}` of what produced that input, if one
    module did. residuals: `{layer: name}` of the module whose input is what the layer's output is added to, "" for the
    block itself.
    """

    groups: list[list[str]]
    producers: dict[str, tuple[str, nn.Module]]
    residuals: dict[str, str]


@torch.no_grad()
def trace(block: nn.Module, readers: dict[str, nn.Module], run: Callable[[], Any]) -> Traced:
    """Run a block once and see. By the identity of tensors, and of their sums, so without a table of models."""
    seen: list[tuple[Tensor, list[str]]] = []
    inputs: list[tuple[Tensor, str]] = []
    outputs: list[tuple[Tensor, str, nn.Module]] = []
    names = {id(module): name for name, module in readers.items()}

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value, name = args[0] if args else next(iter(kwargs.values())), names[id(module)]
        for tensor, group in seen:
            if tensor is value and is_linear(module) and is_linear(readers[group[0]]):
                group.append(name)
                return
        seen.append((value, [name]))

    handles = [reader.register_forward_pre_hook(enter, with_kwargs=True) for reader in readers.values()]
    for name, module in block.named_modules():
        if not name or not any(module.children()):

            def arrive(module: nn.Module, args: Any, kwargs: dict[str, Any], name: str = name) -> None:
                inputs.append((first_hidden(args, kwargs), name))

            def leave(module: nn.Module, args: Any, out: Any, name: str = name) -> None:
                outputs.append((out[0] if isinstance(out, (tuple, list)) else out, name, module))

            handles.append(module.register_forward_pre_hook(arrive, with_kwargs=True))
            handles.append(module.register_forward_hook(leave))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    producers = {}
    for tensor, group in seen:
        source = next(((name, module) for out, name, module in outputs if out is tensor and name), None)
        if source is not None:
            producers[group[0]] = source
    groups = [list(dict.fromkeys(group)) for _, group in seen]
    return Traced(groups, producers, _residuals(groups, inputs, outputs))


def _residuals(
    groups: list[list[str]], inputs: list[tuple[Tensor, str]], outputs: list[tuple[Tensor, str, nn.Module]]
) -> dict[str, str]:
    """Which layers' outputs are added, as they are, to something that a module reads: a sum shows by its value."""
    made = {name: out for out, name, _ in outputs}
    readers = {name for group in groups for name in group}
    stream = [(value, name) for value, name in inputs if name not in readers]
    sums = [*(value for value, _ in stream), made[""]]
    found = {}
    for name in (group[0] for group in groups if len(group) == 1 and group[0] in made):
        out = made[name]
        addends = [(value.reshape(out.shape), source) for value, source in stream if _alike(value, out)]
        totals = [total.reshape(out.shape) for total in sums if _alike(total, out)]
        source = next((source for r, source in addends if any(torch.equal(r + out, total) for total in totals)), None)
        if source is not None:
            found[name] = source
    return found


def _alike(value: Any, other: Tensor) -> bool:
    """Whether both are the same tokens' vectors, of one size, perhaps with the windows joined."""
    if not isinstance(value, Tensor) or value.dtype != other.dtype:
        return False
    return value.numel() == other.numel() and value.shape[-1:] == other.shape[-1:]


def first_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a module of a block is called with first."""
    return args[0] if args else next((value for value in kwargs.values() if _is_hidden(value)), None)


@torch.no_grad()
def arguments(module: nn.Module, names: tuple[str, ...], run: Callable[[int], Any], batches: int) -> list[list[Tensor]]:
    """The first arguments that a module is called with in each batch, by position or by name; the pass stops there."""
    found: list[list[Tensor]] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append([args[place] if place < len(args) else kwargs[name] for place, name in enumerate(names)])
        raise Stop

    handle = module.register_forward_pre_hook(enter, with_kwargs=True)
    try:
        for batch in range(batches):
            with suppress(Stop):
                run(batch)
    finally:
        handle.remove()
    return found
