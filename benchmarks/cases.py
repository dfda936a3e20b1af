"""The cases of the benchmark: each is one script in one process."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One peer in one form.

    Attributes:
        name: key in the results.
        label: for tables and plots.
        module: script under ``benchmarks.peers``.
        kind: the script's ``--kind``.
        environment: ``"kit"``, or ``"peers"`` with its own packages.
        precision: of the base.
        needs: folders of make_models.py.
        without: the case that is the same without an adapter, to tell what one costs.
        is_slow: measured in every third round only; so is the case it is compared with.
    """

    name: str
    label: str
    module: str
    kind: str
    environment: str
    precision: str = "fp32"
    needs: tuple[str, ...] = ()
    without: str | None = None
    is_slow: bool = False


CASES = (
    Case("kit", "AdaLink Kit, base model", "adalink_kit", "base", "kit"),
    Case("kit-task", "AdaLink Kit, task active", "adalink_kit", "task", "kit", without="kit"),
    Case("genai", "onnxruntime-genai", "genai", "fp32", "peers", needs=("genai-fp32",)),
    Case(
        "genai-lora",
        "onnxruntime-genai, LoRA active",
        "genai",
        "fp32-lora",
        "peers",
        needs=("lora", "genai-fp32-lora"),
        without="genai",
    ),
    Case("ort", "ONNX Runtime, genai's graph", "onnxruntime_lora", "base", "peers", needs=("genai-fp32",)),
    Case(
        "ort-lora",
        "ONNX Runtime, LoraAdapter active",
        "onnxruntime_lora",
        "lora",
        "peers",
        needs=("lora", "genai-fp32-lora"),
        without="ort",
    ),
    Case(
        "merged",
        "ONNX Runtime, merged engine a task",
        "onnxruntime_lora",
        "merged",
        "peers",
        needs=("lora", "merged"),
        without="ort",
    ),
    Case("torch", "PyTorch eager", "pytorch", "base", "kit", needs=("hf",), is_slow=True),
    Case(
        "torch-adalink",
        "PyTorch eager, AdaLink",
        "pytorch",
        "adalink",
        "kit",
        needs=("hf",),
        without="torch",
        is_slow=True,
    ),
    Case(
        "peft",
        "PEFT LoRA, all linear",
        "peft_lora",
        "lora",
        "peers",
        needs=("hf", "lora"),
        without="torch",
        is_slow=True,
    ),
    Case(
        "peft-attention",
        "PEFT LoRA, attention",
        "peft_lora",
        "lora-attention",
        "peers",
        needs=("hf", "lora-attention"),
        without="torch",
        is_slow=True,
    ),
    Case("kit-int4", "AdaLink Kit int4, base model", "adalink_kit", "int4-base", "kit", "int4"),
    Case(
        "kit-int4-task",
        "AdaLink Kit int4, task active",
        "adalink_kit",
        "int4-task",
        "kit",
        "int4",
        without="kit-int4",
    ),
    Case("genai-int4", "onnxruntime-genai int4", "genai", "int4", "peers", "int4", needs=("genai-int4",)),
    Case(
        "genai-int4-lora",
        "onnxruntime-genai int4, LoRA active",
        "genai",
        "int4-lora",
        "peers",
        "int4",
        needs=("lora", "genai-int4-lora"),
        without="genai-int4",
    ),
)
