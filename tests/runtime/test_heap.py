"""What a tokenizer's parser frees goes back to the system."""

from __future__ import annotations

import subprocess
import sys

import pytest

_CHILD = """
from adalink.runtime.heap import release_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1])

kept = []
for index in range(400_000):  # every second object stays, so that the heap cannot shrink at its end
    block = bytearray(500)
    kept.append(block if index < 1000 or index % 400 == 0 else None)
    if index % 2 == 0:
        kept.append(bytearray(500))
before = resident()
kept = kept[:10] + [kept[-1]]
freed = resident()
release_freed_memory()
print(before, freed, resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc returns pages on demand")
def test_freed_memory_is_returned() -> None:
    done = subprocess.run([sys.executable, "-c", _CHILD], capture_output=True, text=True, check=True)
    before, freed, after = map(int, done.stdout.split())
    assert after < freed <= before
