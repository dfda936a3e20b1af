"""llama.cpp's server with the tasks as LoRAs of the token embedding; run in the environment of the peers.

python -m benchmarks.serving.llama_cpp make --model GGUF --adapters DIR --out DIR    F32 and Q4_0 models, LoRAs
python -m benchmarks.serving.llama_cpp serve --model GGUF [--lora FILE …]            prints its address as JSON
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np


def main() -> None:
    """Run one of the two commands."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make")
    make.add_argument("--model", type=Path, required=True)
    make.add_argument("--adapters", type=Path, required=True, help="an .npz with down and up of each task")
    make.add_argument("--out", type=Path, required=True)
    serve = commands.add_parser("serve")
    serve.add_argument("--model", type=Path, required=True)
    serve.add_argument("--lora", type=Path, nargs="*", default=[])
    serve.add_argument("--slots", type=int, default=16)
    serve.add_argument("--threads", type=int, default=2)
    serve.add_argument("--context", type=int, default=2048)
    options = parser.parse_args()
    if options.command == "make":
        make_models(options.model, options.adapters, options.out)
    else:
        run_server(options)


def make_models(source: Path, adapters: Path, out: Path) -> None:
    """Write the checkpoint in F32 and Q4_0, and the tasks as LoRAs.

    The head has weights of its own in both: llama.cpp applies a LoRA of the token embedding to a tied head as well.
    """
    import gguf

    reader = gguf.GGUFReader(source)
    out.mkdir(parents=True, exist_ok=True)
    kinds = gguf.GGMLQuantizationType
    table = None
    for name, kind in (("f32", kinds.F32), ("q4_0", kinds.Q4_0)):
        writer = gguf.GGUFWriter(out / f"{name}.gguf", "llama")
        for key, entry in reader.fields.items():
            if not key.startswith("GGUF.") and key not in ("general.architecture", "general.file_type"):
                value_type, *inner = entry.types
                writer.add_key_value(key, entry.contents(), value_type, inner[-1] if inner else None)
        for tensor in reader.tensors:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            add(writer, tensor.name, values, kind)
            if tensor.name == "token_embd.weight":
                table = values
                add(writer, "output.weight", values, kinds.F32 if kind == kinds.F32 else kinds.Q8_0)
        finish(writer)
    assert table is not None
    with np.load(adapters) as weights:
        for number in range(len(weights.files) // 2):
            write_lora(out / f"lora-{number}.gguf", table, weights[f"down-{number}"], weights[f"up-{number}"])


def write_lora(path: Path, table: np.ndarray, down: np.ndarray, up: np.ndarray) -> None:
    """A task with gelu as a LoRA of the token embedding: row ``id`` of A is ``gelu(down E[id])``, B is ``up``."""
    import gguf

    inner = (table @ down.T).astype(np.float64)
    erf = np.vectorize(math.erf, otypes=[np.float64])
    rows = (inner * 0.5 * (1 + erf(inner / math.sqrt(2)))).astype(np.float32)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(len(down)))
    writer.add_tensor("token_embd.weight.lora_a", rows)
    writer.add_tensor("token_embd.weight.lora_b", np.ascontiguousarray(up, np.float32))
    finish(writer)


def add(writer: Any, name: str, values: np.ndarray, kind: Any) -> None:
    """Add a tensor; vectors stay float32."""
    import gguf

    if values.ndim < 2 or kind == gguf.GGMLQuantizationType.F32:
        writer.add_tensor(name, values)
    else:
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)


def finish(writer: Any) -> None:
    """Write everything and close the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def run_server(options: argparse.Namespace) -> None:
    """Serve until standard input ends."""
    import xllamacpp  # pyright: ignore[reportMissingImports]  # in the peers' environment alone

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(options.model)
    parameters.n_parallel, parameters.n_ctx = options.slots, options.slots * options.context
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = options.threads
    parameters.hostnames, parameters.port = ["127.0.0.1"], 0
    parameters.cache_prompt, parameters.warmup, parameters.verbosity = False, True, 0
    if options.lora:
        adapters = []
        for path in options.lora:
            adapter = xllamacpp.CommonAdapterLoraInfo(str(path), 1.0)
            adapters.append(adapter)
        parameters.lora_adapters = adapters
        parameters.lora_init_without_apply = True
    server = xllamacpp.Server(parameters)
    print(json.dumps({"url": server.listening_address}), flush=True)
    sys.stdin.read()
    del server
    time.sleep(0.1)


if __name__ == "__main__":
    main()
