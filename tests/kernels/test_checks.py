"""A call that does not fit is refused by name before anything is launched, and the valid ones next to it pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_backends import random_weight
from torch import Tensor

import wq.layers.ops  # noqa: F401 - defines torch.ops.wq
from wq_kernels import checks, dispatch, layout, registry

N, K, GROUPS, EXPERTS, INPUTS = 33, 96, 3, 3, 4
Change = Callable[[Any], Any]
Arguments = dict[str, Any]


def weight(name: str, bits: int = 4) -> Arguments:
    """The arguments that are the weight, in a layout."""
    packed, scale, zero = random_weight(bits, False, N, K, GROUPS)
    if name == "tiled":
        packed, scale, zero = layout.from_stream(packed, scale, zero, bits, K)
    return {"packed": packed, "scale": scale, "zero": zero}


def linear(name: str, bits: int = 4) -> Arguments:
    """A valid call of `linear`."""
    return {
        "x": torch.randn(5, K),
        **weight(name, bits),
        "permutation": torch.randperm(K),
        "bias": torch.randn(N),
        "bits": bits,
        "out_features": N,
        "in_features": K,
        "layout": name,
    }


def dequantize(name: str, bits: int = 4) -> Arguments:
    """A valid call of `dequantize`."""
    sizes = {"bits": bits, "out_features": N, "in_features": K}
    return {**weight(name, bits), **sizes, "dtype": torch.float32, "layout": name}


def experts(bits: int = 4) -> Arguments:
    """A valid call of `expert_linear`."""
    weights = [weight("tiled", bits) for _ in range(EXPERTS)]
    return {
        "x": torch.randn(INPUTS, K),
        "expert_of_row": torch.randint(-1, EXPERTS, (2 * INPUTS,)),
        **{name: torch.stack([one[name] for one in weights]) for name in weights[0]},
        "bias": torch.randn(EXPERTS, N),
        "bits": bits,
        "out_features": N,
        "in_features": K,
    }


CALLS: dict[str, tuple[Callable[..., Any], Callable[..., Arguments]]] = {
    "linear stream": (dispatch.linear, lambda **other: linear("stream", **other)),
    "linear tiled": (dispatch.linear, lambda **other: linear("tiled", **other)),
    "op stream": (torch.ops.wq.linear, lambda **other: linear("stream", **other)),
    "op tiled": (torch.ops.wq.linear, lambda **other: linear("tiled", **other)),
    "dequantize stream": (dispatch.dequantize, lambda **other: dequantize("stream", **other)),
    "dequantize tiled": (dispatch.dequantize, lambda **other: dequantize("tiled", **other)),
    "experts": (dispatch.expert_linear, experts),
    "op experts": (torch.ops.wq.expert_linear, experts),
}
STREAM = [call for call in CALLS if call.endswith("stream")]
TILED = [call for call in CALLS if call.endswith("tiled")]
LINEAR = [call for call in CALLS if call.startswith(("linear", "op stream", "op tiled"))]
GROUPED = ["experts", "op experts"]


def to(value: Any) -> Change:
    """A change to a fixed value."""
    return lambda before: value


def cast(dtype: torch.dtype) -> Change:
    return lambda tensor: tensor.to(dtype)


def meta(tensor: Tensor) -> Tensor:
    return tensor.to("meta")


def longer(dimension: int) -> Change:
    """One more along a dimension."""
    return lambda tensor: torch.cat([tensor, tensor.narrow(dimension, 0, 1)], dimension)


def shorter(dimension: int) -> Change:
    """One less along a dimension."""
    return lambda tensor: tensor.narrow(dimension, 0, tensor.shape[dimension] - 1)


def at(index: int, value: int) -> Change:
    """One entry replaced."""
    return lambda tensor: tensor.index_fill(0, torch.tensor([index]), value)


Cases = list[tuple[list[str], str, dict[str, Change], str]]
# Calls, an argument, what becomes of it, and what the message must contain: nothing stands for the argument's name.
HOSTILE: Cases = [
    *(
        (STREAM + TILED + GROUPED, name, {
            "one less at the end": shorter(-1), "one more at the end": longer(-1), "flat": torch.flatten,
            "one dimension more": lambda tensor: tensor.unsqueeze(0), "turned": lambda tensor: tensor.transpose(-2, -1),
            "bool": cast(torch.bool), "int16": cast(torch.int16), "complex64": cast(torch.complex64),
        }, "scale|zero")  # one group less may be what zero does not fit
        for name in ("scale", "zero")
    ),
    (STREAM + TILED + GROUPED, "packed", {
        "one less at the end": shorter(-1), "one more at the end": longer(-1), "one row less": shorter(-2),
        "one row more": longer(-2), "flat": torch.flatten, "one dimension more": lambda tensor: tensor.unsqueeze(0),
        "turned": lambda tensor: tensor.transpose(-2, -1), "int64": cast(torch.int64), "uint8": cast(torch.uint8),
        "float32": cast(torch.float32), "bool": cast(torch.bool),
    }, ""),
    (["linear stream", "linear tiled", "dequantize stream", "dequantize tiled"], "packed", {"absent": to(None)}, ""),
    (["linear tiled", "op tiled", "dequantize tiled", *GROUPED], "zero", {"absent": to(None)}, ""),
    (STREAM, "zero", {"uint8": cast(torch.uint8), "float16": cast(torch.float16), "one word more": longer(0)}, ""),
    (TILED + GROUPED, "zero", {"int32": cast(torch.int32), "float16": cast(torch.float16)}, ""),
    (TILED, "zero", {"2 groups": lambda zero: zero[:2], "0 groups": lambda zero: zero[:0]}, ""),
    (STREAM, "scale", {"5 groups": lambda scale: scale[:, :1].expand(N, 5)}, "scale .*5 groups do not divide 96"),
    (STREAM, "scale", {"0 groups": lambda scale: scale[:, :0]}, "scale .*0 groups"),
    (TILED, "scale", {"3 groups of 4": shorter(0)}, "scale .*3 groups do not fit 96"),
    (TILED, "scale", {"8 groups": lambda scale: scale.repeat(2, 1)}, "scale .*8 groups do not fit 96"),
    (TILED, "scale", {"0 groups": lambda scale: scale[:0]}, "scale .*0 groups"),
    (GROUPED, "packed", {"no experts": lambda packed: packed[:0], "one expert's": lambda packed: packed[0]}, ""),
    (GROUPED, "packed", {"one expert less": shorter(0), "one expert more": longer(0)}, "scale"),
    (GROUPED, "scale", {"one expert less": shorter(0), "one expert more": longer(0), "one group less": shorter(1)}, ""),
    (GROUPED, "zero", {"one expert less": shorter(0), "one expert more": longer(0), "one group less": shorter(1)}, ""),
    *(
        (list(CALLS), name, {repr(value): to(value) for value in (0, -1, -(2**31), 4.0, "4", None)}, "")
        for name in ("bits", "out_features", "in_features")
    ),
    (list(CALLS), "bits", {str(bits): to(bits) for bits in (9, 16, 32, 2**31)}, ""),
    (TILED + GROUPED, "bits", {str(bits): to(bits) for bits in (1, 3, 5, 6, 7)}, ""),
    (STREAM, "bits", {str(bits): to(bits) for bits in (1, 2, 3, 5, 8)}, "packed"),
    (TILED + GROUPED, "bits", {str(bits): to(bits) for bits in (2, 8)}, "packed|scale"),
    # The dispatcher of torch makes True a 1, which fits no better.
    *((list(CALLS), name, {"True": to(True)}, f"{name}|packed|scale|bits") for name in ("bits", "out_features")),
    (list(CALLS), "in_features", {"True": to(True)}, "in_features|scale|packed"),
    (list(CALLS), "out_features", {str(n): to(n) for n in (1, N - 2, 2 * N, 2**31)}, "packed|scale"),
    (list(CALLS), "in_features", {str(k): to(k) for k in (1, K - 1, K + 1, 2 * K + 32, 2**40)}, "packed|scale"),
    (STREAM + TILED, "layout", {"unknown": to("tiles"), "nameless": to("")}, "packed|scale|layout"),
    (STREAM, "layout", {"the other": to("tiled")}, "packed|scale"),
    (TILED, "layout", {"the other": to("stream")}, "packed|scale"),
    (LINEAR, "x", {
        "one column less": shorter(1), "one column more": longer(1), "a number": lambda x: x[0, 0], "turned": torch.t,
        "int64": cast(torch.int64), "bool": cast(torch.bool), "complex64": cast(torch.complex64),
    }, ""),
    (LINEAR, "bias", {
        "one less": shorter(0), "one more": longer(0), "a number": lambda bias: bias[0],
        "a row": lambda bias: bias[None], "int32": cast(torch.int32), "bool": cast(torch.bool),
        "complex64": cast(torch.complex64),
    }, ""),
    (LINEAR, "permutation", {
        "one less": shorter(0), "one more": longer(0), "a row": lambda order: order[None], "int16": cast(torch.int16),
        "float32": cast(torch.float32), "bool": cast(torch.bool), "all the same": torch.zeros_like,
        "repeats": lambda order: order.index_fill(0, torch.tensor([1]), int(order[0])),
        "negative": at(3, -1), "just outside": at(3, K), "far outside": at(3, 2**40), "far below": at(95, -(2**63)),
        "int32 outside": lambda order: at(0, 2**31 - 1)(order.int()),
    }, ""),
    (GROUPED, "x", {
        "one column less": shorter(1), "one column more": longer(1), "a row": lambda x: x[0],
        "a batch": lambda x: x[None], "int64": cast(torch.int64), "complex64": cast(torch.complex64),
    }, ""),
    (GROUPED, "x", {"no inputs for 8 rows": lambda x: x[:0], "3 inputs for 8 rows": shorter(0)}, "expert_of_row"),
    (GROUPED, "expert_of_row", {
        "7 for 4 inputs": shorter(0), "3 for 4 inputs": lambda owners: owners[:3],
        "none for 4 inputs": lambda owners: owners[:0], "a matrix": lambda owners: owners.view(INPUTS, 2),
        "a number": lambda owners: owners[0], "int16": cast(torch.int16), "uint8": cast(torch.uint8),
        "float32": cast(torch.float32), "bool": cast(torch.bool),
    }, ""),
    (GROUPED, "bias", {
        "one expert's": lambda bias: bias[0], "one expert less": shorter(0), "one expert more": longer(0),
        "one less": shorter(1), "int32": cast(torch.int32),
    }, ""),
    *(
        (["linear stream", "linear tiled"], name, {"on another device": meta}, "")
        for name in ("x", "packed", "scale", "zero", "permutation", "bias")
    ),
    *(
        (["dequantize stream", "dequantize tiled"], name, {"on another device": meta}, "")
        for name in ("packed", "scale", "zero")
    ),
    *(
        (["experts"], name, {"on another device": meta}, "")
        for name in ("x", "expert_of_row", "packed", "scale", "zero", "bias")
    ),
]  # fmt: skip
# What torch itself does not refuse, or not in these words.
MORE: Cases = [
    *(
        (calls, name, {"on another device": meta}, "")
        for calls, last in ((["op stream", "op tiled"], "permutation"), (["op experts"], "expert_of_row"))
        for name in ("x", "packed", "scale", "zero", "bias", last)
    ),
    (["dequantize stream", "dequantize tiled"], "dtype", {
        "int32": to(torch.int32), "bool": to(torch.bool), "complex64": to(torch.complex64),
    }, ""),
    (["linear stream", "linear tiled", "experts"], "x", {"absent": to(None)}, ""),
    (["linear stream", "linear tiled", "dequantize stream", "dequantize tiled", "experts"], "scale", {
        "absent": to(None),
    }, ""),
    (["experts"], "packed", {"absent": to(None)}, ""),
]  # fmt: skip


def parameters(cases: Cases, *marks: pytest.MarkDecorator) -> list[Any]:
    """One for each call and change."""
    return [
        pytest.param(call, name, change, message or name, id=f"{call}: {name} {what}", marks=marks)
        for calls, name, changes, message in cases
        for call in calls
        for what, change in changes.items()
    ]


REFUSED = parameters(HOSTILE) + parameters(MORE)


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backends are chosen as ever, and reaching one fails the test."""

    class Trap:
        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *_: pytest.fail(f"{name} of a backend was called")

    real = registry.select

    def select(*arguments: Any) -> Trap:
        real(*arguments)
        return Trap()

    monkeypatch.setattr(dispatch, "select", select)


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(("call", "name", "change", "message"), REFUSED)
def test_a_call_that_does_not_fit_is_refused_by_name_and_nothing_runs(
    call: str, name: str, change: Change, message: str
) -> None:
    function, make = CALLS[call]
    arguments = make()
    arguments[name] = change(arguments[name])
    with pytest.raises((ValueError, TypeError, LookupError, RuntimeError), match=rf"\b({message})\b"):
        function(*arguments.values())


