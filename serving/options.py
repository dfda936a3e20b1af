"""Options of the server: limits, keys, and what may be changed while it runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from adalink.runtime.arguments import check_whole
from adalink.runtime.errors import ConfigError
from adalink.runtime.request import is_number

# Most bytes of a request's body, without images and with them.
TEXT_BODY_BYTES, IMAGE_BODY_BYTES = 8 << 20, 32 << 20
# Most bytes of a request's line and headers.
HEADER_BYTES = 32 << 10


@dataclass(frozen=True)
class ServeOptions:
    """Options of ``make_app`` and ``serve``.

    Attributes:
        api_keys: keys of which each request must bear one; none for an open server.
        tasks_folder: folder of adapter folders that ``/v1/load_lora_adapter`` may add; ``None`` turns it off.
        body_bytes: most bytes of a request's body; by default 32 MiB where the base takes images, else 8 MiB.
        bodies_bytes: most bytes of the bodies of all requests under way; by default 16 times ``body_bytes``.
        body_seconds: most seconds from a request's headers to the end of its body.
        header_seconds: most seconds until a request's headers have come.
        send_seconds: most seconds in which a client takes nothing of an answer; then its connection is cut.
        connections: most open connections. One more closes the one that has been without a request for longest; where
            all have one, it is answered with 503.
        request_seconds: most seconds of a request, waiting included; then it is answered with 504. ``None``: any.
        watch_seconds: how often the deployment folder is looked at for tasks that were exported or removed; ``None``:
            never.
        drain_seconds: most seconds that running requests get at shutdown.
        checks_host: refuse requests for another host than ``localhost`` or an address. A page of another site can make
            its name point at this machine, and would then ask as one of ours.
        slots: requests that decode together, as the deployment was opened; for ``/metrics``.
        context: most positions of a request, as the deployment was opened; for ``/v1/models``.
        page: whether there is a page at ``/``, which asks several models at once in a browser.

    Raises:
        ConfigError: a value is out of range.
    """

    api_keys: tuple[str, ...] = ()
    tasks_folder: Path | None = None
    body_bytes: int | None = None
    bodies_bytes: int | None = None
    body_seconds: float = 60.0
    header_seconds: float = 20.0
    send_seconds: float = 60.0
    connections: int = 512
    request_seconds: float | None = None
    watch_seconds: float | None = None
    drain_seconds: float = 30.0
    checks_host: bool = False
    slots: int = 64
    context: int | None = None
    page: bool = True

    def __post_init__(self) -> None:
        for name in ("body_bytes", "bodies_bytes"):
            if getattr(self, name) is not None:
                check_whole(getattr(self, name), name, 1)
        check_whole(self.slots, "slots", 1)
        check_whole(self.connections, "connections", 1)
        if not all(self.api_keys):
            raise ConfigError("api_keys holds an empty key: every request would bear it")
        for name in (
            "body_seconds",
            "header_seconds",
            "send_seconds",
            "request_seconds",
            "watch_seconds",
            "drain_seconds",
        ):
            value = getattr(self, name)
            if value is not None and (not is_number(value) or not 0 <= value < float("inf")):
                raise ConfigError(f"{name} is {value!r}, expected a number of seconds of at least 0")
