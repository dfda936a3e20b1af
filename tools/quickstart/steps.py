"""The steps from rows and a model to a measured task: each is a command, and knows what shows that it is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from adalink.runtime.errors import AdaLinkError, ConfigError
from adalink.runtime.rows.shards import digest_rows
from adalink.runtime.rows.source import RowSource
from adalink.runtime.storage.adapter import read_adapter
from adalink.runtime.storage.digest import digest_file
from adalink.runtime.storage.manifest import MANIFEST_FILE
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.runtime.storage.manifest_validation import check_task_name
from adalink.training.data.labelled_rows import has_labels
from adalink.training.data.split_rows import TEST_FILE, TRAIN_FILE
from adalink.training.models.base_kind import find_kind
from adalink.training.models.source import find_source
from adalink.training.run_folder import checkpoints_of

# How a decoder is asked for a label, where no template is given.
TEMPLATE = "Text: {text} Label:"
_VARIANT = "onnxruntime-cpu"
# Steps that all tasks of a deployment share.
BASE, VERIFY = "base", "verify"


@dataclass(frozen=True)
class Step:
    """A step.

    Attributes:
        name: its key in the state of a quick start.
        words: the command, without ``adalink``; files and folders of the user's are paths.
        proof: digests of what it reads and of what it has written; raises ``AdaLinkError``, ``OSError`` or
            ``KeyError`` where something is missing.
        extra: words of this time alone, such as ``--resume``.
    """

    name: str
    words: tuple[str | Path, ...]
    proof: Callable[[], Any]
    extra: Callable[[], Sequence[str]] = tuple

    @property
    def command(self) -> tuple[str, ...]:
        """The words, as they are typed."""
        return tuple(map(str, self.words))

    @property
    def verb(self) -> str:
        """The verb, such as ``"export base"``."""
        return " ".join(self.command[: 2 if self.command[0] == "export" else 1])

    def evidence(self) -> Any:
        """What ``proof`` gives, as JSON has it; ``None`` where something is missing."""
        try:
            return msgspec.json.decode(msgspec.json.encode(self.proof()))
        except (AdaLinkError, OSError, KeyError):
            return None


@dataclass(frozen=True)
class Places:
    """Where a quick start writes: one deployment for all tasks, and the files of a task by its name."""

    out: Path
    task: str

    @property
    def deployment(self) -> Path:
        """The deployment."""
        return self.out / "deployment"

    @property
    def rows(self) -> Path:
        """Folder of the rows to learn from and to test with."""
        return self.out / "rows" / self.task

    @property
    def adapter(self) -> Path:
        """The adapter folder."""
        return self.out / "adapters" / self.task

    @property
    def page(self) -> Path:
        """The evaluation for people."""
        return self.out / "reports" / f"{self.task}.html"

    @property
    def evaluation(self) -> Path:
        """The evaluation as JSON."""
        return self.page.with_suffix(".json")

    @property
    def parity(self) -> Path:
        """What ``verify`` found, as JSON."""
        return self.out / "reports" / "parity.json"


def choose_template(model: str, rows: RowSource) -> str | None:
    """The template of the rows: that which is given; for texts and labels on a decoder ``TEMPLATE``.

    Raises:
        AdaLinkError: rows or model cannot be used.
    """
    if rows.template is not None or find_kind(find_source(model)) != "decoder" or not has_labels(rows):
        return rows.template
    return TEMPLATE


def make_steps(
    model: str, rows: RowSource, places: Places, *, seed: int, revision: str | None = None, training: Sequence[str] = ()
) -> list[Step]:
    """The steps, in their order.

    Args:
        model: the base model.
        rows: the rows, with their columns and template.
        places: where everything goes.
        seed: of the split and of the training.
        revision: of a hub id.
        training: further options of ``adalink train``.
    """
    deployment, adapter = places.deployment, places.adapter
    base = Path(model) if Path(model).expanduser().exists() else model
    revised = [] if revision is None else ["--revision", revision]
    train, test = places.rows / TRAIN_FILE, places.rows / TEST_FILE
    columns = [word for name, column in rows.columns.items() for word in ("--map", f"{name}={column}")]
    template = [] if rows.template is None else ["--template", rows.template]
    seeded = ["--seed", str(seed)]
    learning: tuple[str | Path, ...] = (*revised, "--data", train, "--eval", test)
    report = ("--json-file", places.evaluation)
    checkpoints = checkpoints_of(adapter)
    return [
        Step(
            BASE,
            ("export", "base", base, *revised, "--out", deployment),
            lambda: (stamp(model), _base_of(places)),
            # One that is there without a record may be another model's.
            lambda: ["--replace"] if (deployment / MANIFEST_FILE).exists() else [],
        ),
        Step(
            f"{places.task}/split",
            ("split", rows.path, *columns, *template, "--out", places.rows, *seeded),
            lambda: (digest_rows(rows.path), digest_file(train), digest_file(test)),
        ),
        Step(
            f"{places.task}/train",
            ("train", "--base", base, *learning, "--out", adapter, *seeded, *training),
            lambda: (stamp(model), digest_file(train), digest_file(test), read_adapter(adapter).digest),
            lambda: ["--resume"] if checkpoints.exists() else [],
        ),
        Step(
            f"{places.task}/export",
            ("export", "adapter", adapter, "--out", deployment, "--replace"),
            lambda: (read_adapter(adapter).digest, _task_of(places)),
        ),
        Step(
            VERIFY,
            ("verify", deployment, "--against", base, *revised, "--quick", "--json-file", places.parity),
            lambda: (stamp(model), read_manifest(deployment).digest, digest_file(places.parity)),
        ),
        Step(
            f"{places.task}/eval",
            ("eval", deployment, "--data", test, "--task", places.task, "--html", places.page, *report),
            lambda: (
                _base_of(places),
                _task_of(places),
                *map(digest_file, (test, places.page, places.evaluation)),
            ),
        ),
    ]


def stamp(model: str) -> list[tuple[str, int, int]]:
    """Names, sizes and times of a local model's files; empty for another."""
    path = Path(model).expanduser()
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    known = [(file.name, file.stat()) for file in files if file.is_file()]
    return [(name, found.st_size, found.st_mtime_ns) for name, found in known]


def name_task(task: str | None, rows: Path) -> str:
    """The name of the task; by default that of the rows' file, as far as a task may be called so.

    Raises:
        AdaLinkError: no task can have that name, or nothing of the file's name can be one.
    """
    if task is None:
        letters = (letter if letter.isascii() and letter.isalnum() else "-" for letter in rows.stem)
        if not (task := "".join(letters).strip("-")[:64]):
            raise ConfigError(f"{rows}: nothing of its name can be the name of a task: give one with --task")
    check_task_name(task)
    return task


def _base_of(places: Places) -> tuple[str, str]:
    manifest = read_manifest(places.deployment)
    variants = manifest.variants  # a configuration file may ask for another one
    return manifest.base.weights_digest, variants[_VARIANT if _VARIANT in variants else min(variants)].graph


def _task_of(places: Places) -> str:
    return read_manifest(places.deployment).tasks[places.task].adapter_digest
