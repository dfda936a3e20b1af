"""Kinds of input that are read before there is a deployment, and requests to one."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from fuzz.kinds import Files, Kind, write_files
from fuzz.mutations import mutate_bytes, mutate_json, mutate_safetensors, mutate_text, pick
from fuzz.outcomes import Outcome, digest, observe, require
from numpy.random import Generator

_ROW_WORDS = (
    '"images": ["/dev/zero"]', '"images": [3]', '"task": "alpha"', '"Prompt": ""', "\\ud800", "NaN", "1e400", "[" * 3000,
    '"', "{", "}", ", ", ": ", "null", "1" * 5000, "\ufeff", "\u2028", "\r", "\x00", '{"prompt": "a"}', "\\u0000", "é",
)  # fmt: skip


class Rows(Kind):
    """JSON lines of prompts, or of training rows."""

    name, weight = "jsonl", 10

    def make(self, rng: Generator) -> Files:
        name = pick(rng, ("prompts.jsonl", "training.jsonl"))
        return {name: mutate_text(rng, self.read(f"rows/{name}"), _ROW_WORDS)}

    def ask(self, files: Files) -> Any:
        from adalink.tools.common.rows import read_rows as read_prompts
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


_STUDY_WORDS = (
    "a = 1", "[[methods]]", "[training]", "= 1e400", "= nan", "= -1", "= 0", "= [", "= " + "[" * 3000, "= " + "1" * 5000,
    "= true", '= ""', "= 1979-05-27", "= 0x" + "f" * 5000, '"""', "'''", "#", "a.b.c = 1", "name = 'x'", "\x00", "é", "\\ud800",
    "." * 3000, "a." * 3000 + "b = 1", "= {}", "= inf", 'kind = "full"', "sizes = [1, 2]", 'combine = ["a", "b"]', "= 99999999999",
)  # fmt: skip


class Studies(Kind):
    """A study file."""

    name, weight = "study", 10

    def make(self, rng: Generator) -> Files:
        return {"study.toml": mutate_text(rng, self.read("study.toml"), _STUDY_WORDS)}

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


class Checkpoints(Kind):
    """A Hugging Face folder: config, tokenizer, weights."""

    name, weight = "hf", 2

    @cached_property
    def whole(self) -> Files:
        return {path.name: path.read_bytes() for path in sorted((self.corpus / "hf").iterdir()) if path.is_file()}

    def make(self, rng: Generator) -> Files:
        files = dict(self.whole)
        name = pick(rng, sorted(files))
        mutate = (
            mutate_json
            if name.endswith(".json")
            else mutate_safetensors
            if name.endswith(".safetensors")
            else mutate_bytes
        )
        files[name] = mutate(rng, files[name])
        return files

    def ask(self, files: Files) -> Any:
        from adalink.training.models.loading import base_fingerprint, load_base, load_tokenizer

        folder = write_files(self.work / "hf", files)
        model = load_base(folder)
        tokenizer = load_tokenizer(folder)
        return base_fingerprint(model), _logits(model), list(tokenizer("ab")["input_ids"])

    @cached_property
    def expected(self) -> str:
        return digest(self.ask(self.whole))

    def use(self, files: Files) -> Outcome:
        return observe(lambda: self.ask(files), self.expected)


class GgufFiles(Kind):
    """A GGUF file."""

    name, weight = "gguf", 2

    def make(self, rng: Generator) -> Files:
        data = self.read("model.gguf")
        head = data.find(b"token_embd.weight") + 1000
        if rng.integers(4):
            return {"model.gguf": mutate_bytes(rng, data[:head]) + data[head:]}
        return {"model.gguf": mutate_bytes(rng, data)}

    def ask(self, files: Files) -> Any:
        from adalink.training.models.loading import base_fingerprint, load_base

        model = load_base(write_files(self.work / "gguf", files) / "model.gguf")
        return base_fingerprint(model), _logits(model)

    @cached_property
    def expected(self) -> str:
        return digest(self.ask({"model.gguf": self.read("model.gguf")}))

    def use(self, files: Files) -> Outcome:
        return observe(lambda: self.ask(files), self.expected)


def _logits(model: Any) -> Any:
    """Logits of one row; those that are not finite are export's to refuse, not loading's."""
    import torch

    with torch.no_grad():
        found = model(input_ids=torch.tensor([[3, 4, 5]]).clamp(max=model.get_input_embeddings().weight.shape[0] - 1))
    return np.nan_to_num(found.logits.float().numpy())


