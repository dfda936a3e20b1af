"""Kinds of input that are texts: rows, study files, and calls of the kit as Python source."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from fuzz import words
from fuzz.kind import Files, Kind, write_files
from fuzz.mutations import mutate_text, pick
from fuzz.outcomes import Outcome, digest, observe, require
from numpy.random import Generator


class Rows(Kind):
    """JSON lines of prompts, or of training rows."""

    name, weight = "jsonl", 10

    def make(self, rng: Generator) -> Files:
        name = pick(rng, ("prompts.jsonl", "training.jsonl"))
        return {name: mutate_text(rng, self.read(f"rows/{name}"), words.ROW_WORDS)}

    def ask(self, files: Files) -> Any:
        from adalink.tools.rows.rows import read_rows as read_prompts
        from adalink.training.data.rows import read_rows

        ((name, _),) = files.items()
        path = write_files(self.work / "rows", files) / name
        if name == "prompts.jsonl":
            return [(row.prompt, row.task, row.images) for row in read_prompts(path, None)]
        return [(row.prompt, row.completion, row.images) for row in read_rows(path)]

    def use(self, files: Files) -> Outcome:
        (name,) = files
        expected = digest(self.ask({name: self.read(f"rows/{name}")}))
        return observe(lambda: self.ask(files), expected)


class Studies(Kind):
    """A study file."""

    name, weight = "study", 10

    def make(self, rng: Generator) -> Files:
        return {"study.toml": mutate_text(rng, self.read("study.toml"), words.STUDY_WORDS)}

    def ask(self, files: Files) -> Any:
        import msgspec

        from studies.experiment.settings import read_study

        study = read_study(write_files(self.work / "study", files) / "study.toml")
        return msgspec.to_builtins(study)

    @cached_property
    def expected(self) -> str:
        return digest(self.ask({"study.toml": self.read("study.toml")}))

    def use(self, files: Files) -> Outcome:
        return observe(lambda: self.ask(files), self.expected)


class Requests(Kind):
    """A call of ``generate``, ``run``, ``input_embeddings`` or of a task's methods, as Python source."""

    name, weight = "request", 14

    def make(self, rng: Generator) -> Files:
        return {"request.py": _request(rng).encode()}

    @cached_property
    def names(self) -> dict[str, Any]:
        from adalink.runtime import Deployment, SamplingParams

        opened = Deployment.open(self.corpus / "text" / "deployment", threads=1)
        return {"opened": opened, "np": np, "Path": Path, "Deployment": Deployment, "SamplingParams": SamplingParams}

    def ask(self, source: str) -> Any:
        found = eval(source, dict(self.names))
        if isinstance(found, list) and found and hasattr(found[0], "token_ids"):
            require(all(0 <= token < 96 for row in found for token in row.token_ids), "a token out of range")
            return [(row.text, list(row.token_ids)) for row in found]
        if isinstance(found, dict):
            return {
                name: np.nan_to_num(values) if "nan" in source or "3e38" in source else values
                for name, values in found.items()
            }
        if hasattr(found, "close"):
            found.close()
            return "opened"
        return np.nan_to_num(found) if isinstance(found, np.ndarray) else found

    def use(self, files: Files) -> Outcome:
        found = observe(lambda: self.ask(files["request.py"].decode()), None)
        if "mutated" in self.names["opened"].tasks:
            self.names["opened"].remove_task("mutated")
        return found


def _request(rng: Generator) -> str:
    """Source of one call, each argument right or wrong."""

    def some(**choices: Sequence[str]) -> str:
        given = {name: pick(rng, values) for name, values in choices.items() if rng.integers(3)}
        return ", ".join(f"{name}={value}" for name, value in given.items())

    def generate() -> str:
        sampling = pick(rng, words.SAMPLING).format(
            pick(rng, words.INTEGERS + words.FRACTIONS), pick(rng, words.FRACTIONS)
        )
        prompts = pick(
            rng, (f"[{pick(rng, words.TEXTS)}]", pick(rng, words.TEXTS), pick(rng, words.IDS), "['a', 'bb']")
        )
        flags = {"chat": ("True", "False", "5"), "draft_tokens": words.INTEGERS[:10]}
        rest = some(tasks=words.TASKS, sampling=(sampling,), stop=words.STOPS, **flags)
        return f"opened.generate({prompts}, max_new_tokens={pick(rng, words.LENGTHS)}, {rest})"

    def run() -> str:
        is_ids, method = rng.integers(4), pick(rng, ("run", "run", "input_embeddings"))
        source = f"input_ids={pick(rng, words.IDS)}" if is_ids else f"inputs_embeds={pick(rng, words.EMBEDS)}"
        masks = {} if method == "input_embeddings" else {"attention_mask": words.MASKS}
        return f"opened.{method}({source}, {some(tasks=words.TASKS, modality=words.MASKS, **masks)})"

    def change_tasks() -> str:
        method = pick(rng, ("load_task", "unload_task", "add_task", "add_task"))
        names = pick(rng, ("", ", 'mutated'", ", 5", ", ''", ", '../x'", ", 'a' * 300"))
        return f"opened.{method}({pick(rng, words.TEXTS + words.TASKS)}{names if method == 'add_task' else ''})"

    def open_deployment() -> str:
        path = pick(rng, ("Path('/nonexistent')", "opened.path", "opened.path", *words.TEXTS))
        values = {"backend": words.TEXTS, "variant": words.TEXTS, "full_check": ("True", "False")}
        rest = some(**values, threads=words.INTEGERS[:10], task_memory_bytes=words.INTEGERS)
        return f"Deployment.open({path}, {rest})"

    call: str = pick(rng, (generate, generate, run, run, change_tasks, open_deployment))()
    return call.replace(", )", ")")
