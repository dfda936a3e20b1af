"""Measure servers side by side on SmolLM2: requests of 16 tasks, prompts of mixed lengths, 48 new tokens each.

python -m benchmarks.serving --deployment DIR [--peers-python PYTHON] [--quick] [--out FILE]

Servers take turns, one at a time; every round starts each anew. A ratio is the median of the rounds' own ratios.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from adalink.runtime.storage.adapter import read_adapter
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.tools.common.environment import describe_environment
from adalink.tools.common.report_file import write_json
from benchmarks.prepare import copy_base, make_deployment, smollm2
from benchmarks.process import MeasurementError, run, run_json
from benchmarks.serving.load import Answer, ask, closed_loop, open_loop, summarise
from benchmarks.serving.prompts import LONG_PROMPT, mixed_prompts
from benchmarks.serving.servers import Server, kit, llama_cpp, memory_mb, running

TASKS, RANK, NEW_TOKENS, SLOTS = 16, 16, 48, 16
USERS = (1, 4, 16)
# Weights so small that texts stay English: draft tokens are then as often right as in use.
SCALE = 0.02


def main() -> None:
    """Prepare, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deployment", type=Path, required=True, help="has the base in float32, as the demo makes it")
    parser.add_argument("--model", type=Path, help="the same checkpoint as a GGUF file; SmolLM2 without it")
    parser.add_argument("--peers-python", type=Path, help="Python with xllamacpp and gguf; without it the kit alone")
    parser.add_argument("--build", type=Path, default=Path("build/bench/serving"))
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--quick", action="store_true", help="one short round: of the other servers only how fast they are"
    )
    options = parser.parse_args()
    rounds = 1 if options.quick else options.rounds
    options.model = options.model or Path(smollm2())
    servers = prepare(options)
    measured: dict[str, list[dict[str, Any]]] = {server.name: [] for server in servers}
    closed: dict[str, list[float]] = {"fp32": [], "int4": []}
    for number in range(rounds):
        for server in servers if number % 2 == 0 else servers[::-1]:
            say(f"round {number + 1} of {rounds}: {server.label}")
            try:
                measured[server.name].append(measure(server, options.build, is_quick=options.quick))
                write_json(options.build / "measured.json", measured)  # of a run that is interrupted
            except MeasurementError as error:
                say(f"  not measured: {error}")
        for name, variant in (("fp32", "onnxruntime-cpu"), ("int4", "int4")):
            closed[name].append(closed_batch(options.build, variant))
    report = {
        "date": date.today().isoformat(),
        "command": "python -m benchmarks.serving " + ("--quick" if options.quick else f"--rounds {rounds}"),
        "environment": describe_environment(),
        "setting": {"tasks": TASKS, "rank": RANK, "new_tokens": NEW_TOKENS, "slots": SLOTS, "rounds": rounds},
        "labels": {server.name: server.label for server in servers},
        "servers": measured,
        "closed_batch_tok_s": closed,
        "ratios": ratios(measured, closed),
    }
    if options.out:
        write_json(options.out, report)
    show(report)


def prepare(options: argparse.Namespace) -> list[Server]:
    """Make what the servers run; returns them."""
    build: Path = options.build
    deployment, models = build / "deployment", build / "llama.cpp"
    if not deployment.is_dir():
        say("making a deployment of 16 tasks, and its base in 4 bits")
        base = build / "base"
        copy_base(options.deployment, base)
        if "int4" not in read_manifest(base).variants:
            export = [sys.executable, "-m", "adalink.tools", "export", "base", options.model, "--out", base]
            run([*export, "--quantize", "int4"], 600, build / "int4.log")
        make_deployment(base, deployment, [RANK] * TASKS, SCALE)
    servers = [
        Server("kit-fp32", "AdaLink Kit, float32", kit(deployment, "onnxruntime-cpu", SLOTS), "model"),
        Server("kit-int4", "AdaLink Kit, int4", kit(deployment, "int4", SLOTS), "model"),
    ]
    if options.peers_python is None:
        return servers
    if not (models / f"lora-{TASKS - 1}.gguf").is_file():
        say("making the models of llama.cpp")
        adapters = build / "adapters.npz"
        np.savez(adapters, allow_pickle=False, **adapter_weights(deployment))
        source = options.model if options.model.is_file() else next(options.model.glob("*.gguf"))
        make = [options.peers_python, "-m", "benchmarks.serving.llama_cpp", "make", "--model", source]
        run([*make, "--adapters", adapters.resolve(), "--out", models.resolve()], 600, build / "make.log")
    for name, label in (("f32", "llama.cpp, F32"), ("q4_0", "llama.cpp, Q4_0")):
        for loras, suffix in ((TASKS, ", 16 LoRAs"), (0, ", no adapter")):
            command = llama_cpp(options.peers_python, models.resolve(), name, loras, SLOTS)
            key = f"llama-{name}{'-lora' if loras else ''}"
            servers.append(Server(key, label + suffix, command, "lora" if loras else None))
    return servers


