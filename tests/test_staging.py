"""A folder that appears only when complete never leaves half of itself behind, and has one writer at a time."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from test_checkpoint import alarm, leftovers, write

from wq import checkpoint, staging
from wq.errors import OutputError
from wq.journal import Journal
from wq.staging import check_output, check_space, staged, workplace


def test_a_staged_folder_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "new" / "out"
    with staged(target) as stage:
        (stage / "a").write_text("1")
        assert not target.exists()
        assert stage.parent.parent == target.parent  # so that the last step is a rename
    assert leftovers(target) == ["a"]
    assert leftovers(target.parent) == ["out"]


def test_a_relative_path_is_staged_in_the_folder_it_was_given_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with staged(Path("out")) as stage:
        (stage / "a").write_text("1")
        os.chdir(tmp_path / "elsewhere")
    assert leftovers(tmp_path / "out") == ["a"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("existing", [False, True], ids=["no folder before", "folder before"])
def test_an_exception_leaves_everything_as_it_was(tmp_path: Path, existing: bool, error: type[BaseException]) -> None:
    target = tmp_path / "out"
    if existing:
        target.mkdir()
        (target / "old").write_text("kept")

    def build() -> None:
        with staged(target, overwrite=True) as stage:
            (stage / "new").write_text("lost")
            raise error

    with pytest.raises(error):
        build()
    assert leftovers(tmp_path) == (["out"] if existing else [])
    if existing:
        assert (target / "old").read_text() == "kept"


@pytest.fixture(params=["exchanged", "renamed twice"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without a system that can exchange two folders in one step."""
    if request.param == "renamed twice":
        monkeypatch.setattr(staging, "_CALLS", ())


@pytest.mark.usefixtures("system")
def test_overwrite_replaces_the_whole_folder(tmp_path: Path) -> None:
    target = tmp_path / "out"
    (target / "sub").mkdir(parents=True)
    (target / "sub" / "old").write_text("gone")
    with staged(target, overwrite=True) as stage:
        (stage / "new").write_text("here")
        assert (target / "sub" / "old").exists()
    assert leftovers(target) == ["new"]
    assert leftovers(tmp_path) == ["out"]


def test_an_empty_folder_may_be_filled_without_overwrite(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with staged(tmp_path / "out") as stage:
        (stage / "a").write_text("1")
    assert leftovers(tmp_path / "out") == ["a"]


@pytest.mark.usefixtures("system")
def test_a_failed_rename_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("kept")
    rename = Path.rename

    def fail(self: Path, to: Path) -> Path:
        if self.name == "checkpoint":
            raise PermissionError(errno.EACCES, "Permission denied")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fail)
    monkeypatch.setattr(staging, "_CALLS", ())
    with pytest.raises(OutputError, match="Permission denied"), staged(target, overwrite=True):
        pass
    assert leftovers(tmp_path / ".out.partial") == ["checkpoint", "lock", "publishing"]  # it is complete there
    assert leftovers(target) == ["old"]


def test_what_a_killed_process_left_does_not_get_into_the_folder(tmp_path: Path) -> None:
    target = tmp_path / "out"
    for name in (".out.partial/checkpoint", ".out.gone-1/checkpoint", ".out.partial/old"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "stale").write_text("from before")
    target.mkdir()
    with staged(target, overwrite=True) as stage:
        assert leftovers(stage) == []
    assert leftovers(tmp_path) == ["out"]
    assert leftovers(target) == []


def test_a_kill_between_two_renames_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / ".out.partial" / "old").mkdir(parents=True)
    (tmp_path / ".out.partial" / "old" / "a").write_text("precious")
    with workplace(tmp_path / "out"):
        assert (tmp_path / "out" / "a").read_text() == "precious"
    assert leftovers(tmp_path) == ["out"]


def test_a_run_that_was_killed_after_publishing_is_known_as_such(tmp_path: Path) -> None:
    with workplace(tmp_path / "out") as place:
        place.folder.mkdir()
        (place.folder / "a").write_text("1")
        place.publish()
        place.keep = True  # as if it could not tidy up any more
    with workplace(tmp_path / "out") as place:
        assert place.published
    assert leftovers(tmp_path) == ["out"]
    with workplace(tmp_path / "out") as place:
        assert not place.published


