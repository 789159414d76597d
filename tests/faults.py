"""Memory that runs out on purpose."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Faults(TorchDispatchMode):
    """Runs out of memory at operation number `at`, and whenever a result is larger than `limit` bytes."""

    def __init__(self, at: int | None = None, limit: float = float("inf")):
        super().__init__()
        self.at, self.limit, self.count, self.failed, self.largest = at, limit, 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        made = func(*args, **(kwargs or {}))
        sizes = [t.nbytes for t in tree_leaves(made) if isinstance(t, torch.Tensor) and not t.is_meta]
        self.largest = max([self.largest, *sizes])
        if self.count == self.at or max(sizes, default=0) > self.limit:
            self.failed += 1
            raise torch.OutOfMemoryError(f"injected at operation {self.count}, {func}")
        return made
