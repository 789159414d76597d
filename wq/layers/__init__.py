"""What runs in place of dense layers: the ops, and the modules that hold packed weights for them."""

from wq.layers.experts import ExpertWeight, OffloadedExperts
from wq.layers.linear import PackedWeight, WqLinear

__all__ = ["ExpertWeight", "OffloadedExperts", "PackedWeight", "WqLinear"]
