"""The plan of a study: its cells, the runs of each, and which of them can be done now."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import msgspec

from adalink.training.device import resolve_device
from studies.experiment.data import DataSet, digest_rows
from studies.experiment.run import choose_scored, open_base, open_data
from studies.experiment.run_settings import Run
from studies.experiment.scoring import check_positions
from studies.experiment.settings import Base, Data, Method, Study, TrainedMethod, ZeroShotMethod, describe_method


@dataclass(frozen=True)
class Cell:
    """One method on one base, data set and training size. Its learning rate is chosen, then every seed runs.

    Attributes:
        base: the base.
        data: the data set.
        parts: the entries that it combines.
        method: the method.
        size: rows learned from; ``None`` for all, and for what learns nothing.
        choose: a run for each learning rate; empty where there is nothing to choose.
        finals: the measured runs with a learning rate still to be filled in.
    """

    base: Base
    data: Data
    parts: tuple[Data, ...]
    method: Method
    size: int | None
    choose: tuple[Run, ...]
    finals: tuple[Run, ...]

    @property
    def title(self) -> str:
        """The name of the cell in tables and messages."""
        rows = "" if isinstance(self.method, ZeroShotMethod) else f", {self.size or 'all'} rows"
        return f"{self.base.name}, {self.data.name}, {self.method.name}{rows}"

    def chosen(self, finished: Mapping[str, Mapping[str, Any]]) -> float | None:
        """The learning rate, or ``None`` while runs that choose it are missing.

        The highest accuracy on validation wins, then the lowest loss there, then the lower rate; a run that diverged
        loses to every other.

        Args:
            finished: the finished runs by file name.
        """
        if isinstance(self.method, ZeroShotMethod):
            return 0.0
        if not self.choose:
            return self.method.lr[0]
        if any(run.file_name not in finished for run in self.choose):
            return None
        return max(self.choose, key=lambda run: _merit(run, finished[run.file_name]["result"])).lr

    def measured(self, finished: Mapping[str, Mapping[str, Any]]) -> list[Run]:
        """The final runs; none while the learning rate is not chosen."""
        lr = self.chosen(finished)
        return [] if lr is None else [msgspec.structs.replace(run, lr=lr) for run in self.finals]


def make_cells(study: Study) -> list[Cell]:
    """The cells of a study, in the order of its file: bases, data sets, sizes, methods.

    A method that learns nothing has one cell for a base and data set, and one run in it.

    Raises:
        AdaLinkError: a base or data set cannot be loaded, or a size is larger than a data set.
    """
    device = resolve_device(study.device)
    cells = []
    for base in study.bases:
        for entry in study.data:
            data = open_data(entry, study.parts(entry))
            _check_positions(study, base, entry, data)
            digest_train = _train_digests(data)
            methods = [method for method in study.methods if entry.methods is None or method.name in entry.methods]
            for index, size in enumerate(study.sizes):
                for method in methods:
                    if isinstance(method, ZeroShotMethod):
                        if index == 0:
                            cells.append(_zero_shot(study, base, entry, data, method, device))
                    elif size in (method.sizes or study.sizes):
                        rows = None if size == "all" else int(size)
                        cells.append(_trained(study, base, entry, data, method, rows, device, digest_train))
    return cells


def _check_positions(study: Study, base: Base, entry: Data, data: DataSet) -> None:
    """Refuse rows of a study that the base has no positions for; raises ``DataError``."""
    loaded, times = open_base(base.model), max(1, len(study.parts(entry)))
    rows = {row: None for purpose, count in (("choose", times * study.search.rows), ("final", entry.test_rows))
            for row in choose_scored(data, purpose, count)}  # fmt: skip
    for seed in (study.search.seed, *study.seeds):
        for size in study.sizes:
            rows |= dict.fromkeys(data.subset(None if size == "all" else int(size), seed))
    methods = [method for method in study.methods if entry.methods is None or method.name in entry.methods]
    soft = max(getattr(method, "tokens", 0) for method in methods)
    check_positions(loaded.model, loaded.tokenizer, data, list(rows), soft)


def open_runs(cells: Sequence[Cell], finished: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[Cell, Run]]:
    """The runs that can be done now, in the order of the cells."""
    for cell in cells:
        for run in (*cell.choose, *cell.measured(finished)):
            if run.file_name not in finished:
                yield cell, run


def waiting(cells: Sequence[Cell], finished: Mapping[str, Mapping[str, Any]]) -> list[tuple[Cell, Run]]:
    """The final runs whose learning rate is not chosen yet."""
    return [(cell, run) for cell in cells if cell.chosen(finished) is None for run in cell.finals]


def count_open(cells: Sequence[Cell], finished: Mapping[str, Mapping[str, Any]]) -> int:
    """How many runs are left, those among them that wait for others."""
    return len(waiting(cells, finished)) + sum(1 for _ in open_runs(cells, finished))


class Estimates:
    """Estimated seconds of a run, from finished runs of the same base, device, precision and method (else any method).

    Args:
        finished: contents of finished runs.
        bases: the study's bases; ``seconds_per_step`` counts where nothing was measured.
    """

    def __init__(self, finished: Sequence[Mapping[str, Any]], bases: Sequence[Base]) -> None:
        self._declared = {base.name: base.seconds_per_step for base in bases}
        self._steps: dict[tuple[str, ...], list[float]] = {}
        self._rows: dict[tuple[str, ...], list[float]] = {}
        for content in finished:
            run, result = content["run"], content["result"]
            for key in _keys(run["base"], run["device"], run.get("precision", "float32"), run["method"]):
                self._rows.setdefault(key, []).append(result["score_seconds"] / result["rows"])
                if run["max_steps"]:
                    self._steps.setdefault(key, []).append(result["train_seconds"] / run["max_steps"])

    def seconds(self, run: Run) -> float | None:
        """The estimate; ``None`` where the base has no finished run and declares no time."""
        a_step = self._known(self._steps, run) if run.max_steps else 0.0
        if a_step is None:
            a_step = self._declared.get(run.base)
        a_row = self._known(self._rows, run)
        if a_row is None and (declared := self._declared.get(run.base)) is not None:
            a_row = declared / (3 * run.batch_size)  # a forward pass is about a third of a step
        return None if a_step is None or a_row is None else run.max_steps * a_step + run.scored_rows * a_row

    @staticmethod
    def _known(table: Mapping[tuple[str, ...], Sequence[float]], run: Run) -> float | None:
        for key in _keys(run.base, run.device, run.precision, run.method):
            if key in table:
                return statistics.median(table[key])
        return None


def _keys(base: str, device: str, precision: str, method: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return (base, device, precision, str(method["kind"])), (base, device, precision)


def _train_digests(data: DataSet) -> Callable[[int | None, int], str]:
    """The digest of a subset by size and seed, computed once for all methods."""
    return lru_cache(maxsize=None)(lambda size, seed: digest_rows(data, data.subset(size, seed)))


def _trained(
    study: Study,
    base: Base,
    entry: Data,
    data: DataSet,
    method: TrainedMethod,
    size: int | None,
    device: str,
    digest_train: Callable[[int | None, int], str],
) -> Cell:

    def run(purpose: str, seed: int, lr: float, steps: int, count: int | None) -> Run:
        return _run(study, base, entry, data, method, purpose, count, device,
                    train_digest=digest_train(size, seed), size=size, seed=seed, lr=lr,
                    max_steps=times * steps)  # fmt: skip

    search, parts = study.search, study.parts(entry)
    times = max(1, len(parts))  # each data set is learned in as many steps as alone
    rates = method.lr if len(method.lr) > 1 else ()
    choose = tuple(run("choose", search.seed, lr, search.max_steps, times * search.rows) for lr in rates)
    finals = tuple(run("final", seed, 0.0, study.training.max_steps, entry.test_rows) for seed in study.seeds)
    return Cell(base, entry, parts, method, size, choose, finals)


def _zero_shot(study: Study, base: Base, entry: Data, data: DataSet, method: Method, device: str) -> Cell:
    final = _run(study, base, entry, data, method, "final", entry.test_rows, device,
                 train_digest="", size=None, seed=0, lr=0.0, max_steps=0)  # fmt: skip
    return Cell(base, entry, study.parts(entry), method, None, (), (final,))


def _run(
    study: Study, base: Base, entry: Data, data: DataSet, method: Method, purpose: Any, count: int | None,
    device: str, **training: Any,
) -> Run:  # fmt: skip
    scored = choose_scored(data, purpose, count)
    settings = describe_method(method)
    defaults = {"tokens": 0, "init": "kaiming", "lr_ratio": 1.0}  # runs done before AdaLink knew them keep their names
    for name, default in defaults.items():
        if settings.get(name) == default:
            del settings[name]
    return Run(
        purpose=purpose,
        base=base.name,
        base_digest=open_base(base.model).digest,
        data=entry.name,
        words=max(part.words for part in study.parts(entry) or (entry,)),
        scored_digest=digest_rows(data, scored),
        scored_rows=len(scored),
        method=settings,
        batch_size=study.training.batch_size,
        device=device,
        precision=study.training.precision if training["max_steps"] else "float32",  # nothing is trained
        **training,
    )


def _merit(run: Run, result: Mapping[str, Any]) -> tuple[bool, float, float, float]:
    loss = float("inf") if result["loss"] is None else result["loss"]
    return not result["diverged"], result["accuracy"], -loss, -run.lr
