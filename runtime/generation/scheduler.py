"""Scheduler: requests join and leave one running batch at any step (continuous batching; Orca, OSDI 2022).

One thread owns the batch, and runs while there is something to do. Engines that take no new rows between steps run
closed batches behind the same scheduler.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from adalink.runtime.errors import RequestError
from adalink.runtime.generation.admission import Admission, Runner, SlotAdmission, fail_all
from adalink.runtime.generation.closed_admission import ClosedAdmission
from adalink.runtime.generation.row import Row
from adalink.runtime.generation.running_batch import RunningBatch
from adalink.runtime.generation.waiting_queue import WaitingQueue
from adalink.runtime.logs import get_logger
from adalink.runtime.storage.manifest import Base

_LOG = get_logger(__name__)


class Scheduler:
    """Runs submitted rows; safe for several threads."""

    def __init__(
        self,
        runner: Runner,
        base: Base,
        *,
        slots: int | None = None,
        capacity: int | None = None,
        queue_limit: int | None = None,
    ) -> None:
        """Prepare a scheduler; its thread starts with the first row.

        Args:
            runner: reads prompts, and has the engine.
            base: the contract.
            slots: most rows that decode together; by default 64.
            capacity: positions of a row for which memory is taken once and kept; by default it follows the requests,
                and is freed when the last has ended.
            queue_limit: most rows that wait for a slot; by default any number.
        """
        self._waiting = WaitingQueue(queue_limit)
        self._batch = RunningBatch(runner.embedder)
        self._keeps_state = capacity is not None and runner.slot_engine is not None
        self._admission: Admission = (
            ClosedAdmission(runner, base, slots)
            if runner.slot_engine is None
            else SlotAdmission(runner, runner.slot_engine, base, slots, capacity)
        )
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._is_closed = False

    @property
    def running(self) -> int:
        """Rows that decode now."""
        return len(self._batch.rows)

    @property
    def waiting(self) -> int:
        """Rows that wait for a slot."""
        return len(self._waiting)

    def submit(self, rows: Sequence[Row]) -> None:
        """Run rows, all or none; raises ``QueueFullError``, or ``RequestError`` once it is closed."""
        with self._lock:
            if self._is_closed:
                raise _closed()
            self._waiting.put(rows)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="adalink-scheduler", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """End all rows with an error and free the batch; the last call."""
        with self._lock:
            self._is_closed = True
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        self._batch.close()

    def _run(self) -> None:
        while True:
            with self._lock:
                if self._is_closed:
                    self._end_all(_closed())
                if not (self._batch.rows or self._admission.is_reading or len(self._waiting)):
                    if not self._keeps_state:
                        self._batch.close()
                        self._admission.close()
                    self._thread = None
                    return
            try:
                self._turn()
            except BaseException as error:  # whoever waits is told, whatever it was
                _LOG.warning("a decode step failed: %s", error)
                self._end_running(error)

    def _turn(self) -> None:
        """Read waiting prompts, run one step, and let the rows go that have ended."""
        batch, admission = self._batch, self._admission
        self._waiting.remove_ended()
        batch.remove(Row.stop_if_over, self._leave)
        admission.admit(batch, self._waiting)
        batch.remove(_is_ended, self._leave)
        if not batch.rows:
            return
        if batch.can_speculate and not admission.is_reading and not len(self._waiting):
            batch.speculate()
        else:
            batch.step()
        batch.remove(_is_ended, self._leave)

    def _leave(self, row: Row, index: int) -> None:
        self._admission.leave(self._batch, row, index)
        row.finish()

    def _end_running(self, error: BaseException) -> None:
        """End the rows that decode or are being read; those that wait go on."""
        fail_all([*self._batch.close(), *self._admission.close()], error)

    def _end_all(self, error: RequestError) -> None:
        self._end_running(error)
        while (row := self._waiting.take()) is not None:
            row.fail(error)


def _is_ended(row: Row) -> bool:
    return row.is_ended


def _closed() -> RequestError:
    return RequestError("the deployment is closed: open it again")
