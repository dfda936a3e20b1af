"""Make what the peers run, all from one checkpoint.

    python -m benchmarks.peers.make_models --model GGUF --out DIR [NAME …].

hf              the checkpoint as a Hugging Face folder, float32
lora            LoRA adapters of PEFT, rank 16, on every linear layer of the blocks; seeded, not trained: speed and
                size do not depend on the values
lora-attention  the same on the four projections of the attention only
genai-fp32, genai-int4            onnxruntime-genai's own builder, without adapters
genai-fp32-lora, genai-int4-lora  the same, LoRA weights as inputs of the graph; each adapter as .onnx_adapter
merged          one whole model for each of three adapters: merged by PEFT, then built as genai-fp32 is

Each folder is written beside and renamed in, so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

RANK = 16
# Two to switch between; the others show the memory of a further one.
ADAPTERS = 6
MERGED = 3
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
# Size of the seeded LoRA weights: the outputs change visibly and stay finite.
_SCALE = 0.05


def make_hf(out: Path, source: Path) -> None:
    """The checkpoint as a float32 Hugging Face folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {}
    folder = source
    if source.is_file():
        folder, options = source.parent, {"gguf_file": source.name}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    # It is float32 now: what the file was stored as must not be taken for what these weights are.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder, **options).save_pretrained(out)


def make_lora(out: Path, models: Path, targets: list[str], count: int) -> None:
    """Seeded LoRA adapters in ``out/0`` to ``out/count - 1``."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(models / "hf", dtype=torch.float32)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    for index in range(count):
        generator = torch.Generator().manual_seed(index)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(_SCALE * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(str(out / str(index)))


def build(out: Path, model: Path, precision: str, adapter: Path | None = None) -> None:
    """Run onnxruntime-genai's own builder for the CPU; the generation does not end at an end token."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", model, "-o", out, "-p", precision]
    command += ["-e", "cpu", "-c", out / "cache"]
    if adapter is not None:
        command += ["--extra_options", f"adapter_path={adapter}"]
    subprocess.run([str(word) for word in command], stdout=sys.stderr, check=True)
    shutil.rmtree(out / "cache", ignore_errors=True)


def build_lora(out: Path, models: Path, precision: str) -> None:
    """Build with an adapter, turn its weights into inputs, and write every adapter as a file of its own."""
    import onnx

    build(out, models / "hf", precision, models / "lora/0")
    model = onnx.load(out / "model.onnx")
    names = free_lora_weights(model.graph)
    for file in out.glob("model.onnx*"):
        file.unlink()
    onnx.save(model, out / "model.onnx", save_as_external_data=True, location="model.onnx.data")
    for index in range(ADAPTERS):
        write_adapter(models / f"lora/{index}", out / f"{index}.onnx_adapter", names)


def free_lora_weights(graph: Any) -> list[str]:
    """Make the LoRA weights of an ONNX graph its inputs: empty (rank 0, no effect) unless an adapter feeds them.

    Where the builder quantised them too, they become float32 again, as adapters are used over a quantised base.

    Returns:
        Their names.
    """
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    names = []
    for node in graph.node:
        if "lora_" not in node.name or node.op_type not in ("MatMul", "MatMulNBits"):
            continue
        weight = next(weight for weight in graph.initializer if weight.name == node.input[1])
        if node.op_type == "MatMulNBits":
            sizes = {attribute.name: attribute.i for attribute in node.attribute}
            shape, dropped = [sizes["K"], sizes["N"]], set(node.input[1:])
            product = helper.make_node(
                "MatMul", [node.input[0], node.input[1].removesuffix("_Q4")], list(node.output), node.name
            )
            node.CopyFrom(product)
        else:
            shape, dropped = list(weight.dims), {weight.name}
        for index in reversed(range(len(graph.initializer))):
            if graph.initializer[index].name in dropped:
                del graph.initializer[index]
        name = node.input[1]
        names.append(name)
        rank_axis = 1 if ".lora_A." in name else 0
        shape[rank_axis] = 0
        graph.initializer.append(numpy_helper.from_array(np.zeros(shape, np.float32), name))
        declared = [*shape]
        declared[rank_axis] = "rank"
        graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, declared))
    # Shapes that name the old rank would contradict the new inputs.
    del graph.value_info[:]
    return names


