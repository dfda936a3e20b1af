"""Stamps of files: a file counts as unchanged while device, inode, size and both time stamps stay the same.

The owner of a file cannot set back its change time. Two changes leave no trace in a stamp: a disk that corrupts bytes,
and writes through an older memory map.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from io import FileIO
from pathlib import Path

# A second change within this time could leave the same stamp.
_SETTLED_NS = 2_000_000_000

# Device, inode, size, modification and change time in nanoseconds.
Stamp = tuple[int, int, int, int, int]


def stamp_of(status: os.stat_result) -> Stamp:
    """The stamp in what the system says of a file."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def is_settled(stamp: Stamp, since_ns: int | None = None) -> bool:
    """Whether the file was left alone for a while: from then on every change shows in its stamp.

    Args:
        stamp: the file's.
        since_ns: when it was looked at, as ``time.time_ns`` has it; now by default.
    """
    return max(stamp[3:]) < (time.time_ns() if since_ns is None else since_ns) - _SETTLED_NS


def open_regular(path: Path, *, follow_links: bool = True) -> FileIO:
    """Open a file for unbuffered reading; raises ``OSError``, also for a folder, a device or a pipe."""
    links = 0 if follow_links else getattr(os, "O_NOFOLLOW", 0)
    # A pipe that nobody writes to would otherwise wait for ever.
    descriptor = os.open(path, os.O_RDONLY | links | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "it is a device or a pipe, not a file", str(path))
        return FileIO(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise
