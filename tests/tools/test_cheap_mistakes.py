"""Cheap mistakes end a command before PyTorch or an engine is imported, with a message that says the repair."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from helpers.paths import REPOSITORY
from helpers.tiny_deployments import make_deployment
from helpers.warm_python import WarmPython

from adalink.runtime.device.gpus import find_gpus

# What is imported once: each process is a copy. If one of these imported a framework, every copy would show it.
LIGHT = (
    "adalink.runtime.deployment",
    "adalink.export.engine.export",
    "adalink.tools.commands.eval",
    "adalink.tools.commands.export",
    "adalink.tools.commands.run",
    "adalink.tools.parity.suite",
    "adalink.tools.preflight.training",
    "adalink.tools.quickstart.steps",
)
HEAVY = {"torch", "transformers", "onnx", "onnxruntime", "sklearn"}
_RUN = """
import sys
from adalink.tools.cli import main
try:
    main(sys.argv[1:])
finally:
    print("LOADED", *{name.partition(".")[0] for name in sys.modules}, file=sys.stderr)
"""
PROMPTS = '{"prompt": "a", "completion": " b"}\n'
LABELS = '{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n'
TRAIN = ["train", "--base", "decoder", "--data", "prompts.jsonl", "--out", "out"]
QUICKSTART = ["quickstart", "encoder", "labels.jsonl", "--out"]
EXPORT = ["export", "base", "decoder", "--out"]
# A command, and the end of what it says: object, received, expected, repair.
MISTAKES: dict[str, tuple[list[str], str]] = {
    "run, no deployment": (["run", "nowhere", "x"], r"nowhere does not exist: make one with 'adalink export base"),
    "run, task": (["run", "deployment", "x", "--task", "topic"], r"deployed are: topics; did you mean 'topics'\?"),
    "run, dimensions": (["run", "deployment", "x", "--task", "topics@2"], r"'topics' is not nested, so that no part"),
    "compress, in place": (
        ["compress", "adapter", "--deployment", "deployment", "--rows", "labels.jsonl", "--out", "adapter"],
        r"--out adapter is the adapter itself, adapter: name another folder",
    ),
    "run, variant": (["run", "deployment", "x", "--variant", "onnxruntime-cpi"], r"did you mean 'onnxruntime-cpu'\?"),
    "classify, task": (["classify", "deployment", "x", "--task", "topisc"], r"did you mean 'topics'\?"),
    "run, a row's task": (
        ["run", "deployment", "--rows", "tasks.jsonl"],
        r"tasks.jsonl:2: task 'topisc' is not deployed here; deployed are: topics; did you mean 'topics'\?",
    ),
    "classify, a row's task": (
        ["classify", "deployment", "--rows", "tasks.csv"],
        r"tasks.csv:3: task 'topisc' .* did you mean 'topics'\?",
    ),
    "embed, a row's task": (["embed", "deployment", "--rows", "tasks.csv"], r"tasks.csv:3: task 'topisc'"),
    "eval, a row's task": (["eval", "deployment", "--data", "tasks.csv"], r"tasks.csv:3: task 'topisc'"),
    "classify, no task": (["classify", "deployment", "x"], r"name a task with --task; deployed are: topics"),
    "embed, backend": (["embed", "deployment", "x", "--backend", "onnxruntime"], r"did you mean 'onnxruntime-cpu'\?"),
    "chat, task": (["chat", "deployment", "--task", "topcs"], r"did you mean 'topics'\?"),
    "serve, no engine": (["serve", "deployment", "--backend", "tensorrt"], r"add one with 'adalink export engine"),
    "bench, task": (["bench", "deployment", "--task", "x"], r"task 'x' is not deployed"),
    "remove, task": (["remove", "deployment", "topic"], r"did you mean 'topics'\?"),
    "eval, task": (["eval", "deployment", "--data", "labels.jsonl", "--task", "topic"], r"did you mean 'topics'\?"),
    "eval, no rows": (["eval", "deployment", "--data", "absent.csv"], r"absent.csv: cannot be read: No such file"),
    "eval, a bad row": (["eval", "deployment", "--data", "bad.jsonl"], r"bad.jsonl:2: not JSON"),
    "verify, model": (["verify", "deployment", "--against", "decodr"], r"did you mean 'decoder'\?"),
    "verify, task": (
        ["verify", "deployment", "--against", "decoder", "--adapter", "topic=x"],
        r"did you mean 'topics'\?",
    ),
    "export base, there already": (["export", "base", "decoder", "--out", "deployment"], r"pass --replace"),
    "export base, other things": ([*EXPORT, "full"], r"full holds 'file' .* choose an empty folder"),
    "export base, no folder": ([*EXPORT, "labels.jsonl/x"], r"cannot write in \S*labels.jsonl: .*writable --out"),
    "export base, type": (["export", "base", "unknown", "--out", "new"], r"model type 'mamba' is not supported"),
    "export base, bare name": (["export", "base", "gpt2", "--out", "new"], r"it is no hub id, which is org/name"),
    "export base, out of reach": (
        ["export", "base", "org/name", "--out", "new"],
        r"127.0.0.1 cannot be reached .*hf download org/name --local-dir FOLDER\) and pass the folder",
    ),
    "export adapter, no adapter": (["export", "adapter", "nowhere", "--out", "deployment"], r"nowhere: no such folder"),
    "export adapter, there already": (
        ["export", "adapter", "adapters/topics", "--out", "deployment"],
        r"already has a task 'topics': pass --replace",
    ),
    "train, no rows": ([*TRAIN, "--data", "absent.jsonl"], r"absent.jsonl: cannot be read"),
    "train, a bad row": ([*TRAIN, "--eval", "bad.jsonl"], r"bad.jsonl:2: not JSON"),
    "train, no base": ([*TRAIN, "--base", "./nowhere"], r"base model ./nowhere: there is no such file or folder"),
    "train, an encoder": ([*TRAIN, "--base", "encoder"], r"encoder, which cannot generate .* rows with labels"),
    "train, a decoder": ([*TRAIN, "--data", "labels.jsonl"], r"a decoder.* make them with --template"),
    "train, columns": ([*TRAIN, "--base", "encoder", "--data", "other.csv"], r"are body, topic.* --map text=COLUMN"),
    "train, checkpoints": ([*TRAIN, "--out", "begun"], r"go on with --resume, or remove that folder"),
    "train, no checkpoints": ([*TRAIN, "--out", "full"], r"full is not empty and holds no adapter_config.json"),
    "train, device": ([*TRAIN, "--device", "cuda"], r"no GPU on this machine: .* take --device cpu"),
    "split, columns": (["split", "labels.jsonl", "--map", "text=tex", "--out", "s"], r"did you mean 'text'\?"),
    "quickstart, other things": ([*QUICKSTART, "full"], r"full is not empty .* choose another --out"),
    "quickstart, rows": (
        ["quickstart", "encoder", "prompts.jsonl", "--out", "q"],
        r"an encoder, which cannot generate",
    ),
    "quickstart, model": (["quickstart", "decodr", "labels.jsonl", "--out", "q"], r"did you mean 'decoder'\?"),
}

Call = Callable[[Sequence[str]], tuple[int, str, set[str]]]


def save_config(folder: Path, kind: str, name: str) -> None:
    """A model folder as far as it is looked at: its weights are empty."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": kind, "architectures": [name]}))
    (folder / "model.safetensors").write_bytes(b"")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mistakes")
    make_deployment(root, "gpt2", {"topics": {"seed": 1}})
    save_config(root / "decoder", "llama", "LlamaForCausalLM")
    save_config(root / "encoder", "bert", "BertModel")
    save_config(root / "unknown", "mamba", "MambaForCausalLM")
    (root / "prompts.jsonl").write_text(PROMPTS)
    (root / "labels.jsonl").write_text(LABELS)
    (root / "other.csv").write_text("body,topic\na,b\n")
    (root / "tasks.jsonl").write_text('{"prompt": "a", "task": "topics"}\n{"prompt": "b", "task": "topisc"}\n')
    (root / "tasks.csv").write_text("text,label,task\na,x,topics\nb,y,topisc\n")
    (root / "bad.jsonl").write_text(f"{PROMPTS}{{'prompt'}}\n")
    for folder in ("full", "begun.checkpoints"):
        (root / folder).mkdir()
        (root / folder / "file").touch()
    return root


