"""Options of the running command. Separate from the console, so that plain verbs do not import ``rich``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")

# Of every verb that reads the tokenizer of a base model.
assume_pretokenizer_option = click.option(
    "--assume-pretokenizer",
    metavar="NAME",
    help="How a GGUF file that does not say it splits texts before BPE, by llama.cpp's name, such as gpt-2 or smollm.",
)


def make_options(kind: type[T], values: Mapping[str, Any], rest: str | None = None) -> T:
    """The values of a command's options as one dataclass.

    Args:
        kind: the dataclass; its fields are named as the command's parameters.
        values: what click gives the command.
        rest: the field for all other values.
    """
    names = {field.name for field in fields(kind)}
    arguments = {name: value for name, value in values.items() if name in names}
    if rest is not None:
        arguments[rest] = {name: value for name, value in values.items() if name not in names}
    return kind(**arguments)


def is_given(parameter: str) -> bool:
    """Whether an option of the running command was passed, rather than left at its default."""
    return click.get_current_context().get_parameter_source(parameter) is not ParameterSource.DEFAULT
