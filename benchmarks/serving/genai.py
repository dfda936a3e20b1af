"""onnxruntime-genai, a process a task, behind one address; run in the environment of the peers.

python -m benchmarks.serving.genai serve --model DIR --tasks 16    prints its address as JSON
python -m benchmarks.serving.genai task --model DIR                one task: a request a line in, a token a line out

onnxruntime-genai has no server, and one batch has one set of weights. So each task is a process with its own model.
Every process loads the same files here: how fast it is does not depend on the values in the table of embeddings.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from asyncio.subprocess import PIPE, Process
from pathlib import Path
from typing import Any


def main() -> None:
    """Run one of the two commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("serve", "task"):
        command = commands.add_parser(name)
        command.add_argument("--model", type=Path, required=True, help="what onnxruntime-genai's own builder made")
        command.add_argument("--threads", type=int, default=2)
    commands.choices["serve"].add_argument("--tasks", type=int, required=True)
    options = parser.parse_args()
    if options.command == "task":
        run_task(options.model, options.threads)
    else:
        asyncio.run(serve(options.model, options.threads, options.tasks))


def run_task(folder: Path, threads: int) -> None:
    """Answer requests of standard input, ``{"prompt", "max_tokens"}`` a line, with a line for each token."""
    import onnxruntime_genai as og  # pyright: ignore[reportMissingImports]  # in the peers' environment alone

    config = og.Config(str(folder))
    # Waiting threads that spin would take the cores from the other processes.
    session = {"intra_op_num_threads": threads, "log_severity_level": 3, "session.intra_op.allow_spinning": "0"}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
    model = og.Model(config)
    tokenizer = og.Tokenizer(model)
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        ids = tokenizer.encode(request["prompt"])
        length = len(ids) + request["max_tokens"]
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = og.Generator(model, parameters)
        generator.append_tokens(ids)
        for _ in range(request["max_tokens"]):
            generator.generate_next_token()
            print(int(generator.get_next_tokens()[0]), flush=True)


async def serve(folder: Path, threads: int, tasks: int) -> None:
    """Serve streamed completions until standard input ends; ``model`` ends in the task's number."""
    command = [sys.executable, "-m", "benchmarks.serving.genai", "task", "--model", str(folder)]
    command += ["--threads", str(threads)]
    workers = [await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE) for _ in range(tasks)]
    turns = [asyncio.Lock() for _ in workers]
    for worker in workers:
        if await _line(worker) != b"ready\n":
            raise RuntimeError(f"a process of {folder} did not open its model")

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        size = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length:"))
        body = json.loads(await reader.readexactly(size))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
        number = int(body["model"].rpartition("-")[2])
        async with turns[number]:
            await _relay(workers[number], body, writer)
        writer.write(b"data: [DONE]\n\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    print(json.dumps({"url": f"http://{host}:{port}"}), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    for worker in workers:
        worker.kill()


async def _relay(worker: Process, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    assert worker.stdin is not None
    request = {"prompt": body["prompt"], "max_tokens": body["max_tokens"]}
    worker.stdin.write(json.dumps(request).encode() + b"\n")
    for _ in range(body["max_tokens"]):
        token = (await _line(worker)).decode().strip()
        writer.write(b"data: " + json.dumps({"choices": [{"text": token}]}).encode() + b"\n\n")


async def _line(worker: Process) -> bytes:
    assert worker.stdout is not None
    line = await worker.stdout.readline()
    if not line:
        raise RuntimeError("the process of a task ended")
    return line


if __name__ == "__main__":
    main()
