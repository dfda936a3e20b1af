"""Whether a hub id can be had: from the hub, or from its cache where the hub is out of reach.

transformers and ``huggingface_hub`` try an unreachable hub again and again, for half a minute.
"""

from __future__ import annotations

import socket
import ssl
import threading
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, build_opener, getproxies, proxy_bypass

from adalink.runtime.errors import ModelError

# A hub that does not take a connection within the first time, or does not answer within the second, is out of reach.
_SECONDS, _ANSWER_SECONDS = 0.9, 3.0
# What proxies answer where they reach nobody.
_NOBODY = (502, 503, 504)
_WEIGHTS = (".safetensors", ".bin", ".index.json")
# Hubs that answered.
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
    """Why the hub, or the proxy in front of it, does not answer; empty if it does."""
    if endpoint in _REACHED:
        return ""
    is_connected, reasons = threading.Event(), list[str]()

    def ask() -> None:
        try:
            _ask(endpoint, is_connected)
            reasons.append("")
            _REACHED.add(endpoint)
        except (OSError, HTTPException) as error:
            reasons.append(str(getattr(error, "strerror", None) or error))

    # Looking a name up has no time limit of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_SECONDS)
    if is_connected.is_set():
        thread.join(_ANSWER_SECONDS)
    return reasons[0] if reasons else f"no {'answer' if is_connected.is_set() else 'connection'} in time"


def _ask(endpoint: str, is_connected: threading.Event) -> None:
    """Connect to the hub or its proxy, then ask for the hub's first page: networks take connections for anybody.

    Raises:
        OSError: there is no connection or no answer, or a proxy answers that it reaches nobody.
        HTTPException: the answer is no HTTP.
    """
    address = urlsplit(endpoint)
    proxy = getproxies().get(address.scheme)
    if proxy and not proxy_bypass(address.hostname or ""):
        address = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    port = address.port or (443 if address.scheme == "https" else 80)
    socket.create_connection((address.hostname or "", port), timeout=_SECONDS).close()
    is_connected.set()
    try:
        build_opener().open(Request(endpoint, method="HEAD"), timeout=_ANSWER_SECONDS).close()
    except HTTPError as error:
        if error.code in _NOBODY:
            raise
    except URLError as error:
        if not isinstance(error.reason, ssl.SSLCertVerificationError):  # httpx may know other certificates
            raise
