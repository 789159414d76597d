"""Random weights, layer inputs and solutions for the tests of grids, solvers and formats; all from one generator."""

from __future__ import annotations

import torch
from torch import Tensor

from wq.scheme import Scheme
from wq.solvers import Solution, Statistics


def weights(generator: torch.Generator, out_features: int, in_features: int) -> Tensor:
    """Gaussian rows of different sizes with a few outliers, `[out, in]`."""
    w = torch.randn(out_features, in_features, generator=generator)
    heavy = torch.rand(out_features, in_features, generator=generator) < 0.01
    size = 0.02 * (1 + torch.rand(out_features, 1, generator=generator))
    return size * torch.where(heavy, 4 * w, w)


def inputs(generator: torch.Generator, tokens: int, in_features: int) -> Tensor:
    """Correlated inputs with channels of very different sizes, `[tokens, in]`."""
    sources = torch.randn(tokens, max(1, in_features // 4), generator=generator)
    mixed = sources @ torch.randn(sources.shape[1], in_features, generator=generator) / sources.shape[1] ** 0.5
    noise = torch.randn(tokens, in_features, generator=generator)
    return (mixed + 0.3 * noise) * torch.exp(torch.randn(in_features, generator=generator))


def statistics(x: Tensor) -> Statistics:
    """What calibration would know of inputs `x`, `[tokens, in]`."""
    moment = (x.double().t() @ x.double() / x.shape[0]).float()
    return Statistics((moment + moment.t()) / 2, x.shape[0])


def solution(generator: torch.Generator, scheme: Scheme, out_features: int, in_features: int) -> Solution:
    """Any codes, scales of both signs and zero points that the scheme allows."""
    shape = out_features, scheme.groups(in_features)
    codes = torch.randint(scheme.levels, (out_features, in_features), generator=generator, dtype=torch.uint8)
    scale = (torch.randn(shape, generator=generator) + 3).to(getattr(torch, scheme.scale_dtype))
    scale = torch.where(torch.rand(shape, generator=generator) < 0.5, scale, -scale)
    zero = torch.randint(scheme.levels, shape, generator=generator, dtype=torch.uint8)
    return Solution(codes, scale, torch.full_like(zero, scheme.midpoint) if scheme.symmetric else zero, {})


def dense(s: Solution) -> Tensor:
    """`scale * (codes - zero)` in float64, written without the library's own helpers."""
    size = s.codes.shape[1] // s.scale.shape[1]
    scale, zero = (t.double().repeat_interleave(size, dim=1) for t in (s.scale, s.zero))
    return scale * (s.codes.double() - zero)


def output_error(weight: Tensor, rounded: Tensor, moment: Tensor) -> float:
    """`tr(E H Eᵀ) / tr(W H Wᵀ)` in float64."""
    w, h = weight.double(), moment.double()
    e = rounded.double() - w
    return float(((e @ h) * e).sum() / ((w @ h) * w).sum())
