"""Tiny bases, learnable, seeded data and ``python -m studies`` on them, for the tests of studies."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result
from helpers.tiny_models import FAMILIES
from helpers.tiny_tokenizer import make_tokenizer
from msgspec import to_builtins
from transformers import modeling_gguf_pytorch_utils

from adalink.runtime.errors import DataError
from studies.commands import main
from studies.experiment.run_settings import Run

LABELS = {"a": "ant", "b": "bee", "c": "cow"}
SPLITS = {"train": 60, "validation": 15, "test": 24}


def write_base(folder: Path, family: str = "llama") -> Path:
    """A tiny base with its tokenizer."""
    FAMILIES[family]().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def write_data(folder: Path, seed: int = 5, labels: dict[str, str] = LABELS) -> Path:
    """Texts that repeat a letter, which says their class; no text occurs twice."""
    folder.mkdir(parents=True, exist_ok=True)
    draw, seen = random.Random(seed), set()
    for split, count in SPLITS.items():
        lines = []
        while len(lines) < count:
            letter = draw.choice("".join(labels))
            text = "".join(draw.choice([letter, letter, "."]) for _ in range(9)) + letter
            if text not in seen:
                seen.add(text)
                lines.append(json.dumps({"text": text, "label": labels[letter]}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def write_letter_task(folder: Path, letters: str, counts: range) -> tuple[Path, Path, Path]:
    """A tiny base, and twice the file of rows whose completion is the letter that the prompt repeats."""
    rows = [json.dumps({"prompt": letter * count, "completion": letter}) for letter in letters for count in counts]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    return write_base(folder / "tiny-llama"), folder / "rows.jsonl", folder / "rows.jsonl"


def study_text(base: Path, data: Path, methods: str, **changes: object) -> str:
    """A study file over one tiny base and the learnable data; ``changes`` replace its top fields, as TOML."""
    top = {"seeds": [1, 2], "sizes": ["all"], "compare_to": "AdaLink 8", "device": "cpu", "name": "tiny", **changes}
    fields = "\n".join(f"{name} = {json.dumps(value)}" for name, value in top.items())
    return f"""{fields}

[training]
max_steps = 12
batch_size = 4

[search]
max_steps = 6
seed = 99
rows = 15

[[bases]]
name = "tiny"
model = {json.dumps(str(base))}

[[data]]
name = "letters"
folder = {json.dumps(str(data))}
template = "{{text}} is"

{methods}
"""


METHODS = """
[[methods]]
name = "AdaLink 8"
kind = "adalink"
rank = 8
activation = "gelu"
lr = [1e-2, 1e-3]

[[methods]]
name = "LoRA 2"
kind = "lora"
rank = 2
targets = "attention"
lr = [1e-2]

[[methods]]
name = "none"
kind = "zero-shot"
"""


def write_study(places: tuple[Path, Path], folder: Path, methods: str = METHODS, **changes: object) -> Path:
    """A study file over the base and the data at ``places``; ``changes`` as ``study_text`` takes them."""
    path = folder / "study.toml"
    path.write_text(study_text(*places, methods, **changes))
    return path


def invoke(*arguments: object, code: int = 0) -> Result:
    """``python -m studies run``, which ends with ``code``."""
    return invoke_command("run", *arguments, code=code)


def invoke_command(command: str, *arguments: object, code: int = 0) -> Result:
    """A command of ``python -m studies``, which ends with ``code``."""
    result = CliRunner().invoke(main, [command, *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def contents(out: Path) -> dict[str, Any]:
    """The finished runs of a study's folder, by their file's name."""
    return {path.name: json.loads(path.read_text()) for path in (out / "runs").iterdir()}


def die(*arguments: object) -> None:
    """In place of ``perform``: the process ends, as when memory runs out."""
    os._exit(1)


def stay_with_second_seed(run: Run, *arguments: object) -> dict[str, Any]:
    """In place of ``perform``: runs with seed 2 have no end, others are done at once."""
    list(modeling_gguf_pytorch_utils.tqdm(range(1)))  # as where a base is loaded
    if run.seed == 2:
        time.sleep(600)
    result = {"accuracy": 0.5, "loss": 1.0, "rows": 8, "train_seconds": 0.0, "score_seconds": 0.0}
    return {"run": to_builtins(run), "result": result}


def stay_or_fail(run: Run, *arguments: object) -> dict[str, Any]:
    """In place of ``perform``: runs with seed 2 have no end, others fail at once."""
    stay_with_second_seed(run)
    raise DataError("planted")


def fail_first_rate(run: Run, *arguments: Any) -> dict[str, Any]:
    """In place of ``perform``: the run with the first rate fails at once, others end later."""
    if run.lr == 1e-2:
        raise DataError("planted")
    time.sleep(1)
    return made_result(run, 0.5, "AdaLink 8")


PARAMETERS = {"AdaLink 8": 768, "AdaLink 16": 1536, "LoRA 2": 400, "none": 0}


def made_result(run: Run, accuracy: float, method: str) -> dict[str, Any]:
    """A finished run as it is on disk; the method is one of ``PARAMETERS``."""
    result = {
        "accuracy": accuracy,
        "loss": 1.0,
        "diverged": False,
        "trained_parameters": PARAMETERS[method],
        "base_parameters": 10_000,
        "train_seconds": 10.0 * run.seed,
        "score_seconds": 1.0,
        "train_rows": 60,
        "rows": 24,
    }
    return {"run": to_builtins(run), "result": result, "versions": {"torch": "2.13"}}


def finished_runs(count: int) -> dict[str, dict[str, Any]]:
    """Made-up finished runs of seeds 1 to ``count``, by file name."""
    runs = [
        Run(purpose="final", base="tiny", base_digest="b", data="letters", words=32, train_digest="t",
            scored_digest="s", scored_rows=24, method={"kind": "adalink", "rank": 8}, size=None, lr=1e-2, max_steps=12,
            batch_size=4, seed=seed, device="cpu")
        for seed in range(1, count + 1)
    ]  # fmt: skip
    return dict(sorted((run.file_name, made_result(run, 0.1 + run.seed / 7, "AdaLink 8")) for run in runs))
