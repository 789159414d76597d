"""What this machine offers, and what a run took of it."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_TRIM_EVERY = 16 << 20
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # of the process: no part of what may be copied
_MADV_DONTNEED = 4  # sys/mman.h; for a private mapping of a file: read it again when it is used again


def default_device() -> str:
    """The first accelerator, or the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if accelerator is None else str(accelerator)


def free_bytes(device: str | torch.device) -> int:
    """Memory that is free for use on a device; of the CPU, what the system says it can give without swapping."""
    place = torch.device(device)
    if place.type != "cpu":
        return int(torch.get_device_module(place).mem_get_info(place)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # no Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on whatever device."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or tells_of_memory(str(error))


def tells_of_memory(message: str) -> bool:
    """Whether that is what a message says: torch's, of a CPU or of an accelerator."""
    return "can't allocate memory" in message or "out of memory" in message.lower()


def keep_memory_tight() -> None:
    """Have large freed tensors go back to the system at once, for the rest of this process.

    Left alone, glibc raises its threshold for doing so up to 32 MB and keeps what is below, fragmenting: the peak then
    wanders by more than a block's size, and upwards. Fixed at 1 MB, it is what the tensors take.
    """
    mallopt = getattr(_LIBC, "mallopt", None)
    if mallopt is not None:  # glibc only
        mallopt(_M_MMAP_THRESHOLD, 1 << 20)
        mallopt(_M_TRIM_THRESHOLD, 1 << 20)


@contextmanager
def memory_at_hand() -> Iterator[None]:
    """With freed tensors kept for the next ones, up to 32 MB each: where many small ones come and go, as in a backward
    pass, asking the system for the pages of each takes longer than computing it. Memory is kept tight afterwards.
    """
    mallopt = getattr(_LIBC, "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 64 << 20)
    try:
        yield
    finally:
        keep_memory_tight()
        release_memory()


def release_memory() -> None:
    """Give back what is freed and still held: by a device's allocator, and in small pieces by the C library."""
    if torch.accelerator.is_available():
        torch.accelerator.memory.empty_cache()
    trim = getattr(_LIBC, "malloc_trim", None)
    if trim is not None:
        trim(0)


class Mapped:
    """Files that are mapped into memory, and whose pages can be given back once they have been read.

    A mapping's pages count as this process's for as long as it lasts, though what they hold is on disk. Only memory
    that the system itself says is one of the files is ever given back; reading it again fetches it again.
    """

    def __init__(self, files: Iterable[str | os.PathLike[str]]):
        self._files = {os.path.realpath(file) for file in files}
        self._ranges: list[tuple[int, int]] = []
        self._since = 0
        self._looks = len(self._files)  # how often to look for ranges anew: a file may be mapped later

    def forget(self, tensor: torch.Tensor) -> None:
        """Give back the whole pages of a tensor that will not be read again."""
        if tensor.device.type != "cpu" or _LIBC is None or not tensor.is_contiguous():
            return
        start, stop = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        if not self._holds(start, stop) and self._looks > 0:
            self._looks -= 1
            self._ranges = list(self._find())
        self._since += tensor.nbytes
        if self._since > _TRIM_EVERY:
            self._since = 0
            release_memory()
        page = os.sysconf("SC_PAGE_SIZE")
        first, last = -(-start // page) * page, stop // page * page
        if first < last and self._holds(start, stop):
            _LIBC.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_DONTNEED)

    def _holds(self, start: int, stop: int) -> bool:
        return any(low <= start and stop <= high for low, high in self._ranges)

    def _find(self) -> Iterator[tuple[int, int]]:
        for line in Path("/proc/self/maps").read_text().splitlines():
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5] in self._files and "s" not in fields[1]:
                low, high = fields[0].split("-")
                yield int(low, 16), int(high, 16)


def rss_bytes() -> int:
    """The resident size of this process, after giving back what it holds and does not use."""
    release_memory()
    status = Path("/proc/self/status")
    if not status.exists():
        return peak_rss_bytes()
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def peak_rss_bytes() -> int:
    """The largest resident size this process has had."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage's figure survives exec on Linux: a child would report its parent's peak
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
