"""Waiting queue: requests that have no slot yet, taken in turns between tasks."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Sequence

from adalink.runtime.errors import QueueFullError
from adalink.runtime.generation.row import Row


class WaitingQueue:
    """Rows by task, safe for several threads. The tasks take turns, so that none holds up the others."""

    def __init__(self, limit: int | None = None) -> None:
        """``limit`` is the most rows that wait; ``None`` for any number."""
        self._limit = limit
        self._by_task: OrderedDict[str | None, deque[Row]] = OrderedDict()
        self._count = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._count

    def put(self, rows: Sequence[Row]) -> None:
        """Append rows, all or none; raises ``QueueFullError``."""
        with self._lock:
            if self._limit is not None and self._count + len(rows) > self._limit:
                raise QueueFullError(
                    f"{self._count} requests wait already and {len(rows)} more would pass the limit of {self._limit}: "
                    "try again later"
                )
            for row in rows:
                self._by_task.setdefault(row.options.task, deque()).append(row)
            self._count += len(rows)

    def take(self) -> Row | None:
        """The first row of the task whose turn it is; ``None`` if no row waits."""
        with self._lock:
            if not self._by_task:
                return None
            task, rows = self._by_task.popitem(last=False)
            row = rows.popleft()
            if rows:
                self._by_task[task] = rows
            self._count -= 1
            return row

    def put_back(self, row: Row) -> None:
        """Give back a row that ``take`` gave: it will be the next."""
        with self._lock:
            self._by_task.setdefault(row.options.task, deque()).appendleft(row)
            self._by_task.move_to_end(row.options.task, last=False)
            self._count += 1

    def remove_ended(self) -> None:
        """Remove rows that were cancelled or whose deadline has passed."""
        with self._lock:
            for task, rows in list(self._by_task.items()):
                left = deque(row for row in rows if not row.stop_if_over())
                self._count -= len(rows) - len(left)
                if left:
                    self._by_task[task] = left
                else:
                    del self._by_task[task]
