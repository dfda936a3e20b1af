"""``--revision`` and ``--token``: the same of every verb that takes a hub id."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from adalink.training.models.hub_access import HubAccess

F = TypeVar("F", bound=Callable[..., Any])


def hub_options(command: F) -> F:
    """Both options; the command takes them as one ``access: HubAccess``. For ``Verb`` alone."""
    command = click.option(
        "--token",
        envvar="HF_TOKEN",
        show_envvar=True,
        metavar="TOKEN",
        help="Token for the hub. Better set the variable: others may see a command line.",
    )(command)
    return click.option("--revision", metavar="NAME", help="Branch, tag or commit of a hub id.")(command)


def join_hub_options(values: dict[str, Any]) -> None:
    """Replace the values of both options by ``access``."""
    if "revision" in values:
        values["access"] = HubAccess(values.pop("revision"), values.pop("token"))
