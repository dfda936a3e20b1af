"""One way to measure every peer: a script fills in ``Peer`` and calls ``main``, which prints one JSON object.

What each figure means is in benchmarks/README.md. Only the standard library is imported here: each script runs in the
environment of its peer.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

# Every script prints these, and nothing else; a figure that a peer has no equivalent of is null.
FIELDS = (
    "prefill_ms",
    "first_token_ms",
    "decode_tok_s",
    "swap_us",
    "adapter_load_ms",
    "adapter_disk_bytes",
    "adapter_resident_bytes",
    "engine_load_s",
    "resident_mb",
    "weight_bytes",
    "first_tokens",
    "versions",
)
_SHOWN_TOKENS = 16
_SWITCHES = 200


@dataclass(frozen=True)
class Settings:
    """What to run.

    Attributes:
        work: the folder that holds ``models`` (made by make_models.py) and ``deployment``.
        kind: variant of the peer; each script lists its kinds.
        prompt: text of the prompt, and its tokens.
        new_tokens: tokens to generate.
        threads: threads of the engine.
        repeats: short measurements (prefill, first token) in this process; the median is kept.
    """

    work: Path
    kind: str
    text: str
    prompt: list[int]
    new_tokens: int
    threads: int
    repeats: int


class Peer(ABC):
    """A loaded engine, made from ``Settings``. Adapters are numbered from 0; number 0 is active to begin with.

    Attributes:
        adapters: how many adapters there are on the disk; 0 for a base model.
        packages: whose versions are reported.
    """

    adapters = 0
    packages: tuple[str, ...] = ()

    @abstractmethod
    def __init__(self, settings: Settings) -> None: ...

    @staticmethod
    @abstractmethod
    def folder(settings: Settings) -> Path:
        """Folder of the files that opening reads."""

    @abstractmethod
    def prefill(self) -> None:
        """Compute the scores of every position of the prompt."""

    @abstractmethod
    def generate(self, new_tokens: int) -> list[int]:
        """Continue the prompt greedily, without ending early, in the way that is fastest for this peer."""

    @abstractmethod
    def weight_bytes(self) -> int:
        """Size of the base's weights on the disk: what a step has to read, without the adapter."""

    def ask(self, ids: list[int]) -> None:
        """Take other tokens as the prompt."""
        raise NotImplementedError

    def switch(self, index: int) -> None:
        """Make another loaded adapter the active one."""
        raise NotImplementedError

    def load(self, index: int) -> None:
        """Load an adapter from the disk, so that ``switch`` can make it active."""
        raise NotImplementedError

    def disk_bytes(self) -> int:
        """Size of adapter 0 on the disk."""
        raise NotImplementedError


def main(open_peer: type[Peer]) -> None:
    """Read the command line, measure, print the JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--kind", required=True)
    parser.add_argument("--prompt", type=Path, required=True, help="JSON file with text and ids")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--texts", type=Path, help="measure nothing but the time to answer each: text, ids, tokens")
    arguments = parser.parse_args()
    prompt = json.loads(arguments.prompt.read_text(encoding="utf-8"))
    settings = Settings(
        arguments.work,
        arguments.kind,
        prompt["text"],
        prompt["ids"],
        arguments.new_tokens,
        arguments.threads,
        arguments.repeats,
    )
    gc.disable()
    if arguments.texts is None:
        result = measure(open_peer, settings)
    else:
        result = answer(open_peer, settings, json.loads(arguments.texts.read_text(encoding="utf-8")))
    # Libraries may print what they like; the object is the last line.
    print(json.dumps(result), flush=True)


def answer(open_peer: type[Peer], settings: Settings, texts: list[dict[str, Any]]) -> dict[str, object]:
    """Seconds that a peer takes to read each text and to write so many tokens, and the tokens."""
    warm_files(open_peer.folder(settings))
    peer = open_peer(settings)
    peer.generate(_SHOWN_TOKENS)
    seconds, replies = [], []
    for text in texts:
        peer.ask(text["ids"])
        begin = time.perf_counter()
        reply = peer.generate(text["tokens"])
        seconds.append(time.perf_counter() - begin)
        if len(reply) != text["tokens"]:
            raise RuntimeError(f"asked for {text['tokens']} tokens after {text['text']!r}, got {len(reply)}")
        replies.append(reply)
    return {
        "seconds": seconds,
        "replies": replies,
        "versions": {name: metadata.version(name) for name in peer.packages},
    }


def measure(open_peer: type[Peer], settings: Settings) -> dict[str, object]:
    """Open a peer and measure it; the values of ``FIELDS``."""
    warm_files(open_peer.folder(settings))
    begin = time.perf_counter()
    peer = open_peer(settings)
    engine_load_s = time.perf_counter() - begin
    result: dict[str, object] = {**dict.fromkeys(FIELDS)}
    result["engine_load_s"] = engine_load_s
    result["weight_bytes"] = peer.weight_bytes()
    result["versions"] = {name: metadata.version(name) for name in peer.packages}
    # The longest first, so that what grows with the length has grown.
    tokens = peer.generate(min(settings.new_tokens, _SHOWN_TOKENS))
    peer.prefill()
    result["first_tokens"] = tokens
    result["prefill_ms"] = 1e3 * _median(peer.prefill, settings.repeats)
    first = _median(lambda: peer.generate(1), settings.repeats)
    result["first_token_ms"] = 1e3 * first
    begin = time.perf_counter()
    generated = peer.generate(settings.new_tokens)
    whole = time.perf_counter() - begin
    if len(generated) != settings.new_tokens or generated[: len(tokens)] != tokens:
        raise RuntimeError(f"asked for {settings.new_tokens} tokens that begin {tokens}, got {generated}")
    # From the first token to the last: the prompt's pass is taken off as measured just before.
    result["decode_tok_s"] = (settings.new_tokens - 1) / (whole - first)
    result["resident_mb"] = resident_bytes() / 2**20
    if peer.adapters:
        result["adapter_disk_bytes"] = peer.disk_bytes()
        result.update(_adapters(peer))
    return result


def _adapters(peer: Peer) -> dict[str, float]:
    """Load the other adapters, use each once, and switch between the first two."""
    loads = []
    peer.load(1)
    peer.switch(1)
    peer.generate(1)
    before = resident_bytes()
    further = range(2, peer.adapters)
    for index in further:
        begin = time.perf_counter()
        peer.load(index)
        loads.append(time.perf_counter() - begin)
        peer.switch(index)
        peer.generate(1)
    grown = resident_bytes() - before
    switches = []
    for turn in range(_SWITCHES):
        begin = time.perf_counter()
        peer.switch(turn % 2)
        switches.append(time.perf_counter() - begin)
    return {
        "adapter_load_ms": 1e3 * statistics.median(loads),
        "adapter_resident_bytes": max(0, grown) / len(further),
        "swap_us": 1e6 * statistics.median(switches),
    }


def _median(call: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def warm_files(folder: Path) -> None:
    """Read every file once: opening is measured with the files in the page cache, for all peers alike."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as stream:
                while stream.read(1 << 24):
                    pass


def resident_bytes() -> int:
    """Resident memory of this process: what ``ru_maxrss`` cannot tell, because it never falls."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        import psutil

        return int(psutil.Process().memory_info().rss)
    return pages * os.sysconf("SC_PAGE_SIZE")


def note(message: str) -> None:
    """A line for people."""
    print(message, file=sys.stderr, flush=True)