def test_there_are_many_such_calls() -> None:
    assert len({case.id for case in REFUSED}) == len(REFUSED) > 500


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("call", CALLS)
def test_the_trap_is_reached_by_a_valid_call(call: str) -> None:
    function, make = CALLS[call]
    with pytest.raises(pytest.fail.Exception, match="of a backend was called"):
        function(*make().values())


VALID: Cases = [
    (list(CALLS), "bits", {"as they are": lambda bits: bits}, ""),
    (LINEAR, "x", {
        "a row": lambda x: x[0], "a batch": lambda x: x[None, None], "none": lambda x: x[:0],
        "many": lambda x: x.repeat(99, 1), "strided": lambda x: x.t().contiguous().t(),
        "float16": cast(torch.float16), "bfloat16": cast(torch.bfloat16), "float64": cast(torch.float64),
    }, ""),
    (LINEAR, "permutation", {
        "absent": to(None), "int32": cast(torch.int32), "the identity": lambda order: order.sort().values,
        "backwards": lambda order: order.sort(descending=True).values,
    }, ""),
    (LINEAR + GROUPED, "bias", {"absent": to(None)}, ""),
    (STREAM + TILED + GROUPED, "scale", {
        "float16": cast(torch.float16), "bfloat16": cast(torch.bfloat16), "float64": cast(torch.float64),
    }, ""),
    (STREAM, "zero", {"absent": to(None)}, ""),
    (TILED, "zero", {"one row for all groups": lambda zero: zero[:1]}, ""),
    (GROUPED, "zero", {"one row for all groups": lambda zero: zero[:, :1].contiguous()}, ""),
    (STREAM, "packed", {"strided": lambda packed: packed.t().contiguous().t()}, ""),
    (["dequantize stream", "dequantize tiled"], "dtype", {
        "float16": to(torch.float16), "bfloat16": to(torch.bfloat16), "float64": to(torch.float64),
    }, ""),
    (GROUPED, "expert_of_row", {
        "int32": cast(torch.int32), "one for each input": lambda owners: owners[:INPUTS],
        "three for each input": lambda owners: torch.cat([owners, owners[:INPUTS]]),
        "of nobody": lambda owners: owners - 99, "beyond the experts": lambda owners: owners + 99,
    }, ""),
    (GROUPED, "x", {"one": lambda x: x[:1]}, ""),
]  # fmt: skip


