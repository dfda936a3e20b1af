"""Soak: a server in a process of its own, clients that come, leave and are killed, and tasks that change meanwhile."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from adalink.export.adapter.export import export_adapter
from adalink.export.writer import remove_task
from adalink.runtime.deployment import Deployment

PROMPTS = ["oil", "7", "crude oil, 1987", "wheat"]
TOKENS = 12
SLOTS, QUEUE = 8, 40
# What clients may ask for, and the tasks whose texts are right: `swap` is exchanged, `guest` and `visitor` come and go.
MODELS = {"alpha": ["alpha"], "beta": ["beta"], "prompted": ["prompted"]}
MODELS |= {"swap": ["alpha", "beta"], "guest": ["alpha"], "visitor": ["beta"]}
GUESTS = ["guest", "visitor"]
SAMPLE_SECONDS = 10.0
# Growth from the first half's peak to the second half's that is taken for none.
MOST_GROWN_KB = 40_000
_CLIENT_PROCESSES, _KILL_SECONDS = 4, 5.0


@dataclass
class Soak:
    """What a run found.

    Attributes:
        counts: answers of clients by how they ended.
        wrong: what was not right.
        changes: of tasks, by kind.
        killed: processes of clients that were killed.
        samples: seconds, resident memory of the server in kB and answers so far, at every sample.
    """

    clients: int
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    changes: Counter[str] = field(default_factory=Counter)
    killed: int = 0
    seconds: float = 0.0
    samples: list[tuple[float, int, int]] = field(default_factory=list)

    @property
    def grown_kb(self) -> int:
        """Growth of memory from the first half's peak to the second half's."""
        middle = self.seconds / 2
        first = [memory for at, memory, _ in self.samples if at <= middle]
        second = [memory for at, memory, _ in self.samples if at > middle]
        return max(second, default=0) - max(first, default=0) if first and second else 0

    def as_json(self) -> dict[str, Any]:
        return {
            "clients": self.clients,
            "seconds": round(self.seconds, 1),
            "answers": dict(sorted(self.counts.items())),
            "changes": dict(sorted(self.changes.items())),
            "killed_processes": self.killed,
            "wrong": self.wrong[:50],
            "grown_kb": self.grown_kb,
            "samples": [{"seconds": at, "resident_kb": memory, "answers": count} for at, memory, count in self.samples],
        }


def run_soak(
    source: Path, work: Path, seconds: float, clients: int, seed: int, progress: Callable[[Soak], None] | None = None
) -> Soak:
    """Serve a copy of a deployment to clients for some time.

    Args:
        source: folder with ``deployment`` and ``adapters``, of the corpus.
        work: an empty folder.
        seconds: how long.
        clients: how many ask at once.
        seed: of what the clients do.
        progress: is told what was found so far, at every sample.
    """
    folder = Path(shutil.copytree(source / "deployment", work / "deployment"))
    shutil.copytree(source / "adapters" / "alpha", work / "folders" / "guest")
    export_adapter(source / "adapters" / "alpha", folder, name="swap")
    (work / "expected.json").write_text(json.dumps(expected_texts(folder)))
    soak = Soak(clients)
    with _server(folder, work, soak) as (server, url):
        _Run(soak, server.pid, url, source / "adapters", folder, work, random.Random(seed), progress).go(seconds)
        settle(soak, url)
    return soak


def expected_texts(folder: Path) -> dict[str, dict[str, list[str]]]:
    """Right texts by model and prompt, in a process that serves nobody."""
    with Deployment.open(folder, threads=1) as deployment:
        base = deployment.manifest.base.name
        alone = {
            (task, prompt): deployment.generate([prompt], tasks=task, max_new_tokens=TOKENS)[0].text
            for task in (None, "alpha", "beta", "prompted")
            for prompt in PROMPTS
        }
    models: dict[str, list[Any]] = {base: [None], **MODELS}
    return {
        model: {prompt: [alone[task, prompt] for task in tasks] for prompt in PROMPTS}
        for model, tasks in models.items()
    }


@contextmanager
def _server(folder: Path, work: Path, soak: Soak) -> Any:
    words = ["--port", "0", "--json", "--threads", "1", "--slots", str(SLOTS), "--queue", str(QUEUE), "--watch"]
    command = [sys.executable, "-m", "adalink.tools", "serve", str(folder), *words]
    log = work / "server.log"
    with log.open("w") as errors:
        server = subprocess.Popen(
            [*command, "--tasks-folder", str(work / "folders")], stdout=subprocess.PIPE, stderr=errors, text=True
        )
    assert server.stdout is not None
    try:
        yield server, json.loads(server.stdout.readline())["url"]
    finally:
        server.send_signal(signal.SIGTERM)
        if (code := server.wait(60)) != 0:
            soak.wrong.append(f"the server ended with {code}")
        if text := log.read_text():
            soak.wrong.append(f"the server's log: {text[-500:]}")


@dataclass
class _Run:
    """A run under way."""

    soak: Soak
    pid: int
    url: str
    sources: Path
    folder: Path
    work: Path
    rng: random.Random
    progress: Callable[[Soak], None] | None

    def go(self, seconds: float) -> None:
        """Keep clients asking and tasks changing."""
        begun = time.monotonic()
        processes = [self._start() for _ in range(_CLIENT_PROCESSES)]
        try:
            self._disturb(seconds, begun, processes)
            for process in processes:
                process.stop()
        finally:
            for process in processes:
                process.kill()  # else it would ask a server that is no more, for ever
        self.soak.seconds = time.monotonic() - begun
        self._sample(self.soak.seconds, processes)

    def _disturb(self, seconds: float, begun: float, processes: list[_Clients]) -> None:
        """Replace tasks and kill clients until the time is over."""
        killed_at, turn = 0.0, 0
        while (now := time.monotonic() - begun) < seconds:
            if now >= SAMPLE_SECONDS * len(self.soak.samples):
                self._sample(now, processes)
            if now - killed_at >= _KILL_SECONDS:
                victim = processes.pop(self.rng.randrange(len(processes)))
                victim.kill()
                self.soak.killed += 1
                _collect(self.soak, [victim])
                processes.append(self._start())
                killed_at = now
            change_tasks(self.soak, turn, self.url, self.sources, self.folder)
            turn += 1
            time.sleep(0.1)

    def _start(self) -> _Clients:
        return _Clients(self.url, self.work, max(1, self.soak.clients // _CLIENT_PROCESSES), self.rng)

    def _sample(self, now: float, processes: list[_Clients]) -> None:
        _collect(self.soak, processes)
        self.soak.samples.append((round(now, 1), resident_kb(self.pid), sum(self.soak.counts.values())))
        if self.progress is not None:
            self.progress(self.soak)


def change_tasks(soak: Soak, turn: int, url: str, sources: Path, folder: Path) -> None:
    """One change: a task is added or removed by a request, or added, removed or replaced in the folder."""
    match turn % 6:
        case 0:
            _post(soak, url, "/v1/load_lora_adapter", {"lora_name": "guest", "lora_path": "guest"})
        case 1:
            export_adapter(sources / "beta", folder, name="visitor")
        case 2 | 5:
            export_adapter(sources / ("beta" if turn % 6 == 2 else "alpha"), folder, name="swap", replace=True)
        case 3:
            _post(soak, url, "/v1/unload_lora_adapter", {"lora_name": "guest"})
        case 4:
            remove_task(folder, "visitor")
    names = ("added", "exported", "replaced", "unloaded", "removed", "replaced")
    soak.changes[names[turn % 6]] += 1


def _post(soak: Soak, url: str, path: str, body: dict[str, str]) -> None:
    answer = httpx.post(url + path, json=body, timeout=30)
    if answer.status_code != 200:
        soak.wrong.append(f"{path}: {answer.status_code} {answer.text[:200]}")


def settle(soak: Soak, url: str, seconds: float = 10) -> None:
    """All slots must be free soon after the last client has gone."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        lines = httpx.get(url + "/metrics", timeout=30).text.splitlines()
        names = ("adalink_requests_running", "adalink_requests_waiting")
        load = dict(line.split() for line in lines if line.startswith(names))
        if not any(map(float, load.values())):
            return
        time.sleep(0.1)
    soak.wrong.append(f"slots were lost: {load}")