def test_a_run_that_was_killed_before_publishing_is_not_taken_for_published(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with workplace(tmp_path / "out", overwrite=True) as place:
        place.folder.mkdir()
        (place.root / "publishing").write_text(str(place.folder.stat().st_ino))
        place.keep = True
    with workplace(tmp_path / "out", overwrite=True) as place:
        assert not place.published


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_is_written_to_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(staging.fcntl, "flock", refuse)
    with staged(tmp_path / "out") as stage:
        (stage / "a").write_text("1")
    assert leftovers(tmp_path / "out") == ["a"]


def test_a_lock_that_fails_otherwise_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(staging.fcntl, "flock", refuse)
    with pytest.raises(OutputError, match="cannot be made .broken."), staged(tmp_path / "out"):
        pytest.fail("it went on")


def test_a_folder_that_was_filled_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    def build() -> None:
        with staged(tmp_path / "out") as stage:
            (stage / "a").write_text("1")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "b").write_text("precious")

    with pytest.raises(OutputError, match="cannot be put in place"):
        build()
    assert leftovers(tmp_path / "out") == ["b"]
    assert leftovers(tmp_path / ".out.partial" / "checkpoint") == ["a"]


def test_one_process_at_a_time_writes_a_folder(tmp_path: Path) -> None:
    with staged(tmp_path / "out") as stage:
        path = str(tmp_path / "out")
        code = f"from pathlib import Path; from wq.staging import staged; staged(Path({path!r})).__enter__()"
        second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert f"is being written by process {os.getpid()}" in second.stderr
        assert second.returncode == 1
        (stage / "a").write_text("1")
    assert leftovers(tmp_path / "out") == ["a"]


def test_the_lock_of_a_dead_process_holds_nobody_up(tmp_path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from wq.staging import staged
with staged(Path({str(tmp_path / "out")!r})) as stage:
    (stage / "a").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert leftovers(tmp_path) == [".out.partial"]
    with staged(tmp_path / "out") as stage:
        assert leftovers(stage) == []
    assert leftovers(tmp_path) == ["out"]


def test_a_place_where_quantizing_goes_on_is_not_taken_by_others(tmp_path: Path) -> None:
    with workplace(tmp_path / "out") as place:
        Journal(place.root).write("progress", {})
        place.keep = True
    with pytest.raises(OutputError, match="is not finished"), staged(tmp_path / "out"):
        pytest.fail("entered")
    assert leftovers(tmp_path / ".out.partial") == ["lock", "progress.safetensors"]


def test_a_disk_too_small_is_told_with_what_it_lacks(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(OutputError, match=f"{free * 2} bytes are needed \\(this\\), and [0-9]+ are free"):
        check_space(tmp_path / "deep" / "out", free * 2, "this")
    check_space(tmp_path / "deep" / "out", 1, "this")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_refused_as_output(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "out").write_text("precious")
    with pytest.raises(OutputError, match="is not a folder"), staged(tmp_path / "out", overwrite):
        pytest.fail("entered")
    assert (tmp_path / "out").read_text() == "precious"
    assert leftovers(tmp_path) == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_device_or_pipe_is_refused_as_output(tmp_path: Path, overwrite: bool) -> None:
    os.mkfifo(tmp_path / "out")
    with alarm(2), pytest.raises(OutputError), staged(tmp_path / "out", overwrite):
        pass
    assert stat.S_ISFIFO((tmp_path / "out").stat().st_mode)


def test_a_folder_that_is_not_empty_is_refused_without_overwrite(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("precious")
    with pytest.raises(OutputError, match="--overwrite"), staged(tmp_path / "out"):
        pytest.fail("entered")
    assert leftovers(tmp_path / "out") == ["a"]


def test_an_output_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written to"):
        check_output(tmp_path / "file" / "out")


def test_a_link_to_an_empty_folder_leaves_nothing_beside_it(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    with staged(tmp_path / "out") as stage:
        (stage / "a").write_text("1")
    assert leftovers(tmp_path / "out") == ["a"]
    assert leftovers(tmp_path) == ["disk", "out"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere; the next test fakes it")
def test_an_unwritable_parent_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(OutputError, match="cannot be written to"):
            check_output(tmp_path / "deep" / "out")
    finally:
        tmp_path.chmod(0o755)


def test_the_nearest_existing_parent_is_asked_whether_it_can_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(os, "access", lambda path, mode: asked.append(path) or mode != os.W_OK)
    with pytest.raises(OutputError, match="cannot be written to"):
        check_output(tmp_path / "deep" / "out")
    assert asked == [tmp_path]


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_modes_obey_the_umask(tmp_path: Path, umask: Callable[[int], int], mask: int) -> None:
    umask(mask)
    with staged(tmp_path / "out") as stage:
        write(stage, {"a": torch.ones(3), "b": torch.ones(3)}, 12)
        checkpoint.write_text(stage / "config.json", "{}")
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~mask
    files = list((tmp_path / "out").iterdir())
    assert len(files) == 4
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o666 & ~mask}
