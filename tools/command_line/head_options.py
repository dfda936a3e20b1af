"""Options of ``adalink train`` for tasks with labels: see ``adalink.training.settings.HeadSettings``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from adalink.runtime.storage.head_spec import PROBLEM_TYPES
from adalink.runtime.storage.pooling_schema import POOLING_MODES
from adalink.training.settings import HEAD_INITS, HEADS, HeadSettings

# Names of the parameters that the options below become.
HEAD_PARAMETERS = ("pooling", "problem_type", "head_kind", "head_lr", "head_init", "head_alone")
_OPTIONS = (
    click.option(
        "--pooling",
        type=click.Choice(POOLING_MODES),
        show_default="the base's own, else mean",
        help="For rows with labels: how the states of a text become one.",
    ),
    click.option(
        "--problem-type",
        type=click.Choice(PROBLEM_TYPES),
        show_default="what the rows look like",
        help="For rows with labels.",
    ),
    click.option(
        "--head",
        "head_kind",
        default=HeadSettings.kind,
        show_default=True,
        type=click.Choice(HEADS),
        help="Likewise: a head that is trained, or none: the label whose text is nearest by the cosine.",
    ),
    click.option(
        "--head-lr", default=HeadSettings.lr, show_default=True, help="Highest learning rate of the head, likewise."
    ),
    click.option(
        "--head-init",
        default=HeadSettings.init,
        show_default=True,
        type=click.Choice(HEAD_INITS),
        help="Where the head starts: fitted to the base's states (a linear probe), or zeros.",
    ),
    click.option("--head-alone", is_flag=True, help="Likewise: train no bottleneck, only a head on the base's states."),
)


def head_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options to a command, in this order."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function