_INTEGERS = (
    "0",
    "1",
    "2",
    "3",
    "-1",
    "95",
    "96",
    "10**9",
    "2**31",
    "2**63",
    "2**64",
    "10**30",
    "True",
    "1.5",
    "None",
    "'1'",
    "float('nan')",
)
_TEXTS = (
    "'abc'",
    "''",
    "'a' * 40",
    "'a' * 5000",
    "'\\ud800'",
    "'\\x00'",
    "'é'",
    "b'abc'",
    "5",
    "None",
    "[]",
    "['a']",
    "'<eos>'",
    "'@'",
)
_TASKS = (
    "None",
    "'alpha'",
    "'beta'",
    "'double'",
    "'prompted'",
    "'none'",
    "''",
    "5",
    "['alpha']",
    "[None, 'beta']",
    "[5]",
    "('alpha',)",
    "'../x'",
    "b'alpha'",
    "{}",
)
_IDS = (
    "[[5, 6]]",
    "[[5]]",
    "[[]]",
    "[]",
    "[[5, 6], [7]]",
    "[[5.5]]",
    "[['a']]",
    "[[96]]",
    "[[-1]]",
    "[[2**63]]",
    "[[True]]",
    "None",
    "5",
    "'a'",
    "[[5] * 64]",
    "[[5] * 65]",
    "np.ones((1, 0), int)",
    "np.ones((0, 3), int)",
    "np.ones((2, 3), np.int8)",
    "np.ones((1, 2, 3), int)",
    "np.full((1, 2), 5, np.uint64)",
    "np.array([[5, None]], object)",
    "[[float('nan')]]",
    "[[5, 6, 7, 8]] * 9",
)
_MASKS = (
    "None",
    "[[1, 1]]",
    "[[0, 1]]",
    "[[1, 0]]",
    "[[0, 0]]",
    "[[1]]",
    "[[2, 1]]",
    "[[1.0, 1.0]]",
    "'a'",
    "[[True, True]]",
    "np.ones((1, 2))",
    "[]",
)
_EMBEDS = (
    "np.zeros((1, 2, 48), np.float32)",
    "np.zeros((1, 2, 48))",
    "np.zeros((1, 2, 47), np.float32)",
    "np.full((1, 2, 48), np.nan, np.float32)",
    "np.zeros((1, 0, 48), np.float32)",
    "np.zeros((2, 48), np.float32)",
    "'a'",
    "np.full((1, 2, 48), 3e38, np.float32)",
)
_STOPS = ("()", "''", "'a'", "['a', '']", "[5]", "None", "5", "'\\ud800'", "['a'] * 1000", "('b', None)", "'<eos>'")
_SAMPLING = (
    "None",
    "SamplingParams()",
    "SamplingParams(temperature={0})",
    "SamplingParams(top_k={0})",
    "SamplingParams(top_p={0})",
    "SamplingParams(seed={0})",
    "SamplingParams(temperature=1.0, top_p={1}, top_k={0})",
    "5",
    "{{}}",
)
_FRACTIONS = ("0.0", "1.0", "0.5", "-0.1", "1e-320", "1e400", "float('nan')", "2.0", "None", "'a'")


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

    def some(**choices: tuple[str, ...]) -> str:
        given = {name: pick(rng, values) for name, values in choices.items() if rng.integers(3)}
        return ", ".join(f"{name}={value}" for name, value in given.items())

    match int(rng.integers(6)):
        case 0 | 1:
            sampling = pick(rng, _SAMPLING).format(pick(rng, _INTEGERS + _FRACTIONS), pick(rng, _FRACTIONS))
            prompts = pick(rng, (f"[{pick(rng, _TEXTS)}]", pick(rng, _TEXTS), pick(rng, _IDS), "['a', 'bb', 'ccc']"))
            lengths = ("1", "2", "3", "0", "-1", "10**9", "2**63", "True", "1.5", "None", "'1'")
            rest = some(
                tasks=_TASKS,
                sampling=(sampling,),
                stop=_STOPS,
                chat=("True", "False", "5"),
                draft_tokens=_INTEGERS[:12],
            )
            call = f"opened.generate({prompts}, max_new_tokens={pick(rng, lengths)}, {rest})"
        case 2 | 3:
            source = f"input_ids={pick(rng, _IDS)}" if rng.integers(4) else f"inputs_embeds={pick(rng, _EMBEDS)}"
            method = pick(rng, ("run", "run", "input_embeddings"))
            masks = {} if method == "input_embeddings" else {"attention_mask": _MASKS}
            call = f"opened.{method}({source}, {some(tasks=_TASKS, modality=_MASKS, **masks)})"
        case 4:
            method = pick(rng, ("load_task", "unload_task", "add_task", "add_task"))
            names = pick(rng, ("", ", 'mutated'", ", 5", ", ''", ", '../x'", ", 'a' * 300"))
            call = f"opened.{method}({pick(rng, _TEXTS + _TASKS)}{names if method == 'add_task' else ''})"
        case _:
            path = f"Path({'/nonexistent'!r})" if rng.integers(2) else "opened.path"
            values = {
                "backend": _TEXTS,
                "variant": _TEXTS,
                "threads": _INTEGERS[:5] + _INTEGERS[12:],
                "full_check": ("True", "False"),
            }
            call = f"Deployment.open({pick(rng, (path, *_TEXTS))}, {some(**values, task_memory_bytes=_INTEGERS)})"
    return call.replace(", )", ")")
