"""What the shell offers for an option: tasks, backends and variants of the deployment that is typed already."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from adalink.runtime.backends import BACKENDS
from adalink.tools.command_line.verb import typed_words

Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def complete_tasks(ctx: click.Context, option: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of the deployment's tasks."""
    return _starting(incomplete, _manifest(ctx).get("tasks", {}))


def complete_variants(ctx: click.Context, option: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of the deployment's variants."""
    return _starting(incomplete, _manifest(ctx).get("variants", {}))


def complete_backends(ctx: click.Context, option: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Backends that the deployment has variants for; all without a deployment."""
    variants = _manifest(ctx).get("variants", {}).values()
    return _starting(incomplete, sorted({name for one in variants for name in one["backends"]}) or BACKENDS)


def complete_files(ctx: click.Context, option: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Files and folders, where a hub id may stand too; the shell finds them."""
    return [CompletionItem(incomplete, type="file")]


def _manifest(ctx: click.Context) -> dict[str, Any]:
    """The manifest of the first deployment among the words that are typed, unchecked; empty without one.

    Not of the parsed arguments: there are none while an option still lacks its value.
    """
    from adalink.runtime.storage.decoding import decode_json

    for word in typed_words(ctx):
        try:
            return decode_json((Path(word).expanduser() / "manifest.json").read_bytes(), dict[str, Any])
        except (OSError, ValueError, RuntimeError):
            continue
    return {}


def _starting(incomplete: str, names: Iterable[str]) -> list[CompletionItem]:
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]
