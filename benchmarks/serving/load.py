"""Load: users that send streamed completions to a server, and when each token came."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_READ_TIMEOUT_S = 300


@dataclass
class Answer:
    """One request's times, by ``time.perf_counter``.

    Attributes:
        sent: when it was sent.
        tokens: when each piece of text came.
        error: why it failed; ``None`` if it did not.
    """

    sent: float
    tokens: list[float] = field(default_factory=list)
    error: str | None = None


async def ask(address: tuple[str, int], body: Mapping[str, Any]) -> Answer:
    """Send one streamed completion and note when its pieces come; a failure is noted, not raised."""
    answer = Answer(time.perf_counter())
    try:
        reader, writer = await asyncio.open_connection(*address)
    except OSError as error:
        answer.error = str(error)
        return answer
    try:
        data = json.dumps({**body, "stream": True}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {address[0]}:{address[1]}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n"
        )
        writer.write(head.encode() + data)
        await writer.drain()
        status = await asyncio.wait_for(reader.readline(), _READ_TIMEOUT_S)
        if b" 200 " not in status:
            answer.error = status.decode(errors="replace").strip() or "no answer"
            return answer
        is_ended = False
        while line := await asyncio.wait_for(reader.readline(), _READ_TIMEOUT_S):
            if not line.startswith(b"data:"):
                continue
            payload = line[5:].strip()
            if payload == b"[DONE]":
                is_ended = True
                break
            event = json.loads(payload)
            if "error" in event:
                answer.error = str(event["error"])
                return answer
            if event.get("choices") and event["choices"][0].get("text"):
                answer.tokens.append(time.perf_counter())
        if not is_ended:
            answer.error = "the stream was cut"
    except (OSError, ValueError, asyncio.TimeoutError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    finally:
        writer.close()
    return answer


async def closed_loop(
    address: tuple[str, int], users: int, bodies: Sequence[Mapping[str, Any]]
) -> tuple[float, list[Answer]]:
    """Each user sends its next request when the one before has ended; returns the seconds taken, and the answers."""
    waiting = iter(bodies)
    answers: list[Answer] = []

    async def user() -> None:
        for body in waiting:
            answers.append(await ask(address, body))

    begun = time.perf_counter()
    await asyncio.gather(*(user() for _ in range(users)))
    return time.perf_counter() - begun, answers


async def open_loop(
    address: tuple[str, int], rate: float, bodies: Sequence[Mapping[str, Any]], seed: int
) -> tuple[float, list[Answer]]:
    """Requests arrive by themselves, ``rate`` a second on average (a Poisson process)."""
    rng = np.random.default_rng(seed)
    begun = time.perf_counter()
    running = []
    for body in bodies:
        await asyncio.sleep(float(rng.exponential(1 / rate)))
        running.append(asyncio.create_task(ask(address, body)))
    answers = await asyncio.gather(*running)
    return time.perf_counter() - begun, list(answers)


def summarise(seconds: float, answers: Sequence[Answer], new_tokens: int) -> dict[str, float]:
    """Figures of one run.

    Args:
        seconds: how long it took.
        answers: its answers.
        new_tokens: tokens of each complete answer.

    Returns:
        ``tok_s`` (tokens of complete answers a second), ``first_ms`` and ``between_ms`` with p50 and p99, ``errors``.
    """
    good = [answer for answer in answers if answer.error is None and answer.tokens]
    first = np.array([answer.tokens[0] - answer.sent for answer in good]) * 1000
    gaps = np.concatenate([np.diff(answer.tokens) for answer in good]) * 1000 if good else np.zeros(0)
    figures = {"tok_s": len(good) * new_tokens / seconds, "errors": float(len(answers) - len(good))}
    for name, values in (("first_ms", first), ("between_ms", gaps)):
        for percentile in (50, 99):
            figures[f"{name}_p{percentile}"] = float(np.percentile(values, percentile)) if len(values) else float("nan")
    return figures
