"""The last step of quantization: the whole model at once, taught by the dense one.

Solvers see one layer at a time, and the errors they leave add up in ways that no layer can see. Here the packed model
learns to predict what the dense model predicts, KL(dense ‖ quantized) over the whole vocabulary, on calibration text.
What learns stays within the checkpoint's format: group scales and the model's own vectors (norms, biases), and, where
that pays, the codes themselves, by a straight-through estimate (as EfficientQAT, arXiv 2407.11062, does in blocks).
Windows held out decide whether the result is kept; if it is no better there, the checkpoint stays as it was.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from wq import formats, quantized
from wq.checkpoint import Entry, overwrite, read_headers, read_tensor
from wq.errors import CalibrationError, ModelError
from wq.formats.stored import Stored
from wq.journal import Journal
from wq.learner import Learner, laid, learning_dtype, schedule
from wq.pipeline.statistics import HELD_OUT
from wq.solvers import Solution
from wq.structure.linears import is_linear

_NOTE, _COURSE = "taught", "teaching"
_NOTE_EVERY = 300.0  # seconds
_LOGITS = 6  # copies of a window's, of both models, with what gradients need
_ACTIVATION = 3  # bytes kept for gradients, for each number that goes into or comes out of a layer

StepCallback = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Rates:
    """Learning rates of Adam, each in units of what it moves.

    scales: relative to a scale. vectors: relative to the mean magnitude of a vector. codes: in steps of the grid; 0
    leaves codes as they are. epochs: passes over the windows. batch: windows a step.
    """

    scales: float = 2e-4
    vectors: float = 1e-3
    codes: float = 0.0
    epochs: int = 1
    batch: int = 2


@torch.enable_grad()
def distill(
    folder: str | os.PathLike[str],
    base: str | os.PathLike[str],
    tokens: Tensor,
    *,
    rates: Rates | None = None,
    device: str | torch.device = "cpu",
    journal: Journal | None = None,
    on_step: StepCallback | None = None,
) -> dict[str, Any]:
    """Teach the checkpoint in `folder` what `base` predicts on `tokens`, int64 `[windows, seqlen]`, and rewrite it.

    Both models are in memory at once. journal: where the result is noted before the checkpoint is touched, so that a
    run that is killed in between can be repeated. Returns what was done: the KL on held-out windows before and after,
    and whether the checkpoint was changed.

    Raises CalibrationError for too few windows, ModelError when nothing can learn.
    """
    rates, path = rates or Rates(), Path(folder)
    if quantized.read_config(path).get("is_encoder_decoder"):
        raise ModelError(f"{path}: an encoder-decoder model predicts from two texts; it is not distilled.")
    if len(tokens) < HELD_OUT:
        raise CalibrationError(f"{len(tokens)} calibration windows; distillation needs at least {HELD_OUT}.")
    known = None if journal is None else journal.read(_NOTE)
    if known is not None:
        put(read_headers(path), known.tensors)
        return dict(known.value)
    started = time.perf_counter()
    teacher = _load(base, torch.device(device), False)
    pupil = Pupil(path, teacher, torch.device(device), bool(rates.codes))
    heldout = torch.arange(len(tokens)) % HELD_OUT == HELD_OUT - 1
    learn, decide = tokens[~heldout], tokens[heldout]
    before = pupil.kl(teacher, decide)
    steps = _learn(teacher, pupil, learn, rates, journal, on_step)
    pupil.settle()
    after = pupil.kl(teacher, decide)
    made = {
        "windows": len(learn),
        "heldout_windows": len(decide),
        "epochs": rates.epochs,
        "steps": steps,
        "layers": len(pupil.layers),
        "vectors": len(pupil.vectors),
        "codes": bool(rates.codes),
        "heldout_kl": {"before": before, "after": after},
        "kept": after < before,
        "seconds": round(time.perf_counter() - started, 1),
    }
    taught = pupil.tensors() if after < before else {}
    if journal is not None:
        journal.write(_NOTE, made, taught)
        journal.drop(_COURSE)
    put(pupil.entries, taught)
    return made


def _learn(
    teacher: nn.Module,
    pupil: Pupil,
    windows: Tensor,
    rates: Rates,
    journal: Journal | None,
    on_step: StepCallback | None,
) -> int:
    """All steps of the optimizer, from where a run before may have come to; their number."""
    steps = list(_batches(len(windows), rates))
    course = _Course(pupil.optimizer(rates), journal)
    for step, rows in list(enumerate(steps))[course.resume() :]:
        course.set_rates(schedule(step, len(steps)))
        with laid(pupil.layers.values(), learning_dtype(next(teacher.parameters()))):
            loss = _accumulate(teacher, pupil.model, windows[rows])
        pupil.gather()
        course.step()
        if on_step is not None:
            on_step(step + 1, len(steps), loss)
        course.note(step + 1)
    return len(steps)


class _Course:
    """The optimizer, and notes of where it is every few minutes, if there is a journal and a disk to hold them."""

    def __init__(self, optimizer: torch.optim.Optimizer, journal: Journal | None):
        self.optimizer, self.journal = optimizer, journal
        self.peaks = [group["lr"] for group in optimizer.param_groups]
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.noted = time.monotonic()

    def set_rates(self, share: float) -> None:
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * share

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def note(self, done: int) -> None:
        """Note where learning is, if that is due."""
        if self.journal is None or time.monotonic() - self.noted < _NOTE_EVERY:
            return
        tensors = {f"{number}.value": parameter.detach().cpu() for number, parameter in enumerate(self.parameters)}
        for number, parameter in enumerate(self.parameters):
            tensors |= {f"{number}.{name}": value.cpu() for name, value in self.optimizer.state[parameter].items()}
        if self.journal.has_room(sum(tensor.nbytes for tensor in tensors.values())):
            self.journal.write(_COURSE, {"done": done}, tensors)
        self.noted = time.monotonic()

    def resume(self) -> int:
        """Take up what was noted; how many steps are done."""
        note = None if self.journal is None else self.journal.read(_COURSE)
        if note is None:
            return 0
        for name, tensor in note.tensors.items():
            number, _, what = name.partition(".")
            parameter = self.parameters[int(number)]
            if what == "value":
                parameter.data.copy_(tensor)
            else:
                place = "cpu" if what == "step" else parameter.device  # where Adam keeps it
                self.optimizer.state[parameter][what] = tensor.to(place)
        return int(note.value["done"])


def put(entries: Mapping[str, Entry], tensors: Mapping[str, Tensor]) -> None:
    """Put tensors in the place of those of the same name."""
    for name, tensor in tensors.items():
        overwrite(entries[name], tensor)


def required_bytes(
    layers: Iterable[tuple[int, int]], parameters: int, vocabulary: int, seqlen: int, rates: Rates
) -> dict[str, int]:
    """About what distilling takes, by what takes it.

    layers: `(out, in)` of the packed ones. parameters: of the model, all counted.
    """
    layers = list(layers)
    learning = sum(out * columns for out, columns in layers)
    through = sum(out + columns for out, columns in layers)
    return {
        "two models": 2 * 4 * parameters,
        "weights of a step, gradients, moments": 4 * learning * (5 if rates.codes else 2),
        "logits": 4 * _LOGITS * vocabulary * seqlen,
        "activations": _ACTIVATION * through * seqlen,
    }


def required_by(folder: Path, seqlen: int, rates: Rates) -> dict[str, int]:
    """Likewise, of a packed folder."""
    packed, others = quantized.split(read_headers(folder))
    config = quantized.read_config(folder)
    layers = [quantized.describe(name, leaves, config["quantization_config"]).shape for name, leaves in packed.items()]
    rest = sum(math.prod(entry.shape) for entry in others.values())
    vocabulary = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size", 0)
    return required_bytes(layers, rest + sum(map(math.prod, layers)), vocabulary, seqlen, rates)


def work(parameters: int, windows: int, seqlen: int, rates: Rates) -> float:
    """Floating-point operations: a pass of the dense model, and one and its gradient, twice as much, of the packed."""
    return 4 * 2.0 * parameters * windows * seqlen * rates.epochs


def _batches(windows: int, rates: Rates) -> Iterator[Tensor]:
    """Window numbers of each step, in an order of their own for each epoch."""
    for epoch in range(rates.epochs):
        order = torch.randperm(windows, generator=torch.Generator().manual_seed(epoch))
        yield from order.split(rates.batch)


def _accumulate(teacher: nn.Module, student: nn.Module, windows: Tensor) -> float:
    """Gradients of the mean KL of some windows, taken one window at a time; the mean."""
    total = 0.0
    for window in windows:
        loss = _kl(teacher, student, window) / len(windows)
        loss.backward()
        total += float(loss.detach())
    return total


def _kl(teacher: nn.Module, student: nn.Module, window: Tensor) -> Tensor:
    """Mean KL(teacher ‖ student) over the tokens of a window `[seqlen]`."""
    ids = window.unsqueeze(0).to(next(student.parameters()).device)
    with torch.no_grad():
        wanted = functional.log_softmax(teacher(input_ids=ids, use_cache=False).logits[0].float(), dim=-1)
    found = functional.log_softmax(student(input_ids=ids, use_cache=False).logits[0].float(), dim=-1)
    return functional.kl_div(found, wanted, reduction="sum", log_target=True) / len(window)


@torch.no_grad()
def mean_kl(teacher: nn.Module, student: nn.Module, windows: Tensor) -> float:
    """Mean KL(teacher ‖ student) over all tokens of `windows`."""
    return sum(float(_kl(teacher, student, window)) for window in windows) / len(windows)


class Pupil:
    """A quantized checkpoint as a model that can learn, and be written back."""

    def __init__(self, folder: Path, teacher: nn.Module, device: torch.device, codes: bool):
        self.model = _load(folder, device, True)
        self.model.requires_grad_(False)
        self.entries = read_headers(folder)
        config = quantized.read_config(folder)["quantization_config"]
        packed, dense = quantized.split(self.entries)
        self.layers: dict[str, Learner] = {}
        self.stored: dict[str, Stored] = {}
        for name, leaves in packed.items():
            module = _submodule(self.model, name)
            if module is None or not is_linear(module):  # of experts; they keep their weights
                continue
            stored = quantized.describe(name, leaves, config)
            self.layers[name] = learner = Learner(module, _solution(leaves, stored), stored.scheme)
            if codes:
                learner.free()
            self.stored[name] = stored
            self.model.set_submodule(name, learner)
        self.vectors = {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if parameter.dim() == 1 and name in dense
        }
        for vector in self.vectors.values():  # float32, or small steps are lost
            vector.data = vector.data.float()
            vector.requires_grad_(True)
        if not self.layers:
            raise ModelError(f"{folder}: no packed layer is found in the model under its own name; nothing can learn.")

    def optimizer(self, rates: Rates) -> torch.optim.Optimizer:
        """Adam over all that learns; a vector's rate is relative to its magnitude."""
        layers = self.layers.values()
        groups: list[dict[str, Any]] = [{"params": [layer.change for layer in layers], "lr": rates.scales}]
        latent = [layer.latent for layer in layers if layer.free_codes]
        if latent:
            groups.append({"params": latent, "lr": rates.codes})
        for vector in self.vectors.values():
            groups.append({"params": [vector], "lr": rates.vectors * float(vector.detach().abs().mean())})
        return torch.optim.Adam(groups, lr=rates.scales, betas=(0.9, 0.95))

    def gather(self) -> None:
        """Have the gradients of all that learns."""
        for learner in self.layers.values():
            learner.gather()

    def kl(self, teacher: nn.Module, windows: Tensor) -> float:
        """Mean KL(teacher ‖ pupil), with weights as they are loaded."""
        with laid(self.layers.values(), next(teacher.parameters()).dtype):
            return mean_kl(teacher, self.model, windows)

    @torch.no_grad()
    def settle(self) -> None:
        """Round everything to what the checkpoint can hold, so that what is judged is what will be loaded."""
        for learner in self.layers.values():
            learner.settle()
        for name, vector in self.vectors.items():
            vector.copy_(vector.to(self.entries[name].dtype))

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        """What was learned, as the checkpoint stores it."""
        found = {name: vector.detach().to(self.entries[name].dtype).cpu() for name, vector in self.vectors.items()}
        for name, learner in self.layers.items():
            stored = self.stored[name]
            packed = formats.get(stored.format).pack(learner.solution(), stored.scheme)
            found |= {f"{name}.{leaf}": tensor for leaf, tensor in packed.items()}
        return found


def _solution(leaves: dict[str, Entry], stored: Stored) -> Solution:
    tensors = {leaf: read_tensor(entry) for leaf, entry in leaves.items()}
    found: Solution = formats.get(stored.format).unpack(tensors, stored.scheme, stored.shape)
    return found


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _load(source: str | os.PathLike[str], device: torch.device, dequantize: bool) -> nn.Module:
    from wq.hf import load

    dtype = "float32" if device.type == "cpu" else "auto"
    model, _ = load(source, dtype=dtype, device=device, dequantize=dequantize)
    return model.eval()
