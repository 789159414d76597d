"""The doors through which files of any origin come in: `wq verify`, loading, and the source of `wq quantize`.

Each function opens one and says what came of it: `refused` (a WqError, as it should be), `equal` or `different` (it
opened; what was read, compared with the undamaged folder), `found` or `good` (a report of verify's), or `escaped`:
another exception than a WqError, which is a fault of wq's. on_open is called in between: what comparing takes (a state
dict, which undoes the layout that a processor wants) is not what opening takes.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from wq import WqConfig
from wq.checkpoint import check_finite
from wq.errors import WqError
from wq.hf import load
from wq.pipeline.source import open_source
from wq.verify import verify

State = Mapping[str, Tensor]
OnOpen = Callable[[], None]


def _ignored() -> None:
    """Of the moment between opening and comparing."""


class Outcome(NamedTuple):
    """kind: see above. said: the error's sentence, or where the exception came from."""

    kind: str
    said: str = ""


def attempt(opened: Callable[[], Outcome]) -> Outcome:
    try:
        return opened()
    except WqError as error:
        return Outcome("refused", str(error))
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{place.filename.rpartition('/')[2]}:{place.lineno}"
        return Outcome("escaped", f"{type(error).__name__} at {where}: {str(error)[:200]}")


def through_verify(folder: Path, *, on_open: OnOpen = _ignored) -> Outcome:
    def opened() -> Outcome:
        report = verify(folder)
        on_open()
        json.dumps(report).encode()
        return Outcome("good" if report["good"] else "found", "; ".join(_told(one) for one in report["problems"][:2]))

    return attempt(opened)


def _told(problem: dict[str, str]) -> str:
    return f"{problem['where']}: {problem['problem']} ({problem['measured']})"[:300]


def through_load(folder: Path, reference: State | None = None, *, on_open: OnOpen = _ignored) -> Outcome:
    """`wq.load`, which the commands use."""
    return attempt(lambda: _compared(load(folder)[0], reference, on_open))


def through_from_pretrained(folder: Path, reference: State | None = None, *, on_open: OnOpen = _ignored) -> Outcome:
    """transformers' own function with the one flag."""
    flag = {"quantization_config": WqConfig(), "dtype": "auto"}
    return attempt(lambda: _compared(AutoModelForCausalLM.from_pretrained(folder, **flag), reference, on_open))


def through_source(folder: Path, reference: State | None = None, *, on_open: OnOpen = _ignored) -> Outcome:
    """A dense model as `wq quantize` reads it, all of it."""

    def opened() -> Outcome:
        with open_source(folder) as source:
            check_finite(source.entries)
            source.load(("",), torch.device("cpu"), source.dtype)
            return _compared(source.model, reference, on_open)

    return attempt(opened)


def _compared(model: nn.Module, reference: State | None, on_open: OnOpen) -> Outcome:
    """Bit for bit; a NaN equals itself."""
    on_open()
    state = model.state_dict()
    alike = reference is not None and state.keys() == reference.keys()
    if alike and reference is not None:
        alike = all(_bits(tensor) == _bits(reference[name]) for name, tensor in state.items())
    return Outcome("equal" if alike else "different")


def _bits(tensor: Tensor) -> tuple[Any, ...]:
    data: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return tensor.dtype, tuple(tensor.shape), data.tobytes()


DOORS: dict[str, Callable[..., Outcome]] = {
    "verify": through_verify,
    "load": through_load,
    "from_pretrained": through_from_pretrained,
    "source": through_source,
}
