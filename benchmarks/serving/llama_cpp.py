"""llama.cpp's server with the tasks as LoRAs of the token embedding; run in the environment of the peers.

python -m benchmarks.serving.llama_cpp make --model GGUF --out DIR                   F32 and Q4_0 models
python -m benchmarks.serving.llama_cpp serve --model GGUF [--lora FILE …]            prints its address as JSON
"""

from __future__ import annotations

import argparse
import json
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
    make.add_argument("--out", type=Path, required=True)
    serve = commands.add_parser("serve")
    serve.add_argument("--model", type=Path, required=True)
    serve.add_argument("--lora", type=Path, nargs="*", default=[])
    serve.add_argument("--slots", type=int, default=16)
    serve.add_argument("--threads", type=int, default=2)
    serve.add_argument("--context", type=int, default=2048)
    serve.add_argument("--exact", action="store_true", help="keys and values in float32, and plain attention")
    options = parser.parse_args()
    if options.command == "make":
        make_models(options.model, options.out)
    else:
        run_server(options)


def make_models(source: Path, out: Path) -> None:
    """Write the checkpoint in F32 and Q4_0.

    The head has weights of its own in both: llama.cpp applies a LoRA of the token embedding to a tied head as well.
    """
    import gguf

    reader = gguf.GGUFReader(source)
    out.mkdir(parents=True, exist_ok=True)
    kinds = gguf.GGMLQuantizationType
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
                add(writer, "output.weight", values, kinds.F32 if kind == kinds.F32 else kinds.Q8_0)
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
    if options.exact:
        parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
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
