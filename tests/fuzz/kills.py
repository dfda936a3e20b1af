"""Kill tests: a change of a deployment dies at a random moment, and the deployment is whole all the same.

After each kill the manifest is the one before the change or the one after it, every file fits its digest, the tokens
of the base and of each task are those of that manifest, and the next writer works.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from adalink.export.adapter.export import export_adapter
from adalink.export.writer import remove_task, remove_variant
from adalink.runtime.deployment import Deployment
from adalink.runtime.errors import AdaLinkError
from adalink.runtime.storage.manifest import MANIFEST_FILE

PROMPTS = ["abc", "hello there"]


@dataclass(frozen=True)
class Change:
    """A change of a deployment.

    Attributes:
        name: of the change.
        apply: makes it, in a deployment.
        weight: share of the kills.
        prepare: makes the deployment that it starts from, out of the corpus's.
        imports: modules that are imported before it is timed and killed, or most kills would come while they are.
    """

    name: str
    apply: Callable[[Path], object]
    weight: int
    prepare: Callable[[Path], object] = lambda folder: None
    imports: tuple[str, ...] = ()


@dataclass
class Kills:
    """What a run counted: kills by change, those that came before the commit, after it, or too late, and faults."""

    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    faults: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def kills(self) -> int:
        return sum(count["before"] + count["after"] for count in self.counts.values())

    def as_json(self) -> dict[str, Any]:
        return {"kills": self.kills, "seconds": round(self.seconds, 1), "changes": self.counts, "faults": self.faults}


def changes(corpus: Path) -> list[Change]:
    """Every change there is: of a base, a task, a variant."""
    adapters = corpus / "text" / "adapters"

    def add_portable(folder: Path) -> object:
        from helpers.tiny_models import FAMILIES  # these bring PyTorch, which the other changes do without
        from helpers.tiny_tokenizer import make_tokenizer

        from adalink.export.base.export import export_base

        return export_base(FAMILIES["llama"](), folder, tokenizer=make_tokenizer(), target="portable")

    def add_engine(folder: Path) -> object:
        from adalink.export.engine.export import export_engine

        return export_engine(folder, "tensorrt-rtx", target=("sm86",), profile="batch=1:1:2,seq=1:4:8,past=0:4:20")

    heavy = ("transformers.models.llama.modeling_llama", "helpers.tiny_models", "adalink.export.base.export", "onnx")
    found = [
        Change("base", add_portable, 2, imports=heavy),
        Change("adapter", lambda folder: export_adapter(adapters / "beta", folder, name="new"), 8),
        Change("replace", lambda folder: export_adapter(adapters / "beta", folder, name="alpha", replace=True), 8),
        Change("remove", lambda folder: remove_task(folder, "alpha"), 8),
        Change("remove variant", lambda folder: remove_variant(folder, "portable"), 4, add_portable),
    ]
    if find_spec("tensorrt_rtx_bindings") or find_spec("tensorrt_rtx"):  # it builds for a GPU that is not here
        found.append(Change("engine", add_engine, 1, add_portable, heavy))
    return found


def answers(folder: Path) -> dict[str, Any]:
    """Tokens of the base and of each task, each file checked; and the manifest."""
    with Deployment.open(folder, threads=1, full_check=True) as opened:
        found = {
            str(task): [list(row.token_ids) for row in opened.generate(PROMPTS, tasks=task, max_new_tokens=6)]
            for task in (None, *opened.tasks)
        }
        return found | {"variants": sorted(opened.manifest.variants)}


class _Subject:
    """One change with the deployments before and after it, and how long it takes."""

    def __init__(self, change: Change, corpus: Path, work: Path) -> None:
        self.change, self.work = change, work
        for name in change.imports:
            import_module(name)
        self.before_folder = Path(shutil.copytree(corpus / "text" / "deployment", work / "before"))
        _finish(_fork(change.prepare, self.before_folder))
        after = Path(shutil.copytree(self.before_folder, work / "after"))
        _finish(_fork(change.apply, after))
        # A second time: the first one reads the libraries from the disk.
        again = Path(shutil.copytree(self.before_folder, work / "timed"))
        begun = time.perf_counter()
        _finish(_fork(change.apply, again))
        self.seconds = time.perf_counter() - begun
        self.before, self.after = answers(self.before_folder), answers(after)
        self.manifest_before = (self.before_folder / MANIFEST_FILE).read_bytes()

    def kill_once(self, rng: np.random.Generator) -> tuple[str, str]:
        """Kill the change at a random moment; returns where it was, and the fault if there is one."""
        folder = self.work / "killed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.before_folder, folder)
        # Every second kill towards the end, where files are renamed in.
        delay = self.seconds * float(rng.uniform(0.0 if rng.integers(2) else 0.7, 1.1))
        begun = time.perf_counter()
        is_killed = _end(_fork(self.change.apply, folder), delay)
        if not is_killed:  # the machine was busier when it was timed
            self.seconds = min(self.seconds, time.perf_counter() - begun)
        try:
            where = "after" if (folder / MANIFEST_FILE).read_bytes() != self.manifest_before else "before"
            found = answers(folder)
            if found != (self.after if where == "after" else self.before):
                return where, f"answers are neither the old nor the new ones: {found}"
            if where == "before":
                _finish(_fork(self.change.apply, folder))  # the next writer, which removes what the killed one left
                if answers(folder) != self.after:
                    return where, "the next writer's deployment answers otherwise"
            left = [path for path in folder.rglob("*") if path.name.startswith(".") and path.name != ".lock"]
            if where == "before" and left:
                return where, f"the next writer left {left[0].name}"
        except (AdaLinkError, OSError) as error:
            return "before", f"{type(error).__name__}: {error}"
        return where if is_killed else "too late", ""


def _fork(change: Callable[[Path], object], folder: Path) -> int:
    """Begin a change in a child: no library of the parent has threads or locks that a fork would break."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            change(folder)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def _finish(child: int) -> None:
    """Wait for a change that is not killed; raises ``ChildProcessError`` if it fails."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        raise ChildProcessError(f"the change failed with exit code {code}")


def _end(child: int, delay: float) -> bool:
    """Kill a child after ``delay`` seconds; returns whether it still ran."""
    deadline = time.monotonic() + delay
    while time.monotonic() < deadline:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(min(0.0005, delay))
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def run_kills(
    corpus: Path,
    work: Path,
    kills: int,
    *,
    seed: int = 0,
    seconds: float | None = None,
    names: tuple[str, ...] = (),
    progress: Callable[[Kills], None] = lambda counted: None,
) -> Kills:
    """Kill changes at random moments, in turns, until so many were killed.

    Args:
        corpus: the whole inputs (``fuzz.corpus``).
        work: an empty folder to work in.
        kills: their number; a change that was done before its moment came is not counted.
        seed: of the moments.
        seconds: stop after this time, whatever their number.
        names: the changes; all by default.
        progress: called after every kill.
    """
    counted, begun, rng = Kills(), time.monotonic(), np.random.default_rng(seed)
    chosen = [change for change in changes(corpus) if change.name in names or not names]
    subjects = {change.name: _Subject(change, corpus, work / change.name) for change in chosen}
    turns = [change.name for change in chosen for _ in range(change.weight)]
    while counted.kills < kills and (seconds is None or counted.seconds < seconds):
        name = turns[int(rng.integers(len(turns)))]
        where, fault = subjects[name].kill_once(rng)
        counts = counted.counts.setdefault(name, {"before": 0, "after": 0, "too late": 0})
        counts[where] += 1
        if fault:
            counted.faults.append({"change": name, "where": where, "fault": fault})
        counted.seconds = time.monotonic() - begun
        progress(counted)
    return counted
