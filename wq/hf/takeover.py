"""Who loads an already quantized repo: wq, or transformers' own backend.

transformers has registries for quantizers, but what a repo's config and a user's become goes through
`AutoHfQuantizer.merge_quantization_configs`, which only takes the class that the repo was written with. Importing this
file wraps that one function, reversibly. An explicit `WqConfig` always means wq. Otherwise WQ_TAKEOVER decides:

    missing (the default)   wq serves what the stock backend's packages are not installed for, where transformers
                            would raise an ImportError, and what it cannot load: asymmetric compressed-tensors
                            (transformers 5.24 with compressed-tensors 0.20), AutoRound's repos from before 0.5
    always                  wq serves every repo that it can read
    never                   only an explicit `WqConfig` means wq
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AutoHfQuantizer

from wq.errors import SchemeError
from wq.hf.config import WqConfig, readable

ENVIRONMENT = "WQ_TAKEOVER"
POLICIES = ("missing", "always", "never")

_OLD_AUTO_ROUND = "intel/auto-round"  # what AutoRound called itself up to 0.4

# What the stock loader of a method imports.
_NEEDS = {
    "gptq": ("optimum", "gptqmodel"),
    "awq": ("gptqmodel",),
    "compressed-tensors": ("compressed_tensors",),
    "auto-round": ("auto_round",),
    _OLD_AUTO_ROUND: ("auto_round",),
}
_found = AutoHfQuantizer.merge_quantization_configs.__func__  # type: ignore[attr-defined]
_original = getattr(_found, "__wrapped__", _found)  # not the stand-in of `wq.autoload`


@contextmanager
def takeover(policy: str = "always") -> Iterator[None]:
    """Within it, WQ_TAKEOVER is `policy`.

    Raises SchemeError for another policy.
    """
    _check(policy)
    before = os.environ.get(ENVIRONMENT)
    os.environ[ENVIRONMENT] = policy
    try:
        yield
    finally:
        if before is None:
            del os.environ[ENVIRONMENT]
        else:
            os.environ[ENVIRONMENT] = before


def serves(config: Mapping[str, Any], chosen: Any) -> bool:
    """Whether wq loads a repo with this `quantization_config`, for a user who passed the config `chosen`."""
    if isinstance(chosen, WqConfig):
        return True
    policy = os.environ.get(ENVIRONMENT, POLICIES[0])
    _check(policy)
    method = config.get("quant_method")
    if policy == "never" or not isinstance(method, str) or method not in _NEEDS:
        return False
    absent = any(importlib.util.find_spec(package) is None for package in _NEEDS[method])
    return policy == "always" or absent or method == _OLD_AUTO_ROUND or _has_zero_points(config)


def _has_zero_points(config: Mapping[str, Any]) -> bool:
    """Whether a compressed-tensors config has asymmetric weights in integers, which transformers fails to unpack."""
    groups = config.get("config_groups")
    known = groups.values() if isinstance(groups, dict) else ()
    weights = [group.get("weights") for group in known if isinstance(group, dict)]
    return any(isinstance(values, dict) and values.get("symmetric") is False for values in weights)


def install() -> None:
    """Wrap `merge_quantization_configs`; does nothing when it is wrapped."""

    def merge(cls: type, quantization_config: Any, quantization_config_from_args: Any) -> Any:
        values = quantization_config if isinstance(quantization_config, dict) else quantization_config.to_dict()
        flag = quantization_config_from_args
        if serves(values, flag) and (isinstance(flag, WqConfig) or readable(values)):
            if not isinstance(flag, WqConfig):  # a stock config's flags for loading that mean something here
                flag = WqConfig(dequantize=bool(getattr(flag, "dequantize", False)))
            return flag.bind(values)
        return _original(cls, quantization_config, quantization_config_from_args)

    AutoHfQuantizer.merge_quantization_configs = classmethod(merge)  # type: ignore[method-assign, assignment]
    # transformers does not know this name, and would load such a repo as a dense one.
    AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(_OLD_AUTO_ROUND, WqConfig)


def uninstall() -> None:
    """transformers' own function again; `WqConfig` then works for dense repos only."""
    if AUTO_QUANTIZATION_CONFIG_MAPPING.get(_OLD_AUTO_ROUND) is WqConfig:
        del AUTO_QUANTIZATION_CONFIG_MAPPING[_OLD_AUTO_ROUND]
    AutoHfQuantizer.merge_quantization_configs = classmethod(_original)  # type: ignore[method-assign, assignment]


def _check(policy: str) -> None:
    if policy not in POLICIES:
        raise SchemeError(f"{ENVIRONMENT} is {policy!r}; it must be one of {', '.join(POLICIES)}.")


install()
