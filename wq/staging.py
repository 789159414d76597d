"""A folder that appears only when it is complete, built beside its place by one process at a time.

Work on `NAME` happens in `.NAME.partial`:

    lock         held (flock) by the process at work; the system lets go of it when that process ends, however it ends
    checkpoint/  what will be `NAME`
    publishing   the inode of `checkpoint/`, so that a run killed after the exchange knows that it was done
    old/         what `NAME` was, for a moment, on file systems that cannot exchange two folders
    *            what a run notes to go on from (`wq.journal`)
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from wq.errors import OutputError, first_line

_FLAG = 2  # RENAME_EXCHANGE of linux/fs.h, and RENAME_SWAP of macOS
_AT_FDCWD = -100
_CALLS = (
    ("renameat2", lambda one, other: (_AT_FDCWD, one, _AT_FDCWD, other, _FLAG)),  # Linux
    ("renamex_np", lambda one, other: (one, other, _FLAG)),  # macOS
)
_CANNOT_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EXDEV)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of a disk, a quota, a file


class Workplace:
    """Where one process builds the folder that will be at `path`.

    overwrite: whether there may be something. folder: what it builds. root: where it notes things. keep: whether `root`
    outlives a run that fails. published: whether a run that was killed had put its folder in place.
    """

    def __init__(self, path: Path, overwrite: bool = False):
        self.overwrite = overwrite
        self.path = path.resolve()  # behind a link, the folder it leads to
        self.root = self.path.with_name(f".{self.path.name}.partial")
        self.folder = self.root / "checkpoint"
        self.keep = self.published = False

    def lock(self) -> int:
        """Take the lock and return its file descriptor. Raises OutputError if another process has it."""
        while True:
            self.root.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # the one before has just removed the folder
                held = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT, 0o666)
                self._hold(held)
                if _is(self.root / "lock", held):
                    os.ftruncate(held, 0)
                    os.write(held, str(os.getpid()).encode())
                    return held
                os.close(held)

    def _hold(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace") or "unknown"
            os.close(descriptor)
            raise OutputError(
                f"{self.path} is being written by process {holder}. Wait for it, or choose another folder."
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):  # no locks on this file system
                raise

    def recover(self) -> None:
        """Put right what a killed run left halfway: nothing, if it was not about to publish."""
        for gone in self.path.parent.glob(f".{_escaped(self.path.name)}.gone-*"):
            shutil.rmtree(gone, ignore_errors=True)
        old, note = self.root / "old", self.root / "publishing"
        if old.exists() and not self.path.exists():
            old.rename(self.path)
        with contextlib.suppress(OSError, ValueError):  # no such note, or no such folder
            self.published = self.path.stat().st_ino == int(note.read_text())
        self.keep = not self.published and any(self.root.glob("*.safetensors"))

    def publish(self) -> None:
        """Put what was built in its place, at once, and flushed to disk: before, all is old there, after, all new."""
        for file in self.folder.rglob("*"):
            if file.is_file():
                sync(file)
        sync(self.folder)
        (self.root / "publishing").write_text(str(self.folder.stat().st_ino))
        sync(self.root / "publishing")
        try:
            if self.overwrite and self.path.exists():
                _exchange(self.folder, self.path, self.root / "old")
            else:
                self.folder.rename(self.path)
        except OSError as error:
            self.keep = True
            raise OutputError(
                f"{self.path} cannot be put in place ({error.strerror}); it is complete in {self.folder}."
            ) from error
        sync(self.path.parent)
        self.keep = False

    def discard(self) -> None:
        """Remove everything but what was published. Whoever comes next finds either all of it or nothing."""
        gone = self.path.with_name(f".{self.path.name}.gone-{os.getpid()}")
        self.root.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def clear(self) -> None:
        """Forget what a run before has left, but for the lock."""
        self.keep = self.published = False
        for item in self.root.iterdir():
            if item.name != "lock":
                shutil.rmtree(item) if item.is_dir() else item.unlink()


@contextlib.contextmanager
def workplace(path: Path, overwrite: bool = False) -> Iterator[Workplace]:
    """The workplace of `path`, locked; afterwards it is gone, unless there is something in it to `keep`.

    Raises OutputError if it cannot be made, or another process is at work in it, and when the disk is full.
    """
    place = Workplace(path, overwrite)
    try:
        lock = place.lock()
    except OSError as error:
        raise OutputError(f"{path} cannot be made ({error.strerror}). Choose another folder.") from error
    try:
        place.recover()
        yield place
    except OSError as error:
        if error.errno not in FULL:
            raise
        free = shutil.disk_usage(place.root).free
        full = OutputError(f"{path}: the disk is full ({first_line(error)}; {free} bytes free). Free some.")
        for note in getattr(error, "__notes__", ()):
            full.add_note(note)
        raise full from error
    finally:
        if not place.keep:
            place.discard()
        os.close(lock)


@contextlib.contextmanager
def staged(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder to build in; it takes the place of `path` at the end, or vanishes with the error.

    `path` is never half-written: it holds what it held before, or the complete new content.
    """
    check_output(path, overwrite)
    with workplace(path, overwrite) as place:
        if place.keep:
            raise OutputError(
                f"{path}: a run of `wq quantize` to this folder is not finished. Repeat it, or delete {place.root}."
            )
        place.clear()
        place.folder.mkdir()
        yield place.folder
        place.publish()


def check_output(path: Path, overwrite: bool = False) -> None:
    """Raise OutputError unless a new folder can be put at `path`."""
    path = path.resolve()
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path} is not a folder. Choose one that does not exist yet.")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise OutputError(f"{path} is not empty. Choose another folder, or replace it with --overwrite.")
    parent = path.parent
    existing = next(folder for folder in (parent, *parent.parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise OutputError(f"{existing} cannot be written to. Choose another folder.")


def check_space(path: Path, needed: int, what: str) -> None:
    """Raise OutputError unless the disk that `path` will be on has `needed` bytes free. what: that they are for."""
    existing = next(folder for folder in (path.resolve(), *path.resolve().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OutputError(f"{path}: {needed} bytes are needed ({what}), and {free} are free. Free some.")


def sync(path: Path) -> None:
    """Flush a file or a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(new: Path, path: Path, aside: Path) -> None:
    """Exchange two folders: in one step where the system can, else with what was there put aside until it worked."""
    libc = ctypes.CDLL(None, use_errno=True)
    one, other = os.fsencode(new), os.fsencode(path)
    for name, arguments in _CALLS:
        if hasattr(libc, name):
            if not getattr(libc, name)(*arguments(one, other)):
                return
            number = ctypes.get_errno()
            if number not in _CANNOT_EXCHANGE:
                raise OSError(number, os.strerror(number), str(path))
    path.rename(aside)
    try:
        new.rename(path)
    except BaseException:
        aside.rename(path)
        raise


def _is(file: Path, descriptor: int) -> bool:
    """Whether an open file is the one that has this name now."""
    try:
        return os.path.samestat(file.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _escaped(name: str) -> str:
    """A name in which a glob finds no pattern."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
