"""What was freed in the middle of the heap goes back to the system."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from adalink.runtime.heap import release_freed_memory

_CHILD = """
from adalink.runtime.heap import release_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

blocks = [bytearray(20_000) for _ in range(2_000)]
last = bytearray(20_000)  # the heap cannot shrink at its end
del blocks
before = resident()
release_freed_memory()
print(before - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc returns pages on demand")
def test_freed_memory_is_returned() -> None:
    done = subprocess.run([sys.executable, "-c", _CHILD], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 20_000_000


@pytest.mark.parametrize("fault", [None, OSError("dynamic loading is not supported"), TypeError("no name")])
def test_no_c_library_is_needed(fault: Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: None) -> object:
        if fault is not None:
            raise fault
        return object()  # one without such a call, as musl is

    monkeypatch.setattr(ctypes, "CDLL", load)
    release_freed_memory()
