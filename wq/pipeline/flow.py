"""Calibration windows on their way through a tower: the quantized model's hidden states, and the dense model's beside.

Where memory runs out, less is asked for: half as many windows at once, again and again; then hidden states wait on the
CPU; then all runs there. Statistics are summed window by window, so how many run at once changes no result, as far as
matrix products of other heights give the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from wq.machine import out_of_memory, release_memory
from wq.pipeline import blocks as decoder
from wq.pipeline.progress import Streams
from wq.pipeline.ranks import Ranks
from wq.pipeline.source import Source
from wq.structure.towers import Tower

_BATCH_TOKENS = 4096  # enough rows for full-speed matrix products, few enough for small activations

T = TypeVar("T")


class NotFiniteError(Exception):
    """Hidden states that are not finite, in these windows of the flow."""

    def __init__(self, windows: list[int]):
        super().__init__(f"windows {windows}")
        self.windows = windows


def patiently(work: Callable[[], T], less: Callable[[], bool], undo: Callable[[], None] = lambda: None) -> T:
    """Do something, if memory runs out once more, and then with less and less at once, as long as `less` finds a way.

    What failed must have had no effect, but for what `undo` takes back.
    """
    again = True
    while True:
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            failed = error.with_traceback(None)  # whose frames hold tensors
        undo()
        release_memory()
        if not again and not less():
            raise failed
        again = False


def windows_at_once(seqlen: int) -> int:
    """How many windows make a batch, where there is memory for it."""
    return max(1, _BATCH_TOKENS // max(1, seqlen))


def batch_sizes(windows: int, rows: int) -> list[int]:
    """How many windows each batch has: `rows`, but for the first, in which one is enough to see how data flows."""
    if not windows:
        return []
    full, rest = divmod(windows - 1, rows)
    return [1, *[rows] * full, *[rest] * (rest > 0)]


def root_inputs(source: Source, tower: Tower, batches: list[Tensor], encoded: list[Tensor]) -> list[dict[str, Any]]:
    """What the root of a tower is called with, batch by batch.

    An encoder reads the first half of each window; its decoder continues with the second, shifted by one token.
    """
    half = max(1, batches[0].shape[1] // 2)
    if tower.reads_encoder:
        start = _start_token(source.config)
        later = [functional.pad(batch[:, half:-1], (1, 0), value=start) for batch in batches]
        return [
            {"input_ids": ids, "encoder_hidden_states": states, "use_cache": False}
            for ids, states in zip(later, encoded, strict=True)
        ]
    if source.config.is_encoder_decoder:
        return [{"input_ids": batch[:, :half]} for batch in batches]
    return [{"input_ids": batch, "use_cache": False} for batch in batches]


def _start_token(config: Any) -> int:
    """What a decoder of an encoder-decoder model reads first."""
    known = (getattr(config, f"{name}_token_id", None) for name in ("decoder_start", "bos", "pad"))
    return next((token for token in known if isinstance(token, int)), 0)


class Flow:
    """The windows `tokens`, int64 `[windows, seqlen]`, in front of a block of a tower.

    ranks: processes that share them; here is one's part, which begins with window `first`. One of several does not ask
    for less where memory runs out: the others would wait for it. paired: whether the dense model's hidden states are
    wanted, too. rows: windows at once. encoded: what an encoder made of the windows, for a decoder that reads it:
    `encoded` and, paired, `dense encoded`.
    """

    def __init__(
        self,
        source: Source,
        tower: Tower,
        tokens: Tensor,
        device: torch.device,
        dtype: torch.dtype,
        paired: bool,
        encoded: Streams,
        ranks: Ranks,
        rows: int | None = None,
    ):
        share = ranks.share(len(tokens))
        self.source, self.tower, self.tokens = source, tower, tokens[share]
        self.ranks, self.first = ranks, share.start
        self.device, self.dtype, self.paired = device, dtype, paired
        self.encoded = {name: stream for name, stream in encoded.items() if "encoded" in name}
        self.offloaded = False
        self.sizes = [len(batch) for batch in self.encoded.get("encoded", ())]
        self.sizes = self.sizes or batch_sizes(len(self.tokens), rows or windows_at_once(tokens.shape[1]))
        self.quantized = decoder.Captured([], [], [])
        self.dense: decoder.Captured | None = None
        self.attempt(self.capture)

    @property
    def streams(self) -> Streams:
        """What the next block reads, to go on from."""
        found = {**self.encoded, "hidden": self.quantized.hidden}
        return found if self.dense is None else {**found, "dense": self.dense.hidden}

    def go_on(self, streams: Streams) -> None:
        """Take up hidden states where a run before has left them, in its batches."""
        self.sizes = [len(batch) for batch in streams["hidden"]]
        self.attempt(self.capture)
        self._put(streams["hidden"], streams.get("dense"))

    def advance(
        self, block: nn.Module, original: nn.Module | None, index: int, known: list[Tensor], dense_known: list[Tensor]
    ) -> None:
        """Replace hidden states by what block `index` makes of them, which may be known.

        original: the dense block, if the dense model runs beside. Both streams move, or neither. Raises NotFiniteError.
        """
        hidden = known or self.quantized.outputs(block, index)
        dense = None
        if self.dense is not None and original is not None:
            dense = dense_known or self.dense.outputs(original, index)
        self._put(hidden, dense)

    def finish(self) -> Streams:
        """What an encoder hands to its decoder."""
        with self._around():
            inputs = self._inputs(self.encoded.get("encoded", []))
            found = {"encoded": decoder.finish(self.tower.root, self.tower.blocks, inputs, self.quantized)}
            if self.dense is not None:
                found["dense encoded"] = decoder.finish(self.tower.root, self.tower.blocks, inputs, self.dense)
        return found

    def attempt(self, work: Callable[[], T], undo: Callable[[], None] = lambda: None) -> T:
        """`patiently`, with less and less at once."""
        return patiently(work, self.narrow, undo) if self.ranks.alone else work()

    def narrow(self) -> bool:
        """Ask for less, and catch again how blocks are called; False if there is no less."""
        hidden = self.quantized.hidden
        dense = None if self.dense is None else self.dense.hidden
        while self._step():
            try:
                self.capture()
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
            else:
                if hidden:
                    self._put(hidden, dense)
                return True
            release_memory()
        return False

    def _step(self) -> bool:
        if max(self.sizes) > 1:
            self.sizes = [half for size in self.sizes for half in (size - size // 2, size // 2) if half]
        elif self.device.type != "cpu" and not self.offloaded:
            self.offloaded = True
        elif self.device.type != "cpu":
            self.device = torch.device("cpu")
        else:
            return False
        return True

    def _put(self, hidden: list[Tensor], dense: list[Tensor] | None) -> None:
        """Have these hidden states in front of the next block, in batches of `sizes`, where they wait."""
        streams = [hidden] if dense is None else [hidden, dense]
        here = {self.first + window for stream in streams for window in _not_finite(stream)}
        spoiled = set().union(*self.ranks.gather(here))
        if spoiled:
            raise NotFiniteError(sorted(spoiled))
        self.quantized.hidden = self._batched(hidden)
        if self.dense is not None and dense is not None:
            self.dense.hidden = self._batched(dense)

    def _batched(self, stream: list[Tensor]) -> list[Tensor]:
        """A stream in batches of `sizes`, which are its own or parts of them."""
        place = torch.device("cpu") if self.offloaded else self.device
        ends = torch.tensor(self.sizes).cumsum(0).tolist()
        found, start, seen = [], 0, 0
        for batch in stream:
            seen += len(batch)
            mine = [end for end in ends if start < end <= seen]
            found += [part.to(place) for part in batch.tensor_split([end - start for end in mine[:-1]])]
            start = seen
        return found

    def capture(self) -> None:
        """Begin at the front: how the root calls its blocks, and the hidden states in front of block 0."""
        encoded, dense = self.encoded.get("encoded", []), self.encoded.get("dense encoded", [])
        self.source.unload(self.tower.blocks)
        self.source.load((f"{self.tower.blocks_path}.0",), self.device, self.dtype)
        root, blocks, name = self.tower.root, self.tower.blocks, self.source.name
        with self._around():
            made = decoder.capture(root, blocks, self._inputs(encoded), name)
            paired = None
            if self.paired:  # in front of block 0 they are the same, but for what an encoder said
                paired = replace(made, hidden=list(made.hidden))
                if dense:
                    paired = decoder.capture(root, blocks, self._inputs(dense), name)
        self.source.unload(blocks)
        self.quantized, self.dense = made, paired
        made.device = self.device
        if paired is not None:
            paired.device = self.device
        self._put(made.hidden, None if paired is None else paired.hidden)

    def _inputs(self, encoded: list[Tensor]) -> list[dict[str, Any]]:
        batches = [batch.to(self.device) for batch in self.tokens.split(self.sizes)]
        states = [states.to(self.device) for states in self._batched(encoded)]
        return root_inputs(self.source, self.tower, batches, states)

    @contextmanager
    def _around(self) -> Iterator[None]:
        """With everything of a tower loaded but its blocks: embeddings, the last norm."""
        with self.source.around(self.tower, self.device, self.dtype):
            yield


def _not_finite(stream: list[Tensor]) -> Iterator[int]:
    """The windows of a stream in which something is not finite."""
    first = 0
    for batch in stream:
        if not all(torch.isfinite(end) for end in batch.aminmax()):
            finite = torch.isfinite(batch).reshape(len(batch), -1).all(1)
            yield from (first + int(window) for window in (~finite).nonzero())
        first += len(batch)