def adapter_weights(deployment: Path) -> dict[str, Any]:
    """Weights of all tasks, by number."""
    weights = {}
    for number, name in enumerate(sorted(read_manifest(deployment).tasks)):
        adapter = read_adapter(deployment / "tasks" / name)
        weights[f"down-{number}"] = adapter.weights["text.down.weight"]
        weights[f"up-{number}"] = adapter.weights["text.up.weight"]
    return weights


def measure(server: Server, build: Path, *, is_quick: bool) -> dict[str, Any]:
    """Start a server and measure it with 1, 4 and 16 users, requests that come by themselves, and a long prompt."""
    per_user = 1 if is_quick else 4
    prompts = mixed_prompts(USERS[-1] * per_user)
    figures: dict[str, Any] = {}
    with running(server, build / f"{server.name}.log") as (address, pid):
        warm = [server.body(prompts[0], 0, 4)]
        asyncio.run(closed_loop(address, 1, warm))
        for users in USERS:
            bodies = [
                server.body(prompt, index % TASKS, NEW_TOKENS)
                for index, prompt in enumerate(prompts[: max(2, users * per_user)])
            ]
            figures[f"users-{users}"] = summarise(*asyncio.run(closed_loop(address, users, bodies)), NEW_TOKENS)
        figures["memory_mb"] = memory_mb(pid)
        if is_quick and server.tasks != "model":
            return figures  # others take minutes for the rest
        if server.tasks is not None:
            same = [server.body(prompt, 0, NEW_TOKENS) for prompt in prompts]
            figures["one-task-16"] = summarise(*asyncio.run(closed_loop(address, USERS[-1], same)), NEW_TOKENS)
        rate = figures["users-16"]["tok_s"] / NEW_TOKENS * 0.6
        bodies = [server.body(prompt, index % TASKS, NEW_TOKENS) for index, prompt in enumerate(prompts)]
        figures["poisson"] = summarise(*asyncio.run(open_loop(address, max(rate, 0.05), bodies, 1)), NEW_TOKENS)
        figures["poisson"]["rate"] = rate
        figures["long-prompt"] = asyncio.run(join_long_prompt(server, address, prompts))
        figures["memory_mb"] = memory_mb(pid)
    return figures


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


def closed_batch(build: Path, variant: str) -> float:
    """Tokens/s of the closed batch of 16 prompts; NaN if it cannot be measured."""
    deployment = build / "deployment"
    bodies = [{"prompt": prompt, "model": f"task-{n:05}"} for n, prompt in enumerate(mixed_prompts(TASKS))]
    requests = build / "requests.json"
    requests.write_text(json.dumps(bodies), encoding="utf-8")
    command = [sys.executable, "-m", "benchmarks.serving.closed_batch", deployment.resolve(), "--variant", variant]
    command += ["--requests", requests.resolve(), "--new-tokens", str(NEW_TOKENS)]
    try:
        return float(run_json(command, 600, build / "closed.log")["tok_s"])  # type: ignore[arg-type]
    except MeasurementError as error:
        say(f"  closed batch not measured: {error}")
        return float("nan")


def ratios(measured: dict[str, list[dict[str, Any]]], closed: dict[str, list[float]]) -> dict[str, float]:
    """Medians of the rounds' own ratios."""

    def speeds(name: str, part: str) -> list[float]:
        return [figures[part]["tok_s"] for figures in measured.get(name, []) if part in figures]

    def median(above: list[float], below: list[float]) -> float:
        pairs = [top / bottom for top, bottom in zip(above, below, strict=False) if bottom]
        return statistics.median(pairs) if pairs else float("nan")

    result = {}
    for own, other in (("fp32", "f32"), ("int4", "q4_0")):
        for users in (1, 16):
            ours = speeds(f"kit-{own}", f"users-{users}")
            result[f"{own}: {users} users over llama.cpp with LoRAs"] = median(
                ours, speeds(f"llama-{other}-lora", f"users-{users}")
            )
            result[f"{own}: {users} users over llama.cpp without"] = median(
                ours, speeds(f"llama-{other}", f"users-{users}")
            )
        ours = speeds(f"kit-{own}", "users-16")
        result[f"{own}: 16 tasks over one task"] = median(ours, speeds(f"kit-{own}", "one-task-16"))
        result[f"{own}: server over closed batch"] = median(ours, closed[own])
    return result


def show(report: dict[str, Any]) -> None:
    """Print the table and the ratios."""
    print(f"\n{'server':32} {'1 user':>8} {'4 users':>8} {'16 users':>8} {'first ms':>9} {'between':>8} {'MB':>7}")
    for name, rounds in report["servers"].items():
        if rounds:
            speeds = [statistics.median(figures[f"users-{users}"]["tok_s"] for figures in rounds) for users in USERS]
            first = statistics.median(figures["users-16"]["first_ms_p50"] for figures in rounds)
            between = statistics.median(figures["users-16"]["between_ms_p50"] for figures in rounds)
            memory = statistics.median(figures["memory_mb"] for figures in rounds)
            numbers = " ".join(f"{speed:8.1f}" for speed in speeds)
            print(f"{report['labels'][name]:32} {numbers} {first:9.0f} {between:8.1f} {memory:7.0f}")
    for name, value in report["ratios"].items():
        print(f"{name:48} {value:6.2f}")


def say(text: str) -> None:
    """Report progress."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
