"""Options of the running command. Separate from the console, so that plain verbs do not import ``rich``."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from adalink.runtime.storage.manifest import KV_CACHE_DTYPES
from adalink.tools.command_line.config_file import option_key
from adalink.tools.command_line.shell_completion import complete_backends, complete_tasks, complete_variants

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
F = TypeVar("F", bound=Callable[..., Any])

# Of every verb that reads the tokenizer of a base model.
assume_pretokenizer_option = click.option(
    "--assume-pretokenizer",
    metavar="NAME",
    help="How a GGUF file that does not say it splits texts before BPE, by llama.cpp's name, such as gpt-2 or smollm.",
)


def deployment_argument(command: F) -> F:
    """``DIR``: of every verb that reads or changes a deployment."""
    return click.argument("deployment", metavar="DIR", type=click.Path(path_type=Path))(command)


def engine_options(command: F) -> F:
    """``--backend``, ``--variant`` and ``--threads``: of every verb that opens a deployment to run it."""
    return backend_option(variant_option()(threads_option(command)))


def backend_option(command: F) -> F:
    """``--backend``."""
    return click.option(
        "-b",
        "--backend",
        default="onnxruntime-cpu",
        show_default=True,
        shell_complete=complete_backends,
        help="Which engine.",
    )(command)


def variant_option(
    help_text: str = "Which form of the base, such as int4; not a quantised one by default.",
    *names: str,
    **settings: Any,
) -> Callable[[F], F]:
    """``--variant``; ``names`` and ``settings`` are click's."""
    return click.option(
        "--variant", *names, metavar="NAME", shell_complete=complete_variants, help=help_text, **settings
    )


def kv_cache_option(command: F) -> F:
    """``--kv-cache-dtype``."""
    return click.option(
        "--kv-cache-dtype",
        type=click.Choice(("float32", *KV_CACHE_DTYPES)),
        help="Of the KV cache; int8 takes a quarter of float32's memory and needs 'adalink export kv-cache'.",
    )(command)


def gpu_layers_option(command: F) -> F:
    """``--gpu-layers``."""
    return click.option(
        "--gpu-layers",
        type=click.IntRange(min=1),
        help="Layers whose weights llama.cpp puts on a GPU, in a build for one. Not tried on a GPU yet.",
    )(command)


def threads_option(command: F) -> F:
    """``--threads``."""
    return click.option("-j", "--threads", type=click.IntRange(min=1), help="Threads of the engine.")(command)


def task_option(help_text: str, *names: str, **settings: Any) -> Callable[[F], F]:
    """``--task``; ``names`` and ``settings`` are click's."""
    return click.option(
        "-t", "--task", *names, metavar="NAME", shell_complete=complete_tasks, help=help_text, **settings
    )


def out_option(help_text: str) -> Callable[[F], F]:
    """``--out``, a folder that is written."""
    return click.option("-o", "--out", required=True, type=click.Path(path_type=Path, file_okay=False), help=help_text)


def map_option(command: F) -> F:
    """``--map``: of every verb that reads rows."""
    return click.option(
        "--map",
        "columns",
        multiple=True,
        metavar="NAME=COLUMN,...",
        help="Which columns of the rows are text, label and so on, such as text=body,label=topic.",
    )(command)


def template_option(command: F) -> F:
    """``--template``: of every verb that reads rows with prompts."""
    return click.option(
        "--template",
        metavar="TEXT",
        help="Make prompts of columns, such as 'Text: {text} Topic:'; a label becomes the completion.",
    )(command)


def require_rows(has_rows: bool, *parameters: str) -> None:
    """Refuse ``--map`` and ``--template`` where there are no rows; raises ``click.UsageError``."""
    if not has_rows and (given := [name for name in parameters if is_typed(name)]):
        raise click.UsageError(
            f"{'--map' if given[0] == 'columns' else '--template'} is for the rows of --rows: leave it out"
        )


def rows_option(help_text: str) -> Callable[[F], F]:
    """``--rows``, also named ``--jsonl``: a file of rows to answer."""

    def add(command: F) -> F:
        option = click.option(
            "-r",
            "--rows",
            "--jsonl",
            "jsonl",
            metavar="FILE",
            type=click.Path(path_type=Path),
            help=help_text,
        )
        return option(command)

    return add


def sampling_options(command: F) -> F:
    """How tokens are drawn: of every verb that generates text."""
    for option in reversed(_SAMPLING_OPTIONS):
        command = option(command)
    return command


_SAMPLING_OPTIONS = (
    click.option(
        "--temperature",
        type=float,
        help="0 takes the likeliest token. By default as the base's generation config says, else 0.",
    ),
    click.option("--top-k", type=int, help="Sample from the k likeliest tokens, 0 for all; with a temperature."),
    click.option(
        "--top-p", type=float, help="Sample from the likeliest tokens of this probability; with a temperature."
    ),
    click.option("--min-p", type=float, help="Sample from tokens of this share of the best one; with a temperature."),
    click.option("--seed", type=int, help="Make sampling repeatable."),
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


def is_typed(parameter: str) -> bool:
    """Whether an option of the running command is on its command line; a default for all calls is no demand."""
    return click.get_current_context().get_parameter_source(parameter) is ParameterSource.COMMANDLINE


def typed_options(parameters: Container[str]) -> list[str]:
    """Long names of the options among ``parameters`` that are on the command line."""
    options = [one for one in click.get_current_context().command.params if isinstance(one, click.Option)]
    return [f"--{option_key(one)}" for one in options if one.name in parameters and is_typed(one.name)]


def is_given(parameter: str) -> bool:
    """Whether an option of the running command has a value of the user's, wherever that stands."""
    return click.get_current_context().get_parameter_source(parameter) is not ParameterSource.DEFAULT
