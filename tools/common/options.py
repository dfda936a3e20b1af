"""What the options of the running command say, apart from the console: a verb that prints plainly needs no ``rich``."""

from __future__ import annotations

import click
from click.core import ParameterSource


def is_given(parameter: str) -> bool:
    """Whether an option of the running command was passed, rather than left at its default."""
    return click.get_current_context().get_parameter_source(parameter) is not ParameterSource.DEFAULT
