"""Compare tasks in other hosts with the kit: greedy tokens of the same prompts, on SmolLM2 with its example adapters.

python -m benchmarks.hosts --deployment DIR [--adapters FOLDER ...] [--vllm-python PYTHON]

Prints a Markdown table. A host that is not installed is named with the reason.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from adalink.export.base.export import export_base
from adalink.export.genai.export import export_genai
from adalink.export.lora.base import LoraBase, base_of_checkpoint, base_of_deployment
from adalink.export.lora.export import export_lora
from adalink.export.web.export import export_web
from adalink.runtime.deployment import Deployment
from adalink.runtime.sampling.sampler import SamplingParams
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.tools.terminal.quiet import silence_libraries
from benchmarks.hosts.llama_cpp import llama_cpp
from benchmarks.prepare import smollm2
from benchmarks.process import REPOSITORY, MeasurementError, run_json
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
        vllm_python: Python of an environment with vLLM; ``None`` without one.
    """

    model: Path
    adapters: list[Path]
    deployment: Path
    prompts: Answers
    build: Path
    vllm_python: Path | None


def main() -> None:
    """Ask the kit, then each host, and print how many answers agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deployment", type=Path, required=True, help="has the base in float32, as the demo makes it")
    parser.add_argument("--adapters", type=Path, nargs="+", default=EXAMPLES)
    parser.add_argument("--build", type=Path, default=Path("build/hosts"))
    parser.add_argument("--vllm-python", type=Path, help="Python of an environment that has vLLM")
    options = parser.parse_args()
    options.build.mkdir(parents=True, exist_ok=True)
    model = next(Path(smollm2()).glob("*.gguf"))
    with Deployment.open(options.deployment) as deployment:
        encode = deployment.tokenizer.encode
        prompts = [list(encode(text)) for text in mixed_prompts(PROMPTS)]
        setting = Setting(
            model, options.adapters, options.deployment, prompts, options.build.resolve(), options.vllm_python
        )
        expected = {folder.name: kit(deployment, folder, setting) for folder in setting.adapters}
    silence_libraries()
    print("| host | format | task | answers of the kit, of so many |\n| --- | --- | --- | --- |")
    for name, form, ask in HOSTS:
        try:
            release, answers = ask(setting)
            for task, rows in answers.items():
                same = sum(mine == theirs for mine, theirs in zip(expected[task], rows, strict=True))
                print(f"| {name} {release} | {form} | {task} | {same} of {len(rows)} |", flush=True)
        except (PackageNotFoundError, ImportError, MeasurementError) as error:
            print(f"| {name} | {form} | not run: {error} | |", flush=True)


def kit(deployment: Deployment, adapter: Path, setting: Setting) -> Answers:
    """The kit's own answers."""
    if adapter.name not in deployment.tasks:
        deployment.add_task(adapter)
    made = deployment.generate(setting.prompts, tasks=adapter.name, max_new_tokens=NEW_TOKENS, sampling=GREEDY)
    return [list(row.token_ids) for row in made]


def peft(setting: Setting) -> tuple[str, dict[str, Answers]]:
    """PEFT's version and answers, in PyTorch."""
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
    return version("peft"), answers


def llama(setting: Setting) -> tuple[str, dict[str, Answers]]:
    """llama.cpp's version and answers, on the checkpoint in float32."""
    release = version("xllamacpp")
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
    return release, answers


def llama_backend(setting: Setting) -> tuple[str, dict[str, Answers]]:
    """llama.cpp's version and the answers of the kit's backend, fed embeddings, on the same file."""
    release, model, folder = version("xllamacpp"), setting.build / "f32.gguf", setting.build / "llama-cpp"
    if not model.is_file():
        make_models(setting.model, setting.build)
    export_base(model, folder, target="llama.cpp", replace=True)
    with Deployment.open(folder, "llama.cpp") as deployment:
        return release, {adapter.name: kit(deployment, adapter, setting) for adapter in setting.adapters}


