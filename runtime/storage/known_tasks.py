"""Whether tasks are deployed, said in the same words wherever a name is taken."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from adalink.runtime.errors import UnknownTaskError
from adalink.runtime.near_names import did_you_mean

# Between a task and how many dimensions of it to use, as in ``topics@8``; no task has it in its name.
MARK = "@"
_NESTED = re.compile(rf"([^{MARK}]+){MARK}([1-9][0-9]{{0,5}})")


def split_name(name: str) -> tuple[str, int | None]:
    """The task that a name is of, and how many dimensions of it the name asks for; ``None`` for all."""
    match = _NESTED.fullmatch(name)
    return (match[1], int(match[2])) if match else (name, None)


def check_tasks(
    names: Iterable[str | None], deployed: Collection[str], place: str = "", *, nested: bool = False
) -> None:
    """Check names of tasks.

    Args:
        names: the names; ``None`` is the base model.
        deployed: names of the tasks that are deployed.
        place: file and line that a name is from, for messages.
        nested: whether a name may ask for some dimensions of a task (`adalink.runtime.tasks.nested`).

    Raises:
        UnknownTaskError: a name is none of them.
    """
    for name in names:
        if name is not None and (split_name(name)[0] if nested else name) not in deployed:
            known = ", ".join(sorted(deployed)) or "none"
            where = f"{place}: " if place else ""
            raise UnknownTaskError(
                f"{where}task {name!r} is not deployed here; deployed are: {known}{did_you_mean(name, deployed)}"
            )