def write_adapter(lora: Path, out: Path, names: list[str]) -> None:
    """Write a PEFT adapter as an ``.onnx_adapter`` file for the inputs ``names``."""
    import numpy as np
    import onnxruntime
    from safetensors.numpy import load_file

    weights = load_file(lora / "adapter_model.safetensors")
    config = json.loads((lora / "adapter_config.json").read_text(encoding="utf-8"))
    scaling = config["lora_alpha"] / config["r"]
    parameters = {}
    for name in names:
        layer, part, linear = _parts_of(name)
        (key,) = [key for key in weights if f".layers.{layer}." in key and f".{linear}.lora_{part}." in key]
        # PyTorch holds (out, in); a MatMul takes (in, out). The builder puts PEFT's scaling into B.
        value = weights[key].T * (scaling if part == "B" else 1.0)
        parameters[name] = onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value, np.float32))
    adapter = onnxruntime.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    adapter.set_parameters(parameters)
    adapter.export_adapter(str(out))


def _parts_of(name: str) -> tuple[int, str, str]:
    layer = re.search(r"layers\.(\d+)\.", name)
    part = re.search(r"\.lora_([AB])\.", name)
    linear = next((linear for linear in LINEAR if linear in name), None)
    if layer is None or part is None or linear is None:
        raise ValueError(f"{name} does not look like a LoRA weight that the builder named")
    return int(layer[1]), part[1], linear


def make_merged(out: Path, models: Path) -> None:
    """A whole model for each of ``MERGED`` adapters."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for index in range(MERGED):
        base = AutoModelForCausalLM.from_pretrained(models / "hf", dtype=torch.float32)
        merged = PeftModel.from_pretrained(base, str(models / f"lora/{index}")).merge_and_unload()
        folder = out / f"hf-{index}"
        merged.save_pretrained(folder)
        AutoTokenizer.from_pretrained(models / "hf").save_pretrained(folder)
        build(out / str(index), folder, "fp32")
        shutil.rmtree(folder)


# Which folders each is made from.
MADE_FROM: dict[str, tuple[str, ...]] = {
    "hf": (),
    "lora": ("hf",),
    "lora-attention": ("hf",),
    "genai-fp32": ("hf",),
    "genai-int4": ("hf",),
    "genai-fp32-lora": ("hf", "lora"),
    "genai-int4-lora": ("hf", "lora"),
    "merged": ("hf", "lora"),
}


def recipes(models: Path, source: Path) -> dict[str, Callable[[Path], None]]:
    """Name of each folder, and what makes it."""
    return {
        "hf": lambda out: make_hf(out, source),
        "lora": lambda out: make_lora(out, models, LINEAR, ADAPTERS),
        "lora-attention": lambda out: make_lora(out, models, ATTENTION, ADAPTERS),
        "genai-fp32": lambda out: build(out, models / "hf", "fp32"),
        "genai-int4": lambda out: build(out, models / "hf", "int4"),
        "genai-fp32-lora": lambda out: build_lora(out, models, "fp32"),
        "genai-int4-lora": lambda out: build_lora(out, models, "int4"),
        "merged": lambda out: make_merged(out, models),
    }


def in_order(names: Iterable[str]) -> list[str]:
    """The folders and those that they are made from, which come first."""
    ordered: dict[str, None] = {}
    for name in names:
        ordered |= dict.fromkeys([*in_order(MADE_FROM[name]), name])
    return list(ordered)


def main() -> None:
    """Make the folders that are asked for and are not there, and what they are made from."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="GGUF file or Hugging Face folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("names", nargs="*", help="all of them by default")
    arguments = parser.parse_args()
    makers = recipes(arguments.out, arguments.model)
    for name in in_order(arguments.names or makers):
        final, staging = arguments.out / name, arguments.out / f".{name}"
        if final.is_dir():
            continue
        print(f"making {name}", file=sys.stderr, flush=True)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        makers[name](staging)
        staging.rename(final)


if __name__ == "__main__":
    main()
