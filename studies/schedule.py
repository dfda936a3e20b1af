"""Doing the runs of a study: each once, in processes of their own, and kept as a file each."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from adalink.runtime.errors import BackendError, DataError, WriteError
from adalink.tools.common.quiet import silence_libraries
from adalink.tools.common.report_file import write_json
from studies.experiment.run import Run, perform
from studies.plan import Cell, Estimates, open_runs

Finished = dict[str, dict[str, Any]]
_LISTEN_S = 1.0


def runs_folder(out: Path) -> Path:
    """Where the finished runs lie, made if need be; raises ``WriteError``."""
    folder = out / "runs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"study: cannot make {folder}: {error.strerror}; choose a writable --out") from error
    return folder


def read_finished(out: Path) -> Finished:
    """The finished runs in a folder by file name, those of other studies among them.

    Raises:
        DataError: a file is not what a run leaves, or its name is not that of the settings in it.
    """
    finished: Finished = {}
    for path in sorted((out / "runs").glob("*.json")):
        try:
            content = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
            name = msgspec.convert(content["run"], Run).file_name
            measured = {"accuracy", "loss", "rows", "score_seconds", "train_seconds"} <= set(content["result"])
        except (OSError, msgspec.DecodeError, KeyError, TypeError) as error:
            raise DataError(f"{path}: is no finished run: {error}; remove it, and the run is done again") from error
        if name != path.name or not measured:
            raise DataError(
                f"{path}: holds {'the run ' + name if measured else 'a run without its measurements'}, expected the "
                "run that it is named for; remove it, and the run is done again"
            )
        finished[path.name] = content
    return finished


def do_runs(
    cells: Sequence[Cell],
    out: Path,
    finished: Finished,
    *,
    jobs: int = 1,
    minutes: float | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> bool:
    """Do the runs that are not finished; each is written as soon as it ends, so that an interruption loses little.

    Args:
        cells: the study's cells.
        out: the study's folder.
        finished: what ``read_finished`` gave; gets what is done.
        jobs: processes; they share the cores evenly, because pools of threads that overlap fight.
        minutes: no run begins that by its estimate would end later.
        say: gets a line for each run that ends.

    Returns:
        whether all runs are done: false where the time did not suffice.

    Raises:
        AdaLinkError: a run failed; those that were done stay.
        BackendError: a process was killed.
    """
    folder = runs_folder(out)
    started = time.monotonic()
    stop = None if minutes is None else started + 60 * minutes
    running: dict[Future[dict[str, Any]], tuple[Cell, Run]] = {}
    with _executor(jobs) as executor:
        try:
            while True:
                busy = {run.file_name for _, run in running.values()}
                estimates = Estimates(list(finished.values()), [cell.base for cell in cells])
                for cell, run in open_runs(cells, finished):
                    if len(running) >= jobs:
                        break
                    seconds = estimates.seconds(run) or 0.0
                    if run.file_name not in busy and (stop is None or time.monotonic() + seconds <= stop):
                        busy.add(run.file_name)
                        running[_submit(executor, cell, run)] = (cell, run)
                if not running:
                    return not any(True for _ in open_runs(cells, finished))
                for future in _first_done(running):
                    cell, run = running.pop(future)
                    content = _keep(future, run, folder, finished)
                    say(_line(cell, run, content, time.monotonic() - started))
        except BrokenProcessPool as error:
            raise BackendError(
                "study: a worker process was killed, most likely because memory ran out; use fewer --jobs, and start "
                "the study again: what was finished is kept"
            ) from error
        except Exception:
            if running:
                say("the study cannot go on; the runs that are under way are finished first (Ctrl-C ends them)")
            while running:
                for future in _first_done(running):
                    _, run = running.pop(future)
                    if future.exception() is None:
                        _keep(future, run, folder, finished)
            raise


def _first_done(running: Iterable[Future[dict[str, Any]]]) -> set[Future[dict[str, Any]]]:
    """Those that have ended, once one has; Ctrl-C just before a wait without end would not be heard."""
    while not (done := wait(running, timeout=_LISTEN_S, return_when=FIRST_COMPLETED).done):
        pass
    return done


def _keep(future: Future[dict[str, Any]], run: Run, folder: Path, finished: Finished) -> dict[str, Any]:
    """Write what a run gave; raises what it raised."""
    content = future.result()
    write_json(folder / run.file_name, content, option="--out")
    finished[run.file_name] = content
    return content


def _submit(executor: Executor | None, cell: Cell, run: Run) -> Future[dict[str, Any]]:
    if executor is not None:
        with _deaf_to_interrupts():
            return executor.submit(perform, run, cell.base.model, cell.data, cell.method, cell.parts)
    done: Future[dict[str, Any]] = Future()
    done.set_result(perform(run, cell.base.model, cell.data, cell.method, cell.parts))
    return done


@contextmanager
def _executor(jobs: int) -> Iterator[Executor | None]:
    """Processes for more than one job, ended where the block is left by an exception; one job runs in this process."""
    if jobs == 1:
        yield None
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # A forked child would inherit PyTorch's threads as locks that nobody opens.
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    executor = ProcessPoolExecutor(jobs, context, initializer=_begin_worker, initargs=(max(1, cores // jobs),))
    try:
        yield executor
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    finally:
        executor.shutdown()


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Processes that begin in the block are deaf to Ctrl-C, which a terminal sends to all: they are ended from here.

    Here it stays pending until the block ends, where to ignore it would lose it.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker(threads: int) -> None:
    """What a worker process does first."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch
    from tqdm import tqdm

    torch.set_num_threads(threads)
    silence_libraries()
    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, and left behind where Ctrl-C ends a worker


def _end_with_parent() -> None:
    """End this process when the study does: one that was killed can tell its workers nothing, and they would wait."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _line(cell: Cell, run: Run, content: Mapping[str, Any], elapsed: float) -> str:
    result = content["result"]
    rate = f", lr {run.lr:g}" if run.lr else ""
    what = "validation" if run.purpose == "choose" else f"seed {run.seed}, test"
    seconds = result["train_seconds"] + result["score_seconds"]
    return f"[{elapsed / 60:5.1f} min] {cell.title}{rate}, {what}: {result['accuracy']:.1%} in {seconds:.0f} s"
