"""What runs in place of a dense layer: one op, and the module that holds packed weights for it."""

from wq.layers.linear import PackedWeight, WqLinear

__all__ = ["PackedWeight", "WqLinear"]
