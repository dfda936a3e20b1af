"""Measure servers side by side on SmolLM2: requests of 16 tasks, prompts of mixed lengths, 48 new tokens each.

python -m benchmarks.serving --deployment DIR [--peers-python PYTHON] [--quick] [--out FILE]

Servers take turns, one at a time; every round starts each anew. A ratio is the median of the rounds' own ratios.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from datetime import date
from pathlib import Path
from typing import Any

from adalink.export.lora.base import base_of_deployment
from adalink.export.lora.export import export_lora
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.tools.common.environment import describe_environment
from adalink.tools.common.report_file import write_json
from benchmarks.prepare import copy_base, make_deployment, smollm2
from benchmarks.process import MeasurementError, run, run_json
from benchmarks.serving.measure import NEW_TOKENS, SLOTS, TASKS, measure
from benchmarks.serving.prompts import mixed_prompts
from benchmarks.serving.report import ratios, show
from benchmarks.serving.servers import Server, genai, kit, llama_cpp

RANK = 16
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
    parser.add_argument("--servers", nargs="+", metavar="NAME", help="these alone, as the results name them")
    options = parser.parse_args()
    rounds = 1 if options.quick else options.rounds
    options.model = options.model or next(Path(smollm2()).glob("*.gguf"))
    servers = [server for server in prepare(options) if options.servers is None or server.name in options.servers]
    measured: dict[str, list[dict[str, Any]]] = {server.name: [] for server in servers}
    closed: dict[str, list[float]] = {"fp32": [], "int4": []}
    for number in range(rounds):
        for server in servers if number % 2 == 0 else servers[::-1]:
            say(f"round {number + 1} of {rounds}: {server.label}")
            try:
                measured[server.name].append(measure(server, options.build, is_quick=options.quick))
                write_json(options.build / "measured.json", _finite(measured))  # of a run that is interrupted
            except MeasurementError as error:
                say(f"  not measured: {error}")
        for name, variant in (("fp32", "onnxruntime-cpu"), ("int4", "int4")):
            if f"kit-{name}" in measured:
                closed[name].append(closed_batch(options.build, variant))
    report = {
        "date": date.today().isoformat(),
        "command": " ".join(
            ["python -m benchmarks.serving", "--quick" if options.quick else f"--rounds {rounds}"]
            + (["--servers", *options.servers] if options.servers else [])
        ),
        "environment": describe_environment(),
        "setting": {
            "tasks": TASKS,
            "rank": RANK,
            "new_tokens": NEW_TOKENS,
            "slots": SLOTS,
            "threads": os.cpu_count(),
            "rounds": rounds,
        },
        "labels": {server.name: server.label for server in servers},
        "servers": measured,
        "closed_batch_tok_s": closed,
        "ratios": ratios(measured, closed),
    }
    if options.out:
        write_json(options.out, _finite(report))
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
        make = [options.peers_python, "-m", "benchmarks.serving.llama_cpp", "make", "--model", options.model]
        run([*make, "--out", models.resolve()], 600, build / "make.log")
        make_loras(deployment, models)
    for name, label in (("f32", "llama.cpp, F32"), ("q4_0", "llama.cpp, Q4_0")):
        for loras, suffix in ((TASKS, ", 16 LoRAs"), (0, ", no adapter")):
            command = llama_cpp(options.peers_python, models.resolve(), name, loras, SLOTS)
            key = f"llama-{name}{'-lora' if loras else ''}"
            servers.append(Server(key, label + suffix, command, "lora" if loras else None))
    return [*servers, *genai_servers(options)]


def genai_servers(options: argparse.Namespace) -> list[Server]:
    """Make the models of onnxruntime-genai; returns a server for each that could be made."""
    folder: Path = options.build / "genai"
    servers = []
    for precision in ("fp32", "int4"):
        name = f"genai-{precision}"
        make = [options.peers_python, "-m", "benchmarks.peers.make_models", "--model", options.model, "--out", folder]
        try:
            run([*make, name], 900, options.build / f"{name}-make.log")
        except MeasurementError as error:
            say(f"  {name} could not be made: {error}")
            continue
        command = genai(options.peers_python, (folder / name).resolve(), TASKS)
        servers.append(Server(name, f"onnxruntime-genai, {precision}, {TASKS} processes", command, "process"))
    return servers


def make_loras(deployment: Path, out: Path) -> None:
    """Write all tasks as LoRAs for llama.cpp, by number."""
    base = base_of_deployment(deployment)
    for number, name in enumerate(sorted(read_manifest(deployment).tasks)):
        export_lora(deployment / "tasks" / name, base, out / f"lora-{number}.gguf", "gguf", replace=True)


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


def _finite(value: Any) -> Any:
    """The same with ``None`` for what was not measured."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def say(text: str) -> None:
    """Report progress."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
