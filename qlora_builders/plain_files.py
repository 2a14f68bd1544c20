"""Opening a file that somebody else may have put there: what waits or never ends is no file."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_plain(file: Path) -> BinaryIO:
    """For reading, if it is a plain file or a link to one.

    Raises:
        ValueError: that says what is wrong, for the caller to add the file.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # pipes would wait
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or device"
        raise ValueError(f"is {kind}; a plain file is needed")
    return os.fdopen(descriptor, "rb")


def read_plain(file: Path) -> bytes:
    """
    Raises:
        ValueError: as `open_plain`.
    """
    with open_plain(file) as handle:
        try:
            return handle.read()
        except OSError as error:
            raise ValueError(f"cannot be read: {error.strerror}") from error
