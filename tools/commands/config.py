"""``adalink config``: which defaults of options are set, and where."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from adalink.runtime.near_names import did_you_mean
from adalink.tools.command_line.config_file import VARIABLE, defaults_for, settable, user_file
from adalink.tools.command_line.json_output import JsonOutput, json_options
from adalink.tools.command_line.next_step import say_next
from adalink.tools.command_line.verb import Verb, config_path, name_variables
from adalink.tools.terminal.terminal_text import echo
from adalink.tools.terminal.verbose import say

_LOCAL_FILE = "adalink.toml"


@dataclass(frozen=True)
class Setting:
    """A default that is set.

    Attributes:
        verb: such as ``export base``.
        option: its long name.
        value: as it is written.
        source: the file or the variable.
        is_used: false for what a variable hides.
    """

    verb: str
    option: str
    value: Any
    source: str
    is_used: bool


@click.command(cls=Verb, short_help="Show which defaults of options are set, and where.")
@json_options("Print the settings as JSON.")
def command(output: JsonOutput) -> None:
    """Show which defaults of options are set by the environment and the configuration file, after checking them.

    The command line comes first, then the environment, then the file. ADALINK_RUN_MAX_NEW_TOKENS is the variable of
    `adalink run --max-new-tokens`. The file is that of --config, else of ADALINK_CONFIG, else config.toml in your own
    folder for settings. It has a table for each verb, such as [run] or [export.base], with options by their long names.

    \b
    Example:
      adalink config
      adalink config --config adalink.toml
      adalink config --json
    """  # noqa: D301
    root = click.get_current_context().find_root()
    given = config_path(root)
    file, settings = find_settings(root, given)
    unknown = list(_unknown_variables(root))
    report = {
        "file": None if file is None else str(file),
        "user_file": str(user_file()),
        "settings": [asdict(setting) for setting in settings],
        "unknown_variables": [name for name, _ in unknown],
    }
    output.give(report, lambda: _show(file, settings))
    for name, near in unknown:
        say(f"note: {name} is no variable of adalink{near}")
    if Path(_LOCAL_FILE).is_file() and given is None:
        say(f"note: {_LOCAL_FILE} of this folder is not read by itself")
        say_next("config", "--config", _LOCAL_FILE, output=output)
    else:
        say_next("doctor", output=output)


def _show(file: Path | None, settings: list[Setting]) -> None:
    echo(f"configuration file: {file or f'none; yours would be {user_file()}'}")
    for setting in settings:
        hidden = "" if setting.is_used else ", which the environment overrides"
        echo(f"adalink {setting.verb} --{setting.option}: {setting.value!r}, from {setting.source}{hidden}")
    if not settings:
        echo("no default is set")


def find_settings(root: click.Context, given: Path | None) -> tuple[Path | None, list[Setting]]:
    """The file that is read and all defaults that are set; raises ``ConfigError`` for a file that is wrong."""
    file, settings = None, []
    for ctx in _verbs(root):
        file, defaults = defaults_for(ctx, given)
        verb = ctx.command_path.removeprefix(f"{root.command_path} ")
        for key, option in settable(ctx.command).items():
            variable = option.envvar if isinstance(option.envvar, str) else ""
            in_environment = os.environ.get(variable)
            if in_environment:
                settings.append(Setting(verb, key, in_environment, variable, True))
            if option.name in defaults:
                settings.append(Setting(verb, key, defaults[option.name], str(file), not in_environment))
    return file, settings


def _verbs(ctx: click.Context) -> Iterator[click.Context]:
    """Contexts of all verbs."""
    assert isinstance(ctx.command, click.Group)
    for name in ctx.command.list_commands(ctx):
        verb = ctx.command.get_command(ctx, name)
        assert verb is not None
        inner = click.Context(verb, parent=ctx, info_name=name)
        name_variables(inner)
        if isinstance(verb, click.Group):
            yield from _verbs(inner)
        else:
            yield inner


def _unknown_variables(root: click.Context) -> Iterator[tuple[str, str]]:
    """Variables that begin like those of the kit, and what they are near to."""
    known = {VARIABLE, *_variables(root)}
    for ctx in _verbs(root):
        known |= _variables(ctx)
    for name in sorted(os.environ):
        if name.startswith("ADALINK_") and name not in known:
            yield name, did_you_mean(name, known)


def _variables(ctx: click.Context) -> set[str]:
    return {
        option.envvar
        for option in ctx.command.params
        if isinstance(option, click.Option) and isinstance(option.envvar, str)
    }
