"""The configuration file: defaults of options, a table for each verb.

One file is read: that of ``--config``, else of ``ADALINK_CONFIG``, else ``config.toml`` in the user's own folder. A
file in the current folder is not read by itself: it may come with somebody else's repository, and could open a server.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import click

from adalink.runtime.errors import ConfigError
from adalink.runtime.near_names import did_you_mean

VARIABLE = "ADALINK_CONFIG"
# Secrets do not belong into files, and the others are of the command line alone.
_NOT_IN_FILES = ("token", "config", "help", "version")


def user_file() -> Path:
    """The file in the user's own folder, whether it is there or not."""
    return Path(click.get_app_dir("adalink")) / "config.toml"


def read_config(path: Path) -> dict[str, Any]:
    """Tables of a file, not yet checked; raises ``ConfigError``."""
    # `adalink --help` is to be quick: the reader is imported where there is a file.
    from msgspec import DecodeError

    from adalink.runtime.storage.decoding import decode_toml

    try:
        return decode_toml(path.read_bytes().removeprefix(codecs.BOM_UTF8), dict[str, Any])
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except DecodeError as error:
        raise ConfigError(
            f"{path} is not TOML: {error}; expected tables such as [run] with lines task = 'x'"
        ) from error


def defaults_for(ctx: click.Context, given: Path | None) -> tuple[Path | None, dict[str, Any]]:
    """The file that is read and what it says of a verb, by names of parameters, as click's ``default_map``.

    Args:
        ctx: the context of the verb.
        given: the file that is asked for; ``None`` for the user's own, if it is there.

    Raises:
        ConfigError: it cannot be read, has a table or an option that there is not, or a value of another kind.
    """
    path = given or user_file()
    if given is None and not path.is_file():
        return None, {}
    table: Any = read_config(path)
    contexts = _contexts(ctx)
    for outer, inner in pairwise(contexts):
        _check_tables(path, outer, table)
        table = table.get(inner.info_name, {})
    return path, dict(_checked(f"{path}: [{'.'.join(_words(ctx))}]", ctx.command, table))


def option_key(option: click.Option) -> str:
    """The name of an option in files: its long one, without dashes in front."""
    return next((name for name in option.opts if name.startswith("--")), option.opts[0]).lstrip("-")


def settable(command: click.Command) -> dict[str, click.Option]:
    """Options of a verb that a file may set, by their names there."""
    options = {option_key(one): one for one in command.params if isinstance(one, click.Option)}
    return {key: option for key, option in options.items() if key not in _NOT_IN_FILES}


def _contexts(ctx: click.Context) -> list[click.Context]:
    return [*(() if ctx.parent is None else _contexts(ctx.parent)), ctx]


def _words(ctx: click.Context) -> list[str]:
    return [one.info_name or "" for one in _contexts(ctx)[1:]]


def _check_tables(path: Path, ctx: click.Context, table: Mapping[str, Any]) -> None:
    """Check that a table has tables of verbs and nothing else; raises ``ConfigError``."""
    assert isinstance(ctx.command, click.Group)
    verbs, words = ctx.command.list_commands(ctx), _words(ctx)
    for name, entry in table.items():
        title = ".".join((*words, name))
        if name not in verbs:
            raise ConfigError(
                f"{path}: {title} is no verb, expected a table of one, such as [{'.'.join((*words, verbs[0]))}]"
                f"{did_you_mean(name, verbs)}"
            )
        if not isinstance(entry, dict):
            raise ConfigError(f"{path}: {title} is {entry!r:.60}, expected a table of options: [{title}]")


def _checked(where: str, command: click.Command, table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    options = settable(command)
    for key, value in table.items():
        if key == "token":
            raise ConfigError(f"{where} has a token, which does not belong into a file: set HF_TOKEN instead")
        if key not in options:
            raise ConfigError(
                f"{where} has {key!r}, expected options by their long names, without dashes in front"
                f"{did_you_mean(key, options)}"
            )
        option = options[key]
        assert option.name is not None
        yield option.name, _value(f"{where} {key}", option, value)


def _value(where: str, option: click.Option, value: Any) -> Any:
    """A value as click takes it; raises ``ConfigError`` for one of another kind."""
    if option.multiple:
        entries = value if isinstance(value, list) else [value]
        if all(_is_plain(entry) for entry in entries):
            return entries
        raise ConfigError(f"{where} is {value!r:.60}, expected a list of texts or numbers")
    if option.is_flag:
        if isinstance(value, bool):
            return value
        raise ConfigError(f"{where} is {value!r:.60}, expected true or false")
    if not _is_plain(value):
        raise ConfigError(f"{where} is {value!r:.60}, expected a text or a number")
    return value


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)
