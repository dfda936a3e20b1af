"""Which revision of a hub id is meant, and the token that it takes: of every download of a base."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from adalink.runtime.errors import ConfigError
from adalink.training.models.hub import is_local


@dataclass(frozen=True)
class HubAccess:
    """What a download takes beside the hub id.

    Attributes:
        revision: a branch, a tag or a commit; ``None`` for the main branch.
        token: the user's token; ``None`` for the one that huggingface_hub knows, if any. Never shown.
    """

    revision: str | None = None
    token: str | None = field(default=None, repr=False)


_PLAIN = HubAccess()
_current: ContextVar[HubAccess] = ContextVar("adalink_hub_access", default=_PLAIN)


@contextmanager
def hub_access(spec: str | Path, access: HubAccess) -> Iterator[None]:
    """Load bases with a revision and a token until the block ends; a block around it may have the token.

    Args:
        spec: the base that is loaded.
        access: what its downloads take.

    Raises:
        ConfigError: a revision of a base that is a folder or file here.
    """
    if access.revision is not None and Path(spec).expanduser().exists():
        raise ConfigError(
            f"base model {Path(spec).name} is a file or folder here and has no revision {access.revision!r}: leave "
            "--revision out, which is for hub ids"
        )
    before = _current.set(replace(access, token=access.token or _current.get().token))
    try:
        yield
    finally:
        _current.reset(before)


def hub_revision() -> str | None:
    """The revision that downloads take."""
    return _current.get().revision


def download_options(origin: str | Path) -> dict[str, Any]:
    """Arguments of a download; empty for what is here.

    ``revision`` and ``token`` if there are any, and ``local_files_only`` if ``check_hub`` found the hub out of reach.
    """
    if Path(origin).expanduser().exists():
        return {}
    access = _current.get()
    only = is_local(str(origin), access.revision) or None
    options = {"revision": access.revision, "token": access.token, "local_files_only": only}
    return {name: value for name, value in options.items() if value is not None}
