"""Shared fixtures: tiny random models of real architectures with a real tokenizer, made here, no network."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing in this suite may depend on the outside; before any import
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

# Tensors this small only wait for each other: two threads on two busy cores are several times slower than one.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A folder with a random model of a named architecture and a byte-level tokenizer; made once a session."""
    from tiny_models import make

    made: dict[tuple[object, ...], Path] = {}

    def get(architecture: str = "llama", **overrides: object) -> Path:
        key = (architecture, *sorted(overrides.items()))
        if key not in made:
            made[key] = make(tmp_path_factory.mktemp(architecture), architecture, **overrides)
        return made[key]

    return get