@pytest.mark.parametrize(("call", "name", "change", "message"), parameters(VALID))
def test_the_valid_calls_next_to_them_pass(call: str, name: str, change: Change, message: str) -> None:
    function, make = CALLS[call]
    arguments = make()
    arguments[name] = change(arguments[name])
    x = arguments.get("x")
    if x is not None and arguments.get("bias") is not None:
        arguments["bias"] = arguments["bias"].to(x.dtype)
    y = function(*arguments.values())
    if "dequantize" in call:
        assert y.shape == (N, K)
        assert y.dtype == arguments["dtype"]
    else:
        rows = arguments["expert_of_row"].shape if "experts" in call else x.shape[:-1]
        assert y.shape == (*rows, N)
        assert y.dtype == x.dtype
    assert y.isfinite().all()


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("bits", [2, 8])
def test_other_widths_pass(call: str, bits: int) -> None:
    function, make = CALLS[call]
    assert function(*make(bits=bits).values()).isfinite().all()


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_passes_in_the_layout_of_checkpoints(bits: int) -> None:
    assert dispatch.linear(*linear("stream", bits).values()).isfinite().all()


def test_no_inputs_and_no_rows_pass() -> None:
    arguments = experts()
    arguments["x"], arguments["expert_of_row"] = arguments["x"][:0], arguments["expert_of_row"][:0]
    assert dispatch.expert_linear(*arguments.values()).shape == (0, N)


@pytest.mark.parametrize("size", [1, 2, 100])
def test_a_permutation_is_told_from_what_is_none(size: int) -> None:
    order = torch.randperm(size)
    checks.permutation(order, size)
    checks.permutation(order.int(), size)
    with pytest.raises(ValueError, match=f"permutation holds {size}; columns are numbered 0 to {size - 1}"):
        checks.permutation(order.masked_fill(order == size - 1, size), size)
    with pytest.raises(ValueError, match="permutation holds -1"):
        checks.permutation(order.masked_fill(order == 0, -1), size)
    if size > 1:
        with pytest.raises(ValueError, match=f"leaves out column {size - 1} and repeats another"):
            checks.permutation(order.masked_fill(order == size - 1, 0), size)


def test_a_permutation_elsewhere_is_taken_on_trust_because_looking_at_it_would_wait() -> None:
    arguments = {name: meta(value) if isinstance(value, Tensor) else value for name, value in linear("stream").items()}
    assert dispatch.linear(*arguments.values()).device.type == "meta"
    checks.linear(
        *(arguments[name] for name in ("x", "packed", "scale", "zero", "permutation", "bias")), 4, N, K, tiled=False
    )
