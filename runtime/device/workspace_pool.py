"""Workspace pool: each workspace serves one call at a time and is closed when unused."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

from adalink.runtime.errors import RequestError


class Workspace(Protocol):
    """An item of the pool."""

    def close(self) -> None:
        """Free its resources."""
        ...


S = TypeVar("S", bound=Workspace)


class WorkspacePool(Generic[S]):
    """Free workspaces; their number grows to the most concurrent calls so far. Safe for several threads."""

    def __init__(self, make: Callable[[], S]) -> None:
        self._make = make
        self._free: list[S] = []
        self._lent = 0
        self._at_end: Callable[[], None] | None = None
        self._lock = threading.Lock()

    def take(self) -> S:
        """A workspace for exclusive use until ``give``; raises ``RequestError`` if the pool is closed."""
        with self._lock:
            if self._at_end is not None:
                raise RequestError("the deployment is closed: open it again")
            self._lent += 1
            if self._free:
                return self._free.pop()
        try:
            return self._make()
        except BaseException:
            self._end_one()
            raise

    def give(self, workspace: S) -> None:
        """Return a workspace."""
        with self._lock:
            is_open = self._at_end is None
            if is_open:
                self._free.append(workspace)
        if not is_open:
            workspace.close()
        self._end_one()

    @contextmanager
    def lend(self) -> Iterator[S]:
        """A workspace for exclusive use within the block."""
        workspace = self.take()
        try:
            yield workspace
        finally:
            self.give(workspace)

    def close(self, at_end: Callable[[], None] = lambda: None) -> None:
        """Close free workspaces now and the others on return; then call ``at_end``, once."""
        with self._lock:
            if self._at_end is not None:
                return
            self._at_end = at_end
            free, self._free = self._free, []
            is_last = self._lent == 0
        for workspace in free:
            workspace.close()
        if is_last:
            at_end()

    def _end_one(self) -> None:
        with self._lock:
            self._lent -= 1
            at_end = self._at_end if self._lent == 0 else None
        if at_end is not None:
            at_end()
