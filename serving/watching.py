"""Watching the deployment folder: tasks that were exported or removed are taken up without a pause."""

from __future__ import annotations

import asyncio
from dataclasses import asdict

from adalink.runtime.errors import AdaLinkError
from adalink.runtime.logs import get_logger
from adalink.runtime.storage.manifest import MANIFEST_FILE
from adalink.serving.gateway import Gateway

_LOG = get_logger(__name__)


async def watch(gateway: Gateway, seconds: float) -> None:
    """Reload the deployment whenever its manifest has changed, until this is cancelled.

    What cannot be taken up, such as a damaged file, is logged; the tasks then stay as they were.

    Args:
        gateway: whose deployment it is.
        seconds: time between two looks.
    """
    known = await gateway.in_thread(_look, gateway)
    while True:
        await asyncio.sleep(seconds)
        found = await gateway.in_thread(_look, gateway)
        if found == known:
            continue
        known = found
        try:
            changes = asdict(await gateway.in_thread(gateway.deployment.reload))
            _LOG.info("reloaded: %s", {what: names for what, names in changes.items() if names})
        except AdaLinkError as error:
            _LOG.error("the folder has changed and cannot be taken up: %s", error)
        except Exception:
            _LOG.exception("the folder has changed and cannot be taken up")


def _look(gateway: Gateway) -> tuple[int, int, int] | None:
    """What tells a manifest from the next: a new one is another file."""
    try:
        state = (gateway.deployment.path / MANIFEST_FILE).stat()
    except OSError:
        return None
    return state.st_ino, state.st_mtime_ns, state.st_size
