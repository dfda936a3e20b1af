"""Whether tasks are deployed, said in the same words wherever a name is taken."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from adalink.runtime.errors import UnknownTaskError
from adalink.runtime.near_names import did_you_mean


def check_tasks(names: Iterable[str | None], deployed: Collection[str], place: str = "") -> None:
    """Check names of tasks.

    Args:
        names: the names; ``None`` is the base model.
        deployed: names of the tasks that are deployed.
        place: file and line that a name is from, for messages.

    Raises:
        UnknownTaskError: a name is none of them.
    """
    for name in names:
        if name is not None and name not in deployed:
            known = ", ".join(sorted(deployed)) or "none"
            where = f"{place}: " if place else ""
            raise UnknownTaskError(
                f"{where}task {name!r} is not deployed here; deployed are: {known}{did_you_mean(name, deployed)}"
            )
