"""Servers under test: how each is started and asked, one at a time."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.process import REPOSITORY, MeasurementError

START_TIMEOUT_S = 120


@dataclass(frozen=True)
class Server:
    """One server.

    Attributes:
        name: key in the results.
        label: for tables.
        command: starts it; it prints its address as JSON, and ends when its standard input does or when terminated.
        tasks: ``"model"`` if a request names its task as the model, ``"process"`` if so and each task is a process of
            its own, ``"lora"`` if as llama.cpp's LoRA, ``None`` for the base alone.
    """

    name: str
    label: str
    command: tuple[str, ...]
    tasks: str | None

    def body(self, prompt: str, task: int, new_tokens: int) -> dict[str, Any]:
        """A request for exactly ``new_tokens`` tokens, chosen greedily."""
        body: dict[str, Any] = {"prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "model": "base"}
        if self.tasks in ("model", "process"):
            return {**body, "model": f"task-{task:05}"}
        body |= {"ignore_eos": True, "cache_prompt": False}
        if self.tasks == "lora":
            body["lora"] = [{"id": task, "scale": 1.0}]
        return body


@contextmanager
def running(server: Server, log: Path) -> Iterator[tuple[tuple[str, int], int]]:
    """Start a server; gives its address and process id, and ends it afterwards.

    Raises:
        MeasurementError: it does not start.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            server.command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        watchdog = threading.Timer(START_TIMEOUT_S, process.kill)
        watchdog.start()
        try:
            address = _address(process, log)
            watchdog.cancel()
            yield address, process.pid
        finally:
            watchdog.cancel()
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _address(process: subprocess.Popen[str], log: Path) -> tuple[str, int]:
    assert process.stdout is not None
    for line in process.stdout:
        try:
            message = json.loads(line)
        except ValueError:
            continue
        if isinstance(message, Mapping) and "url" in message:
            parts = urlsplit(message["url"])
            assert parts.hostname is not None
            assert parts.port is not None
            return parts.hostname, parts.port
    raise MeasurementError(f"{process.args!r} ended before it listened; see {log}")


def memory_mb(pid: int) -> float:
    """Memory in MB of a process and those that it started, shared pages once; NaN where the system does not tell."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return float("nan")
    own = next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("Pss:")), float("nan"))
    return own + sum(memory_mb(int(child)) for child in children)


def kit(deployment: Path, variant: str, slots: int) -> tuple[str, ...]:
    """The command of the kit's server."""
    options = ("--variant", variant, "--slots", str(slots), "--context", "2048", "--port", "0", "--json")
    return (sys.executable, "-m", "adalink.tools", "serve", str(deployment), *options)


def llama_cpp(python: Path, models: Path, name: str, loras: int, slots: int) -> tuple[str, ...]:
    """The command of llama.cpp's server with so many LoRAs."""
    command = [str(python), "-m", "benchmarks.serving.llama_cpp", "serve", "--model", str(models / f"{name}.gguf")]
    command += ["--slots", str(slots)]
    command += ["--lora", *(str(models / f"lora-{n}.gguf") for n in range(loras))] if loras else []
    return tuple(command)


def genai(python: Path, model: Path, tasks: int) -> tuple[str, ...]:
    """The command of onnxruntime-genai, a process a task."""
    command = [str(python), "-m", "benchmarks.serving.genai", "serve", "--model", str(model), "--tasks", str(tasks)]
    return tuple(command)
