"""A note comes back as it was, or is refused; half of one is never there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from wq.errors import OutputError
from wq.journal import Journal

VALUE = {"layers": [{"error": 0.1, "nothing": None}], "blocks": 3, "text": "ä"}
TENSORS = {
    "a": torch.randn(3, 5).t(),
    "b": torch.arange(4, dtype=torch.int64),
    "c": torch.randn(2, 2).to(torch.bfloat16),
    "none": torch.empty(0, 3),
    "one": torch.tensor(2.5),
}


def test_a_note_comes_back_as_it_was(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    assert journal.read("note") is None
    journal.write("note", VALUE, TENSORS)
    value, tensors = journal.read("note") or pytest.fail("no note")
    assert value == VALUE
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_a_note_takes_the_place_of_another_and_leaves_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.write("note", 1, TENSORS)
    journal.write("note", 2)
    journal.write("other", 3)
    assert [journal.read(name) for name in ("note", "other")] == [(2, {}), (3, {})]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_note_that_could_not_be_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path)
    journal.write("note", 1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("wq.journal.sync", full)
    with pytest.raises(OSError, match="No space"):
        journal.write("note", 2, TENSORS)
    assert journal.read("note") == (1, {})


def test_every_flipped_bit_and_every_cut_is_noticed(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.write("note", {"a": 1}, {"t": torch.arange(3)})
    file = tmp_path / "note.safetensors"
    whole = file.read_bytes()
    damaged = [whole[:length] for length in range(len(whole))]
    damaged += [whole[:i] + bytes([whole[i] ^ 1 << bit]) + whole[i + 1 :] for i in range(len(whole)) for bit in (0, 6)]
    refused = 0
    for content in damaged:
        file.write_bytes(content)
        try:
            value, tensors = journal.read("note") or (None, {})
            assert value == {"a": 1}
            assert torch.equal(tensors["t"], torch.arange(3))
        except OutputError:
            refused += 1
    assert refused >= 0.95 * len(damaged)  # the rest are spaces, and what nobody reads
    print(f"{len(damaged)} damaged notes: {refused} refused, {len(damaged) - refused} read as they were")
