"""The files that are measured: checkpoints, and what each tool makes of them, with its time and memory."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from adalink.export.base.request import LLAMA_CPP
from adalink.runtime import Deployment
from adalink.runtime.storage.digest import digest_file
from adalink.tools.common.report_file import write_json
from benchmarks.prepare import smollm2
from benchmarks.process import MeasurementError, run, run_json
from benchmarks.size import example_rows, kit_model
from benchmarks.size.cases import GENAI, KIT_INT4, Case, Model
from benchmarks.size.seeded_model import write_model
from benchmarks.store import Result

_TIMEOUT_S = 3600
# What a tool made, beside the model itself.
_MADE = "made.json"
# Files of a tokenizer, which a seeded checkpoint borrows from the real one.
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


class Files:
    """Files of one model below ``work``.

    Args:
        work: folder for them, and for logs.
        model: the model.
        pythons: interpreters, ``kit`` and ``peers``.
        progress: called with a line now and then.
    """

    def __init__(self, work: Path, model: Model, pythons: dict[str, Path], progress: Callable[[str], None]) -> None:
        self._work, self.model, self._pythons, self._progress = work, model, pythons, progress
        self._folder, self._logs = work / model.name, work / "logs"

    def path(self, case: Case) -> Path:
        """What the engine of a case opens."""
        folder = self._folder / case.name
        return folder / "model.gguf" if case.engine == "llama_cpp" else folder

    def made(self, case: Case) -> Result:
        """``shipped_bytes``, and of an exporter ``seconds`` and ``peak_bytes`` of each round."""
        return dict(json.loads((self._folder / f"{case.name}.{_MADE}").read_text(encoding="utf-8")))

    def make(self) -> dict[str, str]:
        """Make all that is missing, the exporters in turns; returns the reasons of what could not be made, by case."""
        missing = [case for case in self.model.cases if not (self._folder / f"{case.name}.{_MADE}").is_file()]
        if not missing:
            return {}
        self._check_room()
        self._make_checkpoint()
        errors: dict[str, str] = {}
        for turn in range(self.model.export_rounds):
            timed = [case for case in missing if turn == 0 or case in (KIT_INT4, GENAI)]
            for case in timed if turn % 2 == 0 else timed[::-1]:
                if case.name in errors:
                    continue
                try:
                    self._make(case)
                except MeasurementError as error:
                    errors[case.name] = f"could not be made: {error}"
                    self._progress(f"{case.label}: FAILED, {error}")
        return errors

    def remove_checkpoint(self) -> None:
        """Remove what the models were made of: it is larger than all of them."""
        if not self.model.is_real:
            shutil.rmtree(self._hf, ignore_errors=True)

    def remove(self) -> None:
        """Remove everything of this model."""
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def table(self) -> Path:
        """Table of embeddings in float32, for an engine that has none."""
        return self._folder / "table.npy"

    @property
    def graph_without_table(self) -> Path:
        """The builder's graph that is fed embeddings."""
        return self._folder / "genai-embeds"

    @property
    def _hf(self) -> Path:
        return self._folder / "hf"

    @property
    def _checkpoint(self) -> Path:
        """What the kit and llama.cpp read: the GGUF file of the real model, or the folder of a seeded one."""
        return next(Path(smollm2()).glob("*.gguf")) if self.model.is_real else self._hf

    def _check_room(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self._folder).free / 1e9
        if free < self.model.disk_gb:
            raise MeasurementError(
                f"{self.model.label} takes up to {self.model.disk_gb:.0f} GB in {self._folder}, and {free:.1f} GB are "
                "free: free some, or leave the model out with --models"
            )

    def _make_checkpoint(self) -> None:
        if self._hf.is_dir():
            return
        self._progress(f"{self.model.label}: the checkpoint")
        real = self._work / "smollm2-hf"
        if not (real / "hf").is_dir():
            command: list[str | Path] = [self._pythons["peers"], "-m", "benchmarks.peers.make_models", "--model"]
            run([*command, next(Path(smollm2()).glob("*.gguf")), "--out", real, "hf"], _TIMEOUT_S, self._log("hf"))
        if self.model.is_real:
            shutil.copytree(real / "hf", self._hf)
            return
        staging = self._folder / ".hf"
        shutil.rmtree(staging, ignore_errors=True)
        write_model(staging, self.model.name)
        for name in _TOKENIZER:
            if (real / "hf" / name).is_file():
                shutil.copyfile(real / "hf" / name, staging / name)
        staging.rename(self._hf)

    def _make(self, case: Case) -> None:
        """Make a case's model anew, and note what it took beside what earlier rounds took."""
        self._progress(f"{self.model.label}: making {case.label}")
        folder, note = self._folder / case.name, self._folder / f"{case.name}.{_MADE}"
        shutil.rmtree(folder, ignore_errors=True)
        took = {"kit": self._make_kit, "llama_cpp": self._make_gguf, "genai": self._make_genai}[case.engine](
            case, folder
        )
        before = self.made(case)["exports"] if note.is_file() else []
        size = took.pop("shipped_bytes", None) or _size(folder)
        write_json(note, {"shipped_bytes": size, "exports": [*before, took]})

    def _make_kit(self, case: Case, folder: Path) -> Result:
        source = self.path(_gguf_case(self.model, case.source)) if case.source else self._checkpoint
        command: list[str | Path] = ["-m", "adalink.tools", "export", "base", source, "--out", folder]
        option = "--target" if case.bits == LLAMA_CPP else "--quantize"
        took = self._watched("kit", [*command, *([option, case.bits] if case.bits else [])], case)
        return took | {"shipped_bytes": kit_model.finish(folder, has_tasks=self.model.is_real)}

    def _make_gguf(self, case: Case, folder: Path) -> Result:
        folder.mkdir()
        command: list[str | Path] = ["-m", "benchmarks.size.gguf_files", "--model", self._checkpoint]
        command += ["--out", folder / "model.gguf", "--type", case.bits]
        return self._watched("kit", command, case)

    def _make_genai(self, case: Case, folder: Path) -> Result:
        took = self._watched("peers", self._builder(folder, case.bits), case)
        shutil.rmtree(folder / "cache", ignore_errors=True)
        return took

    def _builder(self, out: Path, precision: str) -> list[str | Path]:
        command: list[str | Path] = ["-m", "onnxruntime_genai.models.builder", "-m", self._hf, "-o", out]
        return [*command, "-p", precision, "-e", "cpu", "-c", out / "cache"]

    def make_embedded_graph(self) -> None:
        """The builder's int4 graph without the table, and the table: tasks adapt its input."""
        if not self.graph_without_table.is_dir():
            staging = self._folder / ".genai-embeds"
            shutil.rmtree(staging, ignore_errors=True)
            command = [*self._builder(staging, GENAI.bits), "--extra_options", "exclude_embeds=true"]
            run([self._pythons["peers"], *command], _TIMEOUT_S, self._log("genai-embeds"))
            shutil.rmtree(staging / "cache", ignore_errors=True)
            staging.rename(self.graph_without_table)
        code = "import sys, numpy; from safetensors import safe_open; "
        code += "numpy.save(sys.argv[2], safe_open(sys.argv[1], 'np').get_tensor('model.embed_tokens.weight'))"
        run([self._pythons["peers"], "-c", code, self._hf / "model.safetensors", self.table], 600, self._log("table"))

    def write_inputs(self) -> tuple[Path, Path, Path]:
        """Prompts, and of the real model rows and weights of the tasks; returns their files."""
        prompts, rows, adapters = (self._folder / name for name in ("prompts.json", "rows.json", "adapters.npz"))
        with Deployment.open(self.path(KIT_INT4), variant=KIT_INT4.bits) as deployment:
            example_rows.write_prompts(prompts, deployment.tokenizer)
            if self.model.is_real:
                config = json.loads((self._hf / "config.json").read_text(encoding="utf-8"))
                example_rows.write_rows(rows, deployment.tokenizer, config["eos_token_id"])
                example_rows.write_adapters(adapters)
        return prompts, rows, adapters

    def digest(self, path: Path) -> str:
        """Digest of a model's files, without tasks: what accuracy depends on."""
        root = path / "base" if (path / "base").is_dir() else path
        digest = hashlib.sha256()
        for file in [root] if root.is_file() else sorted(root.rglob("*")):
            if file.is_file():
                digest.update(f"{file.name} {digest_file(file)};".encode())
        return digest.hexdigest()

    def _watched(self, environment: str, command: list[str | Path], case: Case) -> Result:
        python = self._pythons[environment]
        return run_json([python, "-m", "benchmarks.size.watched", python, *command], _TIMEOUT_S, self._log(case.name))

    def _log(self, name: str) -> Path:
        return self._logs / f"{self.model.name}.{name}.log"


def _gguf_case(model: Model, kind: str) -> Case:
    return next(case for case in model.cases if case.engine == "llama_cpp" and case.bits == kind)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
