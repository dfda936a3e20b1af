"""The known name that is nearest to a mistyped one."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'topics'?"``, the end of a message; empty where no known name is near."""
    spelled = {one.lower(): one for one in known}
    near = get_close_matches(name.lower(), list(spelled), 1)
    return f"; did you mean {spelled[near[0]]!r}?" if near else ""