@pytest.fixture(scope="module")
def call(workplace: Path) -> Iterator[Call]:
    """Runs a command in a process of its own; gives its exit code, stderr and the packages that it imported."""
    python = WarmPython(LIGHT)
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    path = os.pathsep.join(filter(None, (str(REPOSITORY / "src"), os.environ.get("PYTHONPATH"))))
    environment |= {"PYTHONPATH": path, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(workplace / "cache")}

    def run(words: Sequence[str]) -> tuple[int, str, set[str]]:
        done = python.run([sys.executable, "-c", _RUN, *words], cwd=workplace, env=environment)
        said, _, loaded = done.stderr.partition("LOADED ")
        return done.returncode, said, set(loaded.split())

    yield run
    python.close()


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_found_before_anything_is_loaded(call: Call, name: str) -> None:
    words, message = MISTAKES[name]
    if "cuda" in words and not find_gpus().reason:
        pytest.skip("this machine has a GPU")
    code, said, loaded = call(words)
    assert code == 2, said
    assert "Traceback" not in said
    assert re.search(message, said.replace("\n", " ")), said
    assert not HEAVY & loaded


def test_the_probe_sees_what_is_loaded(call: Call) -> None:
    code, _, loaded = call(["inspect", "deployment/tasks/topics/adapter.onnx"])
    assert code == 0
    assert "onnx" in loaded


def test_mistakes_change_nothing(workplace: Path) -> None:
    assert not {"out", "new", "q", "s"} & {path.name for path in workplace.iterdir()}
    assert not list(workplace.glob(".*"))
