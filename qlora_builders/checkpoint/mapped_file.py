"""A file as memory: its tensors without a copy, in pages that processes share and can be evicted.

Only for files that nobody changes in place. Ours are replaced whole (`atomic_directory`), and a
mapping goes on to show the old one; a file that shrinks under its mapping kills the process.
What is written to such a tensor stays in this process (a private copy of the page).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

_MADV_POPULATE_READ = 22  # Linux 5.14


class MappedFile:
    """Mapped when the first tensor is asked for, for as long as one of them lives."""

    def __init__(self, file: Path) -> None:
        self.file = file

    @cached_property
    def _memory(self) -> mmap.mmap:
        with self.file.open("rb") as handle:
            return mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)

    def bytes(self, start: int, count: int) -> Tensor:
        """uint8 [count > 0], read from the disk when this returns (on Linux).

        Raises:
            OSError: if the file cannot be mapped or read.
        """
        found = torch.frombuffer(self._memory, dtype=torch.uint8, offset=start, count=count)
        if sys.platform == "linux":
            _read_in(found)
        return found


def _read_in(memory: Tensor) -> None:
    """Fetches the pages at once, many at a time; an error of the disk is an error here, where a
    later touch of the page would be a signal."""
    start = memory.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    size = memory.data_ptr() + memory.nbytes - start
    madvise = ctypes.CDLL(None, use_errno=True).madvise  # releases the GIL; mmap.madvise does not
    done = madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), _MADV_POPULATE_READ)
    if done == 0 or (code := ctypes.get_errno()) == errno.EINVAL:  # an older kernel
        return
    raise OSError("it has shrunk" if code == errno.EFAULT else os.strerror(code))
