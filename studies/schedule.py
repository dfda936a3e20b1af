"""Scheduler of a study: worker processes do each run once, and each finished run is kept at once."""

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

from adalink.runtime.errors import BackendError
from adalink.tools.terminal.quiet import silence_libraries
from studies.experiment.run import perform
from studies.experiment.run_settings import Run
from studies.plan import Cell, Estimates, open_runs
from studies.run_store import FinishedRuns, runs_folder, write_run

_LISTEN_S = 1.0


def do_runs(
    cells: Sequence[Cell],
    out: Path,
    finished: FinishedRuns,
    *,
    jobs: int = 1,
    minutes: float | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> bool:
    """Do the runs that are not finished. Each is written as soon as it ends, so an interruption loses little.

    Args:
        cells: the study's cells.
        out: the study's folder.
        finished: what ``read_runs`` gave; gets what is done.
        jobs: worker processes. They share the cores evenly: overlapping thread pools slow each other down.
        minutes: time limit. No run begins whose estimate ends after it.
        progress: called with a line for each run that ends.

    Returns:
        whether all runs are done; false where the time ran out.

    Raises:
        AdaLinkError: a run failed; finished runs are kept.
        BackendError: a process was killed.
    """
    runs_folder(out)
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
                    content = _keep(future, run, out, finished)
                    progress(_line(cell, run, content, time.monotonic() - started))
        except BrokenProcessPool as error:
            raise BackendError(
                "study: a worker process was killed, most likely because memory ran out; use fewer --jobs, and start "
                "the study again: what was finished is kept"
            ) from error
        except Exception:
            if running:
                progress("the study cannot go on; the runs that are under way are finished first (Ctrl-C ends them)")
            while running:
                for future in _first_done(running):
                    _, run = running.pop(future)
                    if future.exception() is None:
                        _keep(future, run, out, finished)
            raise


def _first_done(running: Iterable[Future[dict[str, Any]]]) -> set[Future[dict[str, Any]]]:
    """The runs that have ended, once one has. The wait has a timeout: Ctrl-C would not interrupt an endless one."""
    while not (done := wait(running, timeout=_LISTEN_S, return_when=FIRST_COMPLETED).done):
        pass
    return done


def _keep(future: Future[dict[str, Any]], run: Run, out: Path, finished: FinishedRuns) -> dict[str, Any]:
    """Write the result of a run; raises what the run raised."""
    content = future.result()
    write_run(out, run.file_name, content)
    finished[run.file_name] = content
    return content


def _submit(executor: Executor | None, cell: Cell, run: Run) -> Future[dict[str, Any]]:
    if executor is not None:
        with _blocked_interrupts():
            return executor.submit(perform, run, cell.base.model, cell.data, cell.method, cell.parts)
    done: Future[dict[str, Any]] = Future()
    done.set_result(perform(run, cell.base.model, cell.data, cell.method, cell.parts))
    return done


@contextmanager
def _executor(jobs: int) -> Iterator[Executor | None]:
    """Worker processes, ended where the block raises; ``None`` for one job, which runs in this process."""
    if jobs == 1:
        yield None
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # A forked child would inherit locks of PyTorch's threads, and nobody would release them.
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
def _blocked_interrupts() -> Iterator[None]:
    """Block Ctrl-C for processes that start in the block: a terminal sends it to all, and this process ends them.

    In this process the signal stays pending until the block ends; ignoring it would lose it.
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
    """Initialise a worker process."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch
    from tqdm import tqdm

    torch.set_num_threads(threads)
    silence_libraries()
    tqdm.set_lock(threading.RLock())  # the default is a system semaphore, which leaks where Ctrl-C ends a worker


def _end_with_parent() -> None:
    """End this worker when the study's process ends: a killed process cannot tell its workers, and they would wait."""
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
