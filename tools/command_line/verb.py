"""A verb of ``adalink``: the options that all have, and where values of options come from.

The command line comes first, then the environment (``ADALINK_RUN_TASK`` for ``adalink run --task``), then the
configuration file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from adalink.runtime.near_names import did_you_mean
from adalink.tools.command_line.config_file import VARIABLE, defaults_for, option_key
from adalink.tools.command_line.hub_options import join_hub_options
from adalink.tools.command_line.json_output import join_json_options
from adalink.tools.terminal.verbose import verbosity

# Keys of ``Context.meta``, which a verb shares with its group.
_LEVELS, _CONFIG, _ARGUMENTS = (f"adalink.{name}" for name in ("levels", "config", "arguments"))
_SOURCES = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT, ParameterSource.DEFAULT_MAP)


class _CommonOptions(click.Command):
    """What verbs and groups share."""

    def __init__(self, *arguments: Any, **values: Any) -> None:
        super().__init__(*arguments, **values)
        self.params += _make_options()

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse a command line; errors say where a value comes from that is not on it."""
        name_variables(ctx)
        ctx.meta.setdefault(_ARGUMENTS, list(args))  # the outermost command has all of them
        try:
            return super().parse_args(ctx, args)
        except click.BadParameter as error:
            if source := _source(error):
                message = f"{error.message} (from {source})"
                raise click.BadParameter(message, error.ctx, error.param, error.param_hint) from error
            raise


class Verb(_CommonOptions):
    """A command with ``--config``, ``-v`` and ``-q``.

    Its function takes ``output`` where it has ``json_options``, and ``access`` where it has ``hub_options``.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse a command line; an old ``--json FILE`` is told what it is called now."""
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            is_json = any(word == "--json" or word.startswith("--json=") for word in given)
            if is_json and ("unexpected extra argument" in error.message or "does not take a value" in error.message):
                message = f"{error.message.rstrip('.')}. --json prints to standard output; for a file: --json-file FILE"
                raise click.UsageError(message, error.ctx) from error
            raise

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, as quietly as its options say."""
        join_json_options(ctx.params)
        join_hub_options(ctx.params)
        with verbosity(_level(ctx)):
            return super().invoke(ctx)


class VerbGroup(_CommonOptions, click.Group):
    """A group of verbs; for an unknown one it names the nearest."""

    command_class = Verb

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find a verb; raises ``click.UsageError`` if there is none of that name."""
        name = args[0]
        if ctx.resilient_parsing or name.startswith("-") or self.get_command(ctx, name) is not None:
            return super().resolve_command(ctx, args)
        raise click.UsageError(f"No such command {name!r}{did_you_mean(name, self.list_commands(ctx))}", ctx)


def typed_words(ctx: click.Context) -> list[str]:
    """The words of the command line behind the program's name, as they were typed."""
    words: list[str] = ctx.meta[_ARGUMENTS]
    return words


def words_for_steps(ctx: click.Context) -> list[str]:
    """What a verb gives on to the verbs that it runs: ``--config``, ``-v`` and ``-q``, as far as they were typed."""
    level, typed = _level(ctx), ParameterSource.COMMANDLINE
    is_typed = any(one.get_parameter_source("config") is typed for one in (ctx, ctx.find_root()))
    words = ["--config", str(config_path(ctx))] if is_typed else []
    return [*words, *(["-q"] if level < 0 else [f"-{'v' * level}"] if level else [])]


def config_path(ctx: click.Context) -> Path | None:
    """The configuration file that the command line or the environment asks for."""
    path: Path | None = ctx.meta.get(_CONFIG)
    return path


def name_variables(ctx: click.Context) -> None:
    """Give each option of a verb its environment variable, by its long name."""
    words, at = [], ctx
    while at.parent is not None:
        words.append(at.info_name or "")
        at = at.parent
    for option in ctx.command.params:
        if isinstance(option, click.Option) and option.envvar is None and not option.is_eager:
            name = "_".join(("adalink", *reversed(words), option_key(option)))
            option.envvar = name.upper().replace("-", "_")


def _make_options() -> list[click.Parameter]:
    return [
        click.Option(
            ["--config"],
            type=click.Path(path_type=Path, dir_okay=False),
            metavar="FILE",
            envvar=VARIABLE,
            is_eager=True,  # the defaults of the others come from it
            expose_value=False,
            callback=_take_config,
            help="TOML file with defaults of options; see `adalink config`.",
        ),
        click.Option(
            ["-v", "--verbose"],
            count=True,
            expose_value=False,
            callback=_take_verbose,
            help="Details, and log events on stderr; -vv logs what caches saved too.",
        ),
        click.Option(
            ["-q", "--quiet"],
            is_flag=True,
            expose_value=False,
            callback=_take_quiet,
            help="Errors and the answer alone.",
        ),
    ]


def _take_config(ctx: click.Context, _: click.Parameter, path: Path | None) -> None:
    if path is not None:
        ctx.meta[_CONFIG] = path
    if not ctx.resilient_parsing and not isinstance(ctx.command, click.Group):
        ctx.meta[_CONFIG], ctx.default_map = defaults_for(ctx, config_path(ctx))


def _take_verbose(ctx: click.Context, option: click.Parameter, count: int | None) -> None:
    _keep_level(ctx, option, count or 0)


def _take_quiet(ctx: click.Context, option: click.Parameter, is_quiet: bool | None) -> None:
    _keep_level(ctx, option, -1 if is_quiet else 0)


def _keep_level(ctx: click.Context, option: click.Parameter, level: int) -> None:
    """Note what one option of a verb or of its group says; it may be said before the verb and behind it."""
    assert option.name is not None
    ctx.meta.setdefault(_LEVELS, []).append((ctx.get_parameter_source(option.name), level))


def _level(ctx: click.Context) -> int:
    """How much to say: what the command line says, else the environment, else the file; see ``verbosity``."""
    said: list[tuple[ParameterSource, int]] = ctx.meta.get(_LEVELS, [])
    for source in _SOURCES:
        levels = [level for origin, level in said if origin is source]
        if min(levels, default=0) < 0 < max(levels, default=0):
            raise click.UsageError("give one of --verbose and --quiet")
        if any(levels):
            return max(-1, sum(levels))
    return 0


def _source(error: click.BadParameter) -> str:
    """Where a wrong value comes from; empty if it was typed, or there is none."""
    ctx, option = error.ctx, error.param
    if ctx is None or not isinstance(option, click.Option) or option.name is None:
        return ""
    source = ctx.get_parameter_source(option.name)
    if source is ParameterSource.ENVIRONMENT:
        return f"the environment variable {option.envvar}"
    return f"{ctx.meta[_CONFIG]}: {option_key(option)}" if source is ParameterSource.DEFAULT_MAP else ""
