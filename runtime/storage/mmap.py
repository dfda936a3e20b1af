"""Memory-mapped files: aligned, with pages that the system can share and reclaim.

Python's ``mmap`` (before 3.13) and ``numpy.memmap`` keep a file descriptor open for each map. Ten thousand tasks would
exceed the process's limit. This module calls ``mmap`` directly, which needs no open descriptor.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from io import FileIO
from pathlib import Path

import numpy as np
import numpy.typing as npt

from adalink.runtime.storage.stamp import open_regular

Bytes = npt.NDArray[np.uint8]

_ALIGNMENT_BYTES = 64
# The same on Linux and macOS.
_PROT_READ = 1
_MAP_PRIVATE = 2
_FAILED = ctypes.c_void_p(-1).value


def map_file(path: Path) -> Bytes:
    """Map a file into memory, read-only, until no array refers to it.

    The file must not be truncated meanwhile: a read beyond its end would kill the process. A deployment's files are
    replaced only by renaming. If the system cannot map the file, it is read. Raises ``OSError`` as opening does.
    """
    with open_regular(path) as stream:
        mapped = _map(stream.fileno(), os.fstat(stream.fileno()).st_size) if os.name == "posix" else None
        return _read(stream) if mapped is None else np.asarray(mapped)


def read_file(path: Path) -> Bytes:
    """Read a file into memory aligned to 64 bytes; raises ``OSError`` as opening does."""
    with open_regular(path) as stream:
        return _read(stream)


class _Map:
    """A mapped range. It is the base of every numpy view and is unmapped with the last one."""

    def __init__(self, address: int, size_bytes: int, unmap: Callable[[int, int], int]) -> None:
        self.__array_interface__ = {"version": 3, "typestr": "|u1", "shape": (size_bytes,), "data": (address, True)}
        self._unmap = functools.partial(unmap, address, size_bytes)

    def __del__(self) -> None:
        self._unmap()


def _map(descriptor: int, size_bytes: int) -> _Map | None:
    """Map a whole file; ``None`` if the system refuses: an empty file, or more maps than a process may have."""
    library = _library()
    address = library.mmap(None, size_bytes, _PROT_READ, _MAP_PRIVATE, descriptor, 0)
    return None if address in (None, _FAILED) else _Map(address, size_bytes, library.munmap)


def _read(stream: FileIO) -> Bytes:
    """All bytes of ``stream``, even if the file grows or shrinks meanwhile."""
    data = stream.readall()
    space = np.empty(len(data) + _ALIGNMENT_BYTES, np.uint8)
    start = -space.ctypes.data % _ALIGNMENT_BYTES
    aligned = space[start : start + len(data)]
    aligned[:] = np.frombuffer(data, np.uint8)
    return aligned


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(None)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = (
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
    )
    library.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    return library
