"""Rounding that a whole block learns: what is left by solvers, which see one layer each, its layers make up together.

Codes and scales of all layers of a block learn by gradient, so that the block makes of the quantized model's hidden
states what the dense block makes of the dense model's. Learned rounding as in SignRound (arXiv 2309.05516) and the
block-wise stage of EfficientQAT (arXiv 2407.11062), but started from what the solver found, and with the error of each
token relative to what it is an error of: a norm will come, and a few tokens are a thousand times as large as the rest.
Windows that were held out from the solver decide whether the block keeps what it has learned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wq.learner import Learner, laid, learning_dtype, schedule
from wq.pipeline.statistics import HELD_OUT

_WINDOWS = 8  # in a step


@dataclass(frozen=True)
class BlockRates:
    """Learning rates of Adam, in units of what it moves: codes in steps of the grid, scales relative to a scale.

    passes: over the windows.
    """

    codes: float
    scales: float
    passes: int


@dataclass(frozen=True)
class Lesson:
    """What a block has to learn. run: the block on a batch of the quantized model's hidden states, given its number.

    wanted: what it should return, `[windows, tokens, hidden_size]` for each batch. first: the number of the first
    window among all.
    """

    run: Callable[[int], Tensor]
    wanted: Sequence[Tensor]
    first: int

    def errors(self, batch: int) -> Tensor:
        """Relative errors of the block's output, for each window of a batch."""
        wanted = self.wanted[batch].float()
        error = (self.run(batch).float() - wanted).square().sum(-1)
        return (error / wanted.square().sum(-1).clamp_min(1e-12)).mean(-1)

    def decides(self, batch: int) -> Tensor:
        """1 for each window of a batch that decides and is not learned from, 0 for the others."""
        wanted = self.wanted[batch]
        before = self.first + sum(len(one) for one in self.wanted[:batch])
        numbers = torch.arange(before, before + len(wanted), device=wanted.device)
        return (numbers % HELD_OUT == HELD_OUT - 1).float()

    def judge(self) -> float:
        """The mean error on what is held out; 0 on shapes alone."""
        total = count = torch.zeros((), device=self.wanted[0].device)
        for batch in range(len(self.wanted)):
            total = total + (self.errors(batch) * self.decides(batch)).sum()
            count = count + self.decides(batch).sum()
        return 0.0 if total.is_meta else float(total / count.clamp_min(1))

    def steps(self, seed: int) -> Iterator[list[int]]:
        """Batches that make up a step, in an order of their own: as many as have `_WINDOWS` windows."""
        steps: list[list[int]] = [[]]
        count = 0
        for batch, wanted in enumerate(self.wanted):
            if count >= _WINDOWS:
                steps.append([])
                count = 0
            steps[-1].append(batch)
            count += len(wanted)
        order = torch.randperm(len(steps), generator=torch.Generator().manual_seed(seed))
        yield from (steps[number] for number in order.tolist())


@torch.no_grad()
def learn(block: nn.Module, learners: Mapping[str, Learner], lesson: Lesson, rates: BlockRates) -> tuple[float, float]:
    """Let `learners`, by name in the block, learn what the block is to make; its error before, and after.

    Errors are those on windows held out. If learning did not lower it, learners are as they were.
    """
    layers = list(learners.values())
    before = [(layer.scale.clone(), layer.latent.detach().clone()) for layer in layers]
    exact, dtype = next(block.parameters()).dtype, learning_dtype(next(block.parameters()))
    with _in_place(block, learners):
        with laid(layers, exact):
            errors = [lesson.judge()]
        _optimize(layers, lesson, rates, dtype)
        for layer in layers:
            layer.settle()
        with laid(layers, exact):
            errors.append(lesson.judge())
    if not errors[1] < errors[0]:
        for layer, (scale, codes) in zip(layers, before, strict=True):
            layer.scale, layer.latent.data = scale, codes
    return errors[0], errors[1]


@torch.enable_grad()
def _optimize(layers: list[Learner], lesson: Lesson, rates: BlockRates, dtype: torch.dtype) -> None:
    for layer in layers:
        layer.free()
    groups = [
        {"params": [layer.latent for layer in layers], "lr": rates.codes},
        {"params": [layer.change for layer in layers], "lr": rates.scales},
    ]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    plan = [step for seed in range(rates.passes) for step in lesson.steps(seed)]
    for number, step in enumerate(plan):
        for group, peak in zip(optimizer.param_groups, (rates.codes, rates.scales), strict=True):
            group["lr"] = peak * schedule(number, len(plan))
        windows = sum(len(lesson.wanted[batch]) for batch in step)
        with laid(layers, dtype):
            for batch in step:
                (lesson.errors(batch) * (1 - lesson.decides(batch))).sum().div(windows).backward()
        for layer in layers:
            layer.gather()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@contextmanager
def _in_place(block: nn.Module, learners: Mapping[str, Learner]) -> Iterator[None]:
    """With learners in the place of the layers of a block, and nothing else in it that takes gradients."""
    layers = {name: block.get_submodule(name) for name in learners}
    others = [parameter for parameter in block.parameters() if parameter.requires_grad]
    try:
        for parameter in others:
            parameter.requires_grad_(False)
        for name, learner in learners.items():
            block.set_submodule(name, learner)
        yield
    finally:
        for name, layer in layers.items():
            block.set_submodule(name, layer)
        for parameter in others:
            parameter.requires_grad_(True)
