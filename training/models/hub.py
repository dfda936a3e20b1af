"""Whether a hub id can be had: from the hub, or from its cache where the hub is out of reach.

transformers and ``huggingface_hub`` try an unreachable hub again and again, for half a minute.
"""

from __future__ import annotations

import base64
import socket
import threading
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from adalink.runtime.errors import ModelError

# A hub that does not take a connection within this time is out of reach.
_SECONDS = 0.9
_WEIGHTS = (".safetensors", ".bin", ".index.json")
# Hubs that took a connection.
_REACHED: set[str] = set()
# Hub ids, with their revisions, whose files come from the cache alone: a process never mixes two states of a branch.
_LOCAL: set[tuple[str, str | None]] = set()


def check_hub(hub_id: str, revision: str | None = None) -> None:
    """Check that a checkpoint can be had from the hub or, where the hub is out of reach, from its cache.

    Args:
        hub_id: ``org/name``.
        revision: a branch, a tag or a commit; ``None`` for the main branch.

    Raises:
        ModelError: neither; the message says how to go on without a network.
    """
    from huggingface_hub import constants

    if is_local(hub_id, revision):
        return
    if constants.HF_HUB_OFFLINE:
        why, repair = "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE"
    elif reason := _why_unreachable(constants.ENDPOINT):
        why = f"{urlsplit(constants.ENDPOINT).hostname} cannot be reached ({reason})"
        repair = "mend the network (HF_HUB_OFFLINE=1 turns to the cache at once)"
    else:
        return
    if _is_cached(hub_id, revision):
        _LOCAL.add((hub_id, revision))
        return
    what, option = ("it", "") if revision is None else (f"revision {revision!r} of it", f"--revision {revision} ")
    raise ModelError(
        f"base model {hub_id}: there is no such file or folder here, the hub's cache does not hold {what}, and {why}: "
        f"{repair}, or download it where there is a network (hf download {hub_id} {option}--local-dir FOLDER) and pass "
        "the folder"
    )


def is_local(hub_id: str, revision: str | None) -> bool:
    """Whether files of a hub id are to come from the cache alone, as ``check_hub`` found."""
    return (hub_id, revision) in _LOCAL


def _is_cached(hub_id: str, revision: str | None) -> bool:
    """Whether config and weights of a revision are in the hub's cache; of weights in parts, their index."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(hub_id, "config.json", revision=revision)
    return isinstance(config, str) and any(file.name.endswith(_WEIGHTS) for file in Path(config).parent.iterdir())


def _why_unreachable(endpoint: str) -> str:
    """Why no connection to the hub, or through the proxy in front of it, can be made; empty if one could."""
    if endpoint in _REACHED:
        return ""
    reasons: list[str] = []

    def connect() -> None:
        try:
            _connect(urlsplit(endpoint))
            reasons.append("")
            _REACHED.add(endpoint)
        except (OSError, HTTPException) as error:
            reasons.append(str(getattr(error, "strerror", None) or error))

    # Looking a name up has no time limit of its own.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(_SECONDS)
    return reasons[0] if reasons else f"no connection within {_SECONDS:g} s"


def _connect(hub: SplitResult) -> None:
    """Connect to a hub, and close; a proxy is asked for the hub, since itself it is always there.

    Raises:
        OSError: there is no connection.
        HTTPException: the proxy's answer is no HTTP.
    """
    name, port = hub.hostname or "", _port(hub)
    proxy_url = getproxies().get(hub.scheme)
    if not proxy_url or proxy_bypass(name):
        socket.create_connection((name, port), timeout=_SECONDS).close()
        return
    proxy = urlsplit(proxy_url if "://" in proxy_url else f"http://{proxy_url}")
    connection = HTTPConnection(proxy.hostname or "", _port(proxy), timeout=_SECONDS)
    if hub.scheme == "https" and proxy.scheme == "http":
        secret = base64.b64encode(unquote(f"{proxy.username}:{proxy.password or ''}").encode()).decode()
        connection.set_tunnel(name, port, {"Proxy-Authorization": f"Basic {secret}"} if proxy.username else {})
    connection.connect()
    connection.close()


def _port(address: SplitResult) -> int:
    return address.port or (443 if address.scheme == "https" else 80)
