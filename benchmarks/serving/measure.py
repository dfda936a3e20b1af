"""What is measured of a server: users in a closed loop, requests that come by themselves, a long prompt that joins."""

from __future__ import annotations

import asyncio
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serving.load import Answer, ask, closed_loop, open_loop, summarise
from benchmarks.serving.prompts import LONG_PROMPT, mixed_prompts
from benchmarks.serving.servers import Server, memory_mb, running

TASKS, NEW_TOKENS, SLOTS = 16, 48, 16
USERS = (1, 4, 16)
# Times that the requests of one closed batch are sent at once; requests of a user.
_BURSTS, _PER_USER = 3, 2


def measure(server: Server, build: Path, *, is_quick: bool) -> dict[str, Any]:
    """Start a server, warm it up, and measure it.

    Args:
        server: the server.
        build: folder for its log.
        is_quick: one request a user, and no requests that come by themselves.

    Returns:
        ``users-N`` (the closed loop), ``poisson``, ``burst`` and ``one-task`` (tokens/s of the requests of one closed
        batch sent at once, of 16 tasks and of one), ``sixteen-over-one`` (the median of their ratios), ``long-prompt``
        and ``memory_mb``.

    Raises:
        MeasurementError: it does not start.
    """
    per_user = 1 if is_quick else _PER_USER
    prompts = mixed_prompts(USERS[-1] * per_user)
    figures: dict[str, Any] = {}
    with running(server, build / f"{server.name}.log") as (address, pid):
        # Every slot is used once, as memory costs most at its first use.
        warm = [server.body(prompt, index % TASKS, 4) for index, prompt in enumerate(prompts[:SLOTS])]
        asyncio.run(closed_loop(address, SLOTS, warm))
        for users in USERS:
            bodies = [
                server.body(prompt, index % TASKS, NEW_TOKENS)
                for index, prompt in enumerate(prompts[: max(2, users * per_user)])
            ]
            figures[f"users-{users}"] = summarise(*asyncio.run(closed_loop(address, users, bodies)), NEW_TOKENS)
        figures["memory_mb"] = memory_mb(pid)
        if server.tasks in ("model", None) and not is_quick:  # at the others' rates it would take most of the time
            rate = figures["users-16"]["tok_s"] / NEW_TOKENS * 0.6
            bodies = [server.body(prompt, index % TASKS, NEW_TOKENS) for index, prompt in enumerate(prompts)]
            figures["poisson"] = summarise(*asyncio.run(open_loop(address, rate, bodies, 1)), NEW_TOKENS)
            figures["poisson"]["rate"] = rate
        if server.tasks == "model":
            figures |= _bursts(server, address, prompts[:TASKS])
            asyncio.run(ask(address, server.body(LONG_PROMPT, 8, 2)))
            figures["long-prompt"] = asyncio.run(join_long_prompt(server, address, prompts))
        figures["memory_mb"] = memory_mb(pid)
    return figures


def _bursts(server: Server, address: tuple[str, int], prompts: list[str]) -> dict[str, float]:
    """Tokens/s of the requests of one closed batch, sent at once: the fastest, as for the closed batch."""
    speeds: dict[str, list[float]] = {"burst": [], "one-task": []}
    for _ in range(_BURSTS):
        for name, values in speeds.items():
            bodies = [
                server.body(prompt, index if name == "burst" else 0, NEW_TOKENS) for index, prompt in enumerate(prompts)
            ]
            seconds, answers = asyncio.run(closed_loop(address, len(bodies), bodies))
            values.append(summarise(seconds, answers, NEW_TOKENS)["tok_s"])
    return {name: max(values) for name, values in speeds.items()} | {
        "sixteen-over-one": statistics.median(
            mixed / single for mixed, single in zip(speeds["burst"], speeds["one-task"], strict=True)
        )
    }


async def join_long_prompt(server: Server, address: tuple[str, int], prompts: list[str]) -> dict[str, float]:
    """Times between tokens of 8 users while a prompt of about 1,000 tokens joins, and before."""
    running_users = [asyncio.create_task(ask(address, server.body(prompts[n], n, 160))) for n in range(8)]
    await asyncio.sleep(3)
    long: Answer = await ask(address, server.body(LONG_PROMPT, 8, 2))
    answers = await asyncio.gather(*running_users)
    end = long.tokens[0] if long.tokens else float("nan")
    gaps = {"before": [], "during": []}  # type: dict[str, list[float]]
    for answer in answers:
        for begun, ended in zip(answer.tokens, answer.tokens[1:], strict=False):
            if begun > long.sent - 2 and ended < long.sent:
                gaps["before"].append(ended - begun)
            elif ended > long.sent and begun < end:
                gaps["during"].append(ended - begun)
    result = {"errors": float(sum(answer.error is not None for answer in [*answers, long]))}
    result["first_ms"] = (end - long.sent) * 1000
    for name, values in gaps.items():
        for percentile in (50, 99):
            result[f"{name}_ms_p{percentile}"] = (
                float(np.percentile(values, percentile)) * 1000 if values else float("nan")
            )
    return result
