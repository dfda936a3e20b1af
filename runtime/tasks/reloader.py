"""Reloader: an open deployment takes up tasks that other processes have written to its folder."""

from __future__ import annotations

import threading
from pathlib import Path

from adalink.runtime.errors import IntegrityError
from adalink.runtime.logs import get_logger
from adalink.runtime.storage.integrity import verify_files
from adalink.runtime.storage.manifest import Manifest, Variant
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.runtime.tasks.registry import TaskRegistry
from adalink.runtime.tasks.task_changes import Reload, check_same_base, is_replaced

_LOG = get_logger(__name__)


class TaskReloader:
    """Reloads the tasks of one open deployment; safe for several threads."""

    def __init__(self, folder: Path, tasks: TaskRegistry, variant: Variant, *, full_check: bool = False) -> None:
        """Prepare.

        Args:
            folder: the deployment.
            tasks: its registry.
            variant: the variant of the base that its engine runs.
            full_check: read every byte of the tasks that are taken up, before they are.
        """
        self._folder, self._tasks, self._variant, self._full_check = folder, tasks, variant, full_check
        self._lock = threading.Lock()  # from reading to taking up: an older manifest never follows a newer one

    def reload(self) -> Reload:
        """Take up the tasks of the manifest on the disk; see ``Deployment.reload``."""
        with self._lock:
            manifest = read_manifest(self._folder)
            while True:
                opened = self._tasks.manifest
                check_same_base(self._folder, opened, manifest, self._variant)
                try:
                    self._verify(opened, manifest)
                    changes = self._tasks.reload(manifest)
                except IntegrityError:
                    # A writer that came in between has removed the files of what it replaced.
                    newer = read_manifest(self._folder)
                    if newer.digest == manifest.digest:
                        raise
                    manifest = newer
                    continue
                _LOG.info("reloaded %s: %s", self._folder, changes)
                return changes

    def _verify(self, opened: Manifest, manifest: Manifest) -> None:
        if not self._full_check:
            return
        names = [name for name in manifest.tasks if name not in opened.tasks or is_replaced(name, opened, manifest)]
        verify_files(self._folder, manifest, [path for name in names for path in manifest.tasks[name].files])
