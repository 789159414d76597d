"""Configs that say what no config should: each a change of a good one, with a name.

`of_quantization` must be refused or change nothing; `of_models` must be refused or describe a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

Change = Callable[[dict[str, Any]], Any]
FORMATS = ("compressed-tensors", "gptq", "awq")

# Path of keys in `quantization_config`, by format.
_GROUP = ("config_groups", "group_0")
KEYS: dict[str, list[tuple[str, ...]]] = {
    "gptq": [
        (key,)
        for key in ("quant_method", "bits", "group_size", "sym", "desc_act", "checkpoint_format", "dynamic", "lm_head")
    ],
    "awq": [
        (key,) for key in ("quant_method", "bits", "group_size", "zero_point", "version", "modules_to_not_convert")
    ],
    "compressed-tensors": [
        *((key,) for key in ("quant_method", "format", "config_groups", "ignore")),
        _GROUP,
        *((*_GROUP, key) for key in ("targets", "weights")),
        *((*_GROUP, "weights", key) for key in ("num_bits", "group_size", "symmetric", "strategy", "actorder", "type")),
    ],
}
MODEL = ["num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim"]
MODEL += ["intermediate_size", "model_type", "architectures", "dtype", "rope_parameters", "max_position_embeddings"]
MODEL += ["tie_word_embeddings", "hidden_act", "auto_map", "_attn_implementation", "_attn_implementation_internal"]
MODEL += ["text_config", "quantization_config", "transformers_version", "id2label", "torch_dtype", "layer_types"]

VALUES: dict[str, Any] = {
    "10**9": 10**9,
    "2**63": 2**63,
    "-1": -1,
    "0": 0,
    "1": 1,
    "a fraction": 4.5,
    "NaN": float("nan"),
    "infinity": float("inf"),
    "a text": "4",
    "a long text": "x" * 100_000,
    "a list": [4],
    "no list": [],
    "an object": {"a": {"b": [None]}},
    "nothing": None,
    "true": True,
    "4000 digits": int("9" * 4000),
    "deep": None,  # made below
}
for _ in range(300):
    VALUES["deep"] = [VALUES["deep"]]

BOMBS = {
    "nested repeats": r"(a+)+$",
    "alternatives": r"(a|aa)+$",
    "spaced out": r"(?x)(a+) +$",
    "many optional": "a?" * 40 + "a" * 40,
    "many repeats": ".*" * 12 + "x",
    "many groups": "(m|mo)" * 60,
    "a reference": r"(.*)\1(.*)\2(.*)\3x",
    "overflow": "a{99999999999}",
    "too deep": "(" * 3000 + ")" * 3000,
    "broken": "([",
    "enormous": "x" * 1_000_000,
    "looks around": r"(?=(a+))+b",
}


class Case(NamedTuple):
    """A change to the config.json of a checkpoint in `format`."""

    name: str
    format: str
    change: Change


def of_quantization() -> list[Case]:
    """Changes of `quantization_config`."""
    return [*_values(), *_bombs(), *_crowds(), *_others()]


def of_models() -> list[Case]:
    """Changes of everything else."""
    cases = [
        Case(f"{key} is {said}", FORMATS[place % 3], _put((key,), value))
        for place, key in enumerate(MODEL)
        for said, value in VALUES.items()
    ]
    return [case for case in cases if "quantization_config is" not in case.name or "nothing" not in case.name]


def _values() -> Iterator[Case]:
    for format, paths in KEYS.items():
        for path in paths:
            for said, value in VALUES.items():
                if path == ("checkpoint_format",) and value is None:
                    continue  # no format is version 1, which has the same tensors with another meaning
                yield Case(f"{format}: {path[-1]} is {said}", format, _put(("quantization_config", *path), value))


def _bombs() -> Iterator[Case]:
    for said, bomb in BOMBS.items():
        for format, path, value in (
            ("compressed-tensors", ("ignore",), [f"re:{bomb}"]),
            ("compressed-tensors", (*_GROUP, "targets"), [f"re:{bomb}"]),
            ("gptq", ("dynamic",), {f"-:{bomb}": {}}),
            ("awq", ("modules_to_not_convert",), [f"re:{bomb}"]),
        ):
            yield Case(f"{format}: {path[-1]} has {said}", format, _put(("quantization_config", *path), value))


def _crowds() -> Iterator[Case]:
    """A million modules."""
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(1_000_000)]
    rules: dict[str, Any] = {f"+:^{name}$": {} for name in names[:150_000]}
    groups = {str(i): {"targets": ["Linear"], "weights": {"num_bits": 4}} for i in range(150_000)}
    for format, path, value in (
        ("compressed-tensors", ("ignore",), names),
        ("compressed-tensors", (*_GROUP, "targets"), names),
        ("compressed-tensors", ("config_groups",), groups),
        ("gptq", ("dynamic",), rules),
        ("awq", ("modules_to_not_convert",), names),
        ("awq", ("unknown",), names),
    ):
        yield Case(f"{format}: {path[-1]} of a million", format, _put(("quantization_config", *path), value))


def _others() -> Iterator[Case]:
    for format in FORMATS:
        extra = {"unknown": 7, "__class__": "x", "": None, "trust_remote_code": True, "auto_map": {"AutoConfig": "x.Y"}}
        yield Case(f"{format}: unknown keys", format, lambda c, extra=extra: c["quantization_config"].update(extra))
        for value in ([], [4], 7, "gptq", True, {}):
            yield Case(f"{format}: is {value}", format, _put(("quantization_config",), value))


def _put(path: tuple[str, ...], value: Any) -> Change:
    def change(config: dict[str, Any]) -> None:
        place = config
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return change
