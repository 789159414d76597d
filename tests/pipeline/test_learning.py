"""Blocks that learn their rounding: against a gradient taken in float64, and on models from end to end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wq import grid
from wq.checkpoint import read_headers, read_tensor
from wq.learner import Learner
from wq.pipeline import learning, quantizer
from wq.pipeline.learning import BlockRates, Lesson, learn
from wq.pipeline.quantizer import quantize
from wq.pipeline.ranks import Ranks
from wq.scheme import Scheme
from wq.solvers import rtn
from wq.verify import verify

TinyModel = Callable[..., Path]

EAGER = BlockRates(codes=0.02, scales=2e-3, passes=6)


def layer(out: int, columns: int, bits: int, symmetric: bool, seed: int) -> tuple[nn.Linear, Learner]:
    torch.manual_seed(seed)
    linear = nn.Linear(columns, out)
    scheme = Scheme(bits, 32, symmetric)
    with torch.no_grad():
        return linear, Learner(linear, rtn.solve(linear.weight, None, scheme), scheme)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gradients_pass_through_the_rounding(bits: int, symmetric: bool) -> None:
    _, learner = layer(24, 96, bits, symmetric, bits)
    learner.free()
    x, wanted = torch.randn(7, 96), torch.randn(7, 24)
    learner.lay(torch.float32)
    (learner(x) - wanted).square().sum().backward()
    learner.gather()

    codes = learner.codes().double().requires_grad_()
    change = torch.zeros_like(learner.scale, dtype=torch.float64, requires_grad=True)
    levels = grid.grouped(codes, 3) - learner.zero.double().unsqueeze(-1)
    weight = (levels * (learner.scale.double() * (1 + change)).unsqueeze(-1)).reshape(24, 96)
    assert learner.bias is not None
    (x.double() @ weight.t() + learner.bias.double() - wanted).square().sum().backward()
    for ours, exact in ((learner.latent.grad, codes.grad), (learner.change.grad, change.grad)):
        assert ours is not None
        assert exact is not None
        assert float((ours - exact).norm() / exact.norm()) < 1e-5


def test_what_never_ran_has_no_gradient_and_stays() -> None:
    _, learner = layer(8, 32, 4, True, 0)
    learner.free()
    learner.lay(torch.float32)
    learner.gather()
    assert learner.latent.grad is None
    assert learner.change.grad is None


class Two(nn.Module):
    """A block with something beside its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = x + self.down(torch.relu(self.up(self.norm(x))))
        return made


def lesson(block: nn.Module, windows: list[Tensor], first: int = 0) -> tuple[dict[str, Learner], Lesson]:
    """What a dense block makes of some windows, and learners rounded to nearest in its place."""
    with torch.no_grad():
        wanted = [block(batch) for batch in windows]
    scheme = Scheme(2, 32, False)
    learners = {}
    for name in ("up", "down"):
        linear = block.get_submodule(name)
        solution = rtn.solve(linear.weight.detach(), None, scheme)  # type: ignore[union-attr, operator]
        learners[name] = Learner(linear, solution, scheme)
    return learners, Lesson(lambda batch: block(windows[batch]), wanted, first)


def test_a_block_learns_and_is_left_as_it_was() -> None:
    torch.manual_seed(1)
    block = Two()
    before = {name: value.clone() for name, value in block.state_dict().items()}
    windows = [torch.randn(count, 16, 64) for count in (1, 8, 8, 7)]
    learners, what = lesson(block, windows)
    start = {name: learner.codes().clone() for name, learner in learners.items()}
    worse, better = learn(block, learners, what, BlockRates(codes=0.02, scales=5e-3, passes=30))
    assert better < 0.95 * worse
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in block.parameters())
    assert isinstance(block.up, nn.Linear)
    assert any(not torch.equal(learner.codes(), start[name]) for name, learner in learners.items())


def test_windows_that_decide_are_not_learned_from() -> None:
    torch.manual_seed(2)
    found = []
    for spoiled in (0.0, 1e3):
        torch.manual_seed(3)
        block = Two()
        windows = [torch.randn(8, 4, 64, generator=torch.Generator().manual_seed(4))]
        learners, what = lesson(block, windows, first=16)
        what.wanted[0][7] += spoiled  # the one with number 23
        with learning._in_place(block, learners):
            learning._optimize(list(learners.values()), what, BlockRates(0.02, 2e-3, passes=4), torch.float32)
        found.append(torch.cat([learner.latent.detach().flatten() for learner in learners.values()]))
        assert what.decides(0).tolist() == [0, 0, 0, 0, 0, 0, 0, 1]
    assert torch.equal(*found)


def test_what_is_no_better_is_not_kept() -> None:
    torch.manual_seed(5)
    block = Two()
    learners, what = lesson(block, [torch.randn(8, 16, 64)])
    start = {name: learner.solution() for name, learner in learners.items()}
    worse, better = learn(block, learners, what, BlockRates(codes=5.0, scales=3.0, passes=3))
    assert better >= worse
    for name, learner in learners.items():
        assert all(torch.equal(a, b) for a, b in zip(learner.solution()[:3], start[name][:3], strict=True))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "gemma3", "t5"])
def test_models_learn_block_by_block(architecture: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    options: dict[str, Any] = {"bits": 2, "group_size": 32, "samples": 24, "seqlen": 32, "calibration": "builtin"}
    plain = quantize(tiny_model(architecture), tmp_path / "plain", **options)
    made = quantize(tiny_model(architecture), tmp_path / "out", rates=EAGER, **options)
    told = [layer["learned"] for layer in made["layers"] if "learned" in layer]
    assert told
    assert all(one["kept"] == (one["after"] < one["before"]) for one in told)
    assert not any("learned" in layer for layer in plain["layers"])
    assert verify(tmp_path / "out")["good"]
    ours, theirs = ({k: read_tensor(e) for k, e in read_headers(tmp_path / n).items()} for n in ("out", "plain"))
    assert ours.keys() == theirs.keys()
    differing = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert bool(differing) == any(one["kept"] for one in told)
    assert all("packed" in name or "scale" in name for name in differing)


def test_what_cannot_learn_says_so(tiny_model: TinyModel, tmp_path: Path) -> None:
    options: dict[str, Any] = {"group_size": 32, "samples": 8, "seqlen": 32, "calibration": "builtin", "rates": EAGER}
    made = quantize(tiny_model(), tmp_path / "out", method="awq", **options)
    assert made["learning"] == {"reason": "no dense model runs beside the quantized one"}
    assert quantizer._learning([], Ranks(0, 2)) == {"reason": "several processes share the run"}
