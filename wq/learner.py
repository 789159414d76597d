"""Linear layers that learn on their integer grid: by hand of a straight-through estimate, within the format.

Codes are held as numbers that are rounded where they are used. Each begins in the middle of what is rounded to it, and
so moves on only if gradients agree for a while: begun where the dense weight lies, as near to it as its code allows,
many are next to another code, and change with the noise of a few windows.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from wq import grid
from wq.scheme import Scheme
from wq.solvers import Solution
from wq.structure.linears import matrix


def schedule(step: int, steps: int) -> float:
    """A short rise, then half a cosine down to 0."""
    rise = max(1, steps // 10)
    return min(1.0, (step + 1) / rise) * 0.5 * (1 + math.cos(math.pi * step / steps))


def learning_dtype(weight: Tensor) -> torch.dtype:
    """Of products while learning: the model's own on a GPU; bfloat16 on processors that multiply it."""
    if weight.device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False):
        return torch.bfloat16
    return weight.dtype


class Learner(nn.Module):
    """A linear layer on an integer grid whose scales learn, and perhaps its codes.

    `lay` makes the weight that it computes with; after a backward pass, `gather` has the gradients of what it is made
    of. So a step of many windows goes through the grid once.
    """

    def __init__(self, dense: nn.Module, solution: Solution, scheme: Scheme):
        super().__init__()
        device = matrix(dense).device
        self.scheme = scheme
        self.bias: Tensor | None = getattr(dense, "bias", None)
        self.scale = solution.scale.float().to(device)
        self.zero = solution.zero.float().to(device)
        self.change = nn.Parameter(torch.zeros_like(self.scale), requires_grad=False)
        self.latent = nn.Parameter(solution.codes.to(device, torch.float32), requires_grad=False)
        self.free_codes = False
        self.weight: Tensor | None = None

    def free(self) -> None:
        """Let codes learn, from where they are."""
        self.free_codes = True

    def scales(self) -> Tensor:
        """The scales, `[out, groups]`, as the checkpoint will hold them."""
        return grid.stored(self.scale * (1 + self.change.detach()), self.scheme)

    def codes(self) -> Tensor:
        """The codes, float `[out, in]`."""
        return self.latent.detach().round().clamp_(0, self.scheme.levels - 1)

    def levels(self) -> Tensor:
        """What scales are multiplied by, `[out, groups, size]`."""
        return grid.grouped(self.codes(), self.scale.shape[1]) - self.zero.unsqueeze(-1)

    @torch.no_grad()
    def lay(self, dtype: torch.dtype) -> None:
        """Make the weight, in which gradients gather."""
        self.latent.clamp_(0, self.scheme.levels - 1)
        weight = (self.levels() * self.scales().unsqueeze(-1)).reshape(self.latent.shape)
        self.weight = weight.to(dtype).requires_grad_(True)

    @torch.no_grad()
    def gather(self) -> None:
        """Turn the gradient of the weight into those of what learns, as if nothing were rounded."""
        assert self.weight is not None
        gradient, self.weight = self.weight.grad, None
        if gradient is None:
            return
        slope = grid.grouped(gradient.float(), self.scale.shape[1])
        self.change.grad = (slope * self.levels()).sum(-1) * self.scale
        if self.free_codes:
            self.latent.grad = (slope * self.scales().unsqueeze(-1)).reshape(self.latent.shape)

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        bias = self.bias if self.bias is None else self.bias.to(self.weight.dtype)
        return functional.linear(x.to(self.weight.dtype), self.weight, bias)

    def settle(self) -> None:
        """Take what was learned for what is stored."""
        self.scale, self.latent.data = self.scales(), self.codes()
        self.change.data.zero_()

    def solution(self) -> Solution:
        """What a format packs."""
        scale = self.scale.to(grid.scale_dtype(self.scheme)).cpu()
        return Solution(self.latent.detach().to(torch.uint8).cpu(), scale, self.zero.to(torch.uint8).cpu(), {})


@contextmanager
def laid(learners: Collection[Learner], dtype: torch.dtype) -> Iterator[None]:
    """With the weights of some layers, in a dtype that products are computed in, too."""
    for learner in learners:
        learner.lay(dtype)
    device = next(iter(learners)).latent.device
    if dtype is torch.float32 or device.type == "meta":  # shapes alone know no other dtype than they have
        yield
        return
    with torch.autocast(device.type, dtype):
        yield