def genai(setting: Setting) -> tuple[str, dict[str, Answers]]:
    """onnxruntime-genai's version and answers, a generator a prompt."""
    import onnxruntime_genai
    from safetensors.numpy import load_file

    release, folder = version("onnxruntime-genai"), setting.build / "genai"
    tasks = [adapter.name for adapter in setting.adapters]
    export_genai(setting.deployment, folder, tasks=tasks, replace=True)
    model = onnxruntime_genai.Model(str(folder))
    ends = set(read_manifest(setting.deployment).base.eos_token_ids)
    answers: dict[str, Answers] = {}
    for task in tasks:
        weights = load_file(folder / "tasks" / f"{task}.safetensors")
        for prompt in setting.prompts:
            params = onnxruntime_genai.GeneratorParams(model)
            params.set_search_options(max_length=len(prompt) + NEW_TOKENS)
            generator = onnxruntime_genai.Generator(model, params)
            for name, value in weights.items():
                generator.set_model_input(name, value)
            generator.append_tokens(prompt)
            while not generator.is_done():
                generator.generate_next_token()
            made = generator.get_sequence(0)[len(prompt) :]
            answers.setdefault(task, []).append(up_to_end([int(token) for token in made], ends))
    return release, answers


def node(setting: Setting) -> tuple[str, dict[str, Answers]]:
    """onnxruntime-node's version and answers, one prompt after another."""
    example, folder = REPOSITORY / "examples/node", setting.build / "web"
    package = example / "node_modules/onnxruntime-node/package.json"
    if shutil.which("node") is None or not package.is_file():
        raise MeasurementError("Node or its packages are not installed: npm ci --prefix examples/node --ignore-scripts")
    tasks = [adapter.name for adapter in setting.adapters]
    export_web(setting.deployment, folder, tasks=tasks, replace=True)
    requests = [{"prompt": prompt, "task": task} for task in tasks for prompt in setting.prompts]
    command = ["node", str(example / "generate.mjs"), str(folder), "--json", "--tokens", str(NEW_TOKENS)]
    done = subprocess.run(command, input=json.dumps(requests), stdout=subprocess.PIPE, text=True, check=True)
    made = [answer["tokens"] for answer in json.loads(done.stdout)]
    count = len(setting.prompts)
    answers = {task: made[start * count :][:count] for start, task in enumerate(tasks)}
    return json.loads(package.read_text())["version"], answers


def vllm(setting: Setting) -> tuple[str, dict[str, Answers]]:
    """VLLM's version and answers, all tasks in one batch, in float32 on the CPU."""
    if setting.vllm_python is None:
        raise MeasurementError("give --vllm-python")
    from adalink.training.models.loading import load_base, load_tokenizer

    folder, prompts = setting.build / "model", setting.build / "prompts.json"
    model = load_base(setting.model)
    model.save_pretrained(folder)
    load_tokenizer(setting.model).save_pretrained(folder)
    prompts.write_text(json.dumps(setting.prompts), encoding="utf-8")
    base = base_of_deployment(setting.deployment)
    loras = [write(adapter, base, setting.build / f"{adapter.name}-peft", "peft") for adapter in setting.adapters]
    command: list[str | Path] = [setting.vllm_python, "-m", "benchmarks.hosts.vllm_engine", "--model", folder]
    command += ["--prompts", prompts, "--new-tokens", str(NEW_TOKENS), "--lora", *loras]
    made: dict[str, Any] = run_json(command, 900, setting.build / "vllm.log")
    ends = set(model.generation_config.eos_token_id)
    rows = [[up_to_end(tokens, ends) for tokens in answers] for answers in made["answers"]]
    return made["version"], {adapter.name: found for adapter, found in zip(setting.adapters, rows, strict=True)}


def write(adapter: Path, base: LoraBase, out: Path, form: str) -> Path:
    """A task as a LoRA."""
    export_lora(adapter, base, out, form, replace=True)
    return out


def up_to_end(tokens: list[int], ends: set[int]) -> list[int]:
    """Tokens before the one that ends a text."""
    return next((tokens[:index] for index, token in enumerate(tokens) if token in ends), tokens)


HOSTS: tuple[tuple[str, str, Callable[[Setting], tuple[str, dict[str, Answers]]]], ...] = (
    ("PEFT", "peft", peft),
    ("vLLM, on the CPU", "peft", vllm),
    ("llama.cpp (xllamacpp)", "gguf", llama),
    ("llama.cpp (xllamacpp)", "the kit's backend", llama_backend),
    ("onnxruntime-genai", "folder", genai),
    ("onnxruntime-node", "folder", node),
)


if __name__ == "__main__":
    main()
