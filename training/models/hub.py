"""Whether a hub id can be had: from the hub's cache, or from the hub, which is asked before anything waits for it.

transformers and ``huggingface_hub`` try an unreachable hub again and again, for half a minute.
"""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from adalink.runtime.errors import ModelError

# A hub that does not take a connection within this time is out of reach.
_SECONDS = 3.0
# Hubs that took a connection.
_REACHED: set[str] = set()


def check_hub(hub_id: str) -> None:
    """Check that a checkpoint lies in the hub's cache or that the hub can be reached.

    Args:
        hub_id: ``org/name``.

    Raises:
        ModelError: neither; the message says how to go on without a network.
    """
    from huggingface_hub import constants

    if any(Path(constants.HF_HUB_CACHE).glob(f"models--{hub_id.replace('/', '--')}/snapshots/*/*")):
        return
    if constants.HF_HUB_OFFLINE:
        why, repair = "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE"
    elif reason := _why_unreachable(constants.ENDPOINT):
        why, repair = f"{urlsplit(constants.ENDPOINT).hostname} cannot be reached ({reason})", "mend the network"
    else:
        return
    raise ModelError(
        f"base model {hub_id}: there is no such file or folder here, the hub's cache does not hold it, and {why}: "
        f"{repair}, or download it where there is a network (hf download {hub_id} --local-dir FOLDER) and pass the "
        "folder"
    )


def _why_unreachable(endpoint: str) -> str:
    """Why no connection to the hub, or to the proxy in front of it, can be made; empty if one could."""
    if endpoint in _REACHED:
        return ""
    address = urlsplit(endpoint)
    proxy = getproxies().get(address.scheme)
    if proxy and not proxy_bypass(address.hostname or ""):
        address = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    reasons: list[str] = []

    def connect() -> None:
        try:
            port = address.port or (443 if address.scheme == "https" else 80)
            socket.create_connection((address.hostname or "", port), timeout=_SECONDS).close()
            reasons.append("")
            _REACHED.add(endpoint)
        except OSError as error:
            reasons.append(str(error.strerror or error))

    # Looking a name up has no time limit of its own.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(_SECONDS)
    return reasons[0] if reasons else f"no connection within {_SECONDS:g} s"
