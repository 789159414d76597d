"""`WqConfig`, the one flag."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers.quantizers import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from wq.errors import FormatError, SchemeError
from wq.scheme import PER_CHANNEL, Scheme, check_quantizable

METHOD = "wq"  # the name in transformers' registries; never written to a checkpoint

READ = ("compressed-tensors", "gptq", "awq", "auto-round", "intel/auto-round")  # `quant_method`s that wq loads


@register_quantization_config(METHOD)
class WqConfig(QuantizationConfigMixin):
    """The one flag.

    bits, group_size, symmetric, keep: how to quantize a dense repo on load, as in `wq.quantize`; an already quantized
    repo brings its own. dequantize: load an already quantized repo as a dense model. head_bits: round the layer that
    makes logits, too, to so many bits as any repo loads; None keeps it as it is stored.
    Raises SchemeError for values no scheme has.
    """

    def __init__(
        self,
        bits: int = 4,
        group_size: int | None = None,
        symmetric: bool = True,
        keep: Iterable[str] = (),
        dequantize: bool = False,
        head_bits: int | None = None,
    ):
        check_quantizable(bits)
        Scheme(bits, PER_CHANNEL if group_size is None else group_size, symmetric)  # refuse bad values here and now
        if head_bits is not None:
            check_quantizable(head_bits)
            if dequantize:
                raise SchemeError(f"dequantize=True leaves nothing packed; leave head_bits={head_bits} out.")
        self.quant_method = METHOD  # type: ignore[assignment]
        self.bits, self.group_size, self.symmetric = bits, group_size, symmetric
        self.keep, self.dequantize, self.head_bits = tuple(keep), dequantize, head_bits
        self.checkpoint: dict[str, Any] | None = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The inverse of `to_dict`, for a config that is already quantized."""
        config = cls()
        config.checkpoint = dict(config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint of this model says: a standard format's own config, readable without wq."""
        if self.checkpoint is not None:
            return dict(self.checkpoint)
        known = {"bits": self.bits, "group_size": self.group_size, "symmetric": self.symmetric, "keep": list(self.keep)}
        return {"quant_method": METHOD, **known, "head_bits": self.head_bits}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    def bind(self, checkpoint: Any) -> WqConfig:
        """This flag for a repo whose config says `checkpoint`. Raises FormatError for a format wq does not read."""
        values = checkpoint if isinstance(checkpoint, dict) else checkpoint.to_dict()
        method, layout = values.get("quant_method"), values.get("format") or values.get("packing_format")
        if not readable(values):
            raise FormatError(
                f"this repo is quantized as {method}{f' {layout}' if layout else ''}; wq "
                "loads gptq, awq, auto-round and compressed-tensors pack-quantized. Leave quantization_config out to "
                "use the repo's own loader."
            )
        bound = WqConfig(self.bits, self.group_size, self.symmetric, self.keep, self.dequantize, self.head_bits)
        bound.checkpoint = dict(values)
        return bound


def readable(values: dict[str, Any]) -> bool:
    """Whether wq loads a repo with this `quantization_config`."""
    method, packing = values.get("quant_method"), str(values.get("packing_format") or "auto_round")
    if method == "compressed-tensors":
        return values.get("format") == "pack-quantized"
    return method in READ and packing.startswith("auto_round") and "fp" not in packing and "fake" not in packing
