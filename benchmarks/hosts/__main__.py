"""Compare tasks in other hosts with the kit: greedy tokens of the same prompts, on SmolLM2 with its example adapters.

python -m benchmarks.hosts --deployment DIR [--adapters FOLDER ...]

Prints a Markdown table. A host that is not installed is named with the reason.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from adalink.export.hosts.host_base import HostBase, base_of_checkpoint, base_of_deployment
from adalink.export.hosts.lora import export_lora
from adalink.runtime.deployment import Deployment
from adalink.runtime.generation.sampling import SamplingParams
from benchmarks.hosts.llama_cpp import llama_cpp
from benchmarks.prepare import smollm2
from benchmarks.process import REPOSITORY, MeasurementError
from benchmarks.serving.llama_cpp import make_models
from benchmarks.serving.prompts import mixed_prompts

PROMPTS, NEW_TOKENS, GREEDY = 8, 24, SamplingParams(temperature=0)
EXAMPLES = [REPOSITORY / "examples/adapters" / name for name in ("reuters-r8", "tweet-author")]

# Token ids behind each prompt.
Answers = list[list[int]]


class Setting(NamedTuple):
    """What every host is asked.

    Attributes:
        model: the checkpoint as a GGUF file.
        adapters: adapter folders.
        deployment: a deployment of that checkpoint.
        prompts: token ids of each prompt.
        build: a folder for what hosts need.
    """

    model: Path
    adapters: list[Path]
    deployment: Path
    prompts: Answers
    build: Path


def main() -> None:
    """Ask the kit, then each host, and print how many answers agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deployment", type=Path, required=True, help="has the base in float32, as the demo makes it")
    parser.add_argument("--adapters", type=Path, nargs="+", default=EXAMPLES)
    parser.add_argument("--build", type=Path, default=Path("build/hosts"))
    options = parser.parse_args()
    options.build.mkdir(parents=True, exist_ok=True)
    model = next(Path(smollm2()).glob("*.gguf"))
    with Deployment.open(options.deployment) as deployment:
        encode = deployment.tokenizer.encode
        prompts = [list(encode(text)) for text in mixed_prompts(PROMPTS)]
        setting = Setting(model, options.adapters, options.deployment, prompts, options.build)
        expected = {folder.name: kit(deployment, folder, setting) for folder in setting.adapters}
    print("| host | format | task | answers of the kit, of so many |\n| --- | --- | --- | --- |")
    for name, package, form, ask in HOSTS:
        try:
            label = f"{name} {version(package)}"
            for task, answers in ask(setting).items():
                same = sum(mine == theirs for mine, theirs in zip(expected[task], answers, strict=True))
                print(f"| {label} | {form} | {task} | {same} of {len(answers)} |", flush=True)
        except (PackageNotFoundError, ImportError, MeasurementError) as error:
            print(f"| {name} | {form} | not run: {error} | |", flush=True)


def kit(deployment: Deployment, adapter: Path, setting: Setting) -> Answers:
    """The kit's own answers."""
    if adapter.name not in deployment.tasks:
        deployment.add_task(adapter)
    made = deployment.generate(setting.prompts, tasks=adapter.name, max_new_tokens=NEW_TOKENS, sampling=GREEDY)
    return [list(row.token_ids) for row in made]


def peft(setting: Setting) -> dict[str, Answers]:
    """PEFT's answers, in PyTorch."""
    import torch
    from peft import PeftModel

    from adalink.training.models.loading import load_base

    base, tuned = base_of_deployment(setting.deployment), None
    model = load_base(setting.model)
    ends = set(model.generation_config.eos_token_id)
    answers = {}
    for adapter in setting.adapters:
        folder = write(adapter, base, setting.build / f"{adapter.name}-peft", "peft")
        if tuned is None:
            tuned = PeftModel.from_pretrained(model, folder, adapter_name=adapter.name)
        else:
            tuned.load_adapter(folder, adapter_name=adapter.name)
        tuned.set_adapter(adapter.name)
        rows = []
        for prompt in setting.prompts:
            ids = torch.tensor([prompt])
            made = tuned.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False
            )
            rows.append(up_to_end(made[0, len(prompt) :].tolist(), ends))
        answers[adapter.name] = rows
    return answers


def llama(setting: Setting) -> dict[str, Answers]:
    """llama.cpp's answers, on the checkpoint in float32."""
    model = setting.build / "f32.gguf"
    if not model.is_file():
        make_models(setting.model, setting.build)
    base = base_of_checkpoint(str(model))
    loras = [write(adapter, base, setting.build / f"{adapter.name}.gguf", "gguf") for adapter in setting.adapters]
    answers = {}
    with llama_cpp(model, loras, setting.build / "llama.cpp.log", context=1024) as server:
        for number, adapter in enumerate(setting.adapters):
            made = [server.ask(prompt, NEW_TOKENS, [number]) for prompt in setting.prompts]
            answers[adapter.name] = [list(answer["tokens"]) for answer in made]
    return answers


def write(adapter: Path, base: HostBase, out: Path, form: str) -> Path:
    """A task as a LoRA."""
    export_lora(adapter, base, out, form, replace=True)
    return out


def up_to_end(tokens: list[int], ends: set[int]) -> list[int]:
    """Tokens before the one that ends a text."""
    return next((tokens[:index] for index, token in enumerate(tokens) if token in ends), tokens)


HOSTS: tuple[tuple[str, str, str, Callable[[Setting], dict[str, Any]]], ...] = (
    ("PEFT", "peft", "peft", peft),
    ("llama.cpp (xllamacpp)", "xllamacpp", "gguf", llama),
)


if __name__ == "__main__":
    sys.exit(main())