class _Clients:
    """A process of clients; its report is a line of JSON a second."""

    def __init__(self, url: str, work: Path, threads: int, rng: random.Random) -> None:
        settings = {"url": url, "expected": str(work / "expected.json"), "threads": threads, "seed": rng.random()}
        settings |= {"tokens": TOKENS, "guests": GUESTS}
        self._report = work / f"clients-{time.monotonic_ns()}.jsonl"
        command = [sys.executable, "-m", "fuzz.soak_clients", json.dumps(settings), str(self._report)]
        self._process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
        self._read = 0

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(60)

    def reports(self) -> list[dict[str, Any]]:
        """Reports since the last call; a line that the kill cut short is left out."""
        lines = self._report.read_text().split("\n")[:-1] if self._report.exists() else []
        found = [json.loads(line) for line in lines[self._read :]]
        self._read = len(lines)
        return found


def _collect(soak: Soak, processes: list[_Clients]) -> None:
    for process in processes:
        for report in process.reports():
            soak.counts.update(report["counts"])
            soak.wrong.extend(report["wrong"])


def resident_kb(pid: int) -> int:
    """Resident memory of a process in kB, as Linux says it; elsewhere 0."""
    path = Path(f"/proc/{pid}/status")
    if os.name != "posix" or not path.exists():
        return 0
    return int(next(line for line in path.read_text().splitlines() if line.startswith("VmRSS")).split()[1])
