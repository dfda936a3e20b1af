"""``adalink serve``: a deployment behind OpenAI's API, every task a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from adalink.runtime.errors import ConfigError
from adalink.tools.command_line.json_output import JsonOutput, json_options
from adalink.tools.command_line.options import (
    deployment_argument,
    engine_options,
    gpu_layers_option,
    kv_cache_option,
    make_options,
)
from adalink.tools.command_line.verb import Verb
from adalink.tools.terminal.terminal_text import echo
from adalink.tools.terminal.verbose import say, warnings_to_stderr

# Time between two looks at the folder.
_WATCH_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class ServeCommandOptions:
    """Options of ``adalink serve``; see ``Deployment.open`` and ``adalink.serving.options``."""

    deployment: Path
    host: str
    port: int
    backend: str
    variant: str | None
    threads: int | None
    kv_cache_dtype: str | None
    gpu_layers: int | None
    slots: int
    context: int | None
    queue: int
    connections: int
    prefix_cache: int
    api_key_file: Path | None
    allow_without_key: bool
    tasks_folder: Path | None
    watch: bool
    body_limit: int | None
    timeout: float | None
    drain: float
    no_page: bool
    output: JsonOutput


@click.command(cls=Verb, short_help="Serve a deployment behind OpenAI's API, every task a model.")
@deployment_argument
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option(
    "-p", "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="The port; 0 for any free one."
)
@engine_options
@kv_cache_option
@gpu_layers_option
@click.option(
    "--slots", type=click.IntRange(min=1), default=16, show_default=True, help="Requests that decode together."
)
@click.option(
    "--context",
    type=click.IntRange(min=1),
    help="Most positions of a request; memory for all slots is then taken once. By default it follows the requests.",
)
@click.option(
    "--queue",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Requests that wait for a slot; further ones are answered with 503.",
)
@click.option(
    "--connections", type=click.IntRange(min=1), default=512, show_default=True, help="Most open connections."
)
@click.option(
    "--prefix-cache",
    metavar="MIB",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Size of the prefix cache: the next turn of a chat reads only what is new.",
)
@click.option(
    "--api-key-file",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File with a key a line; each request must bear one.",
)
@click.option("--allow-without-key", is_flag=True, help="Listen on an address that others reach, without a key.")
@click.option(
    "--tasks-folder",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Let clients add adapter folders inside this one as tasks, and remove tasks.",
)
@click.option("--watch", is_flag=True, help="Take up tasks that are exported into DIR or removed there.")
@click.option(
    "--body-limit",
    metavar="MIB",
    type=click.IntRange(min=1),
    help="Largest body of a request; by default 32 where the base takes images, else 8.",
)
@click.option(
    "--timeout", metavar="SECONDS", type=click.FloatRange(min=0, min_open=True), help="Longest request, with waiting."
)
@click.option(
    "--drain",
    metavar="SECONDS",
    type=click.FloatRange(min=0),
    default=30,
    show_default=True,
    help="Longest wait for running requests at SIGTERM or Ctrl-C.",
)
@click.option("--no-page", is_flag=True, help="Leave out the page at /, which asks several models at once.")
@json_options("Print as JSON where it listens, in one line.")
def command(**values: Any) -> None:
    """Serve the deployment in DIR behind OpenAI's API until Ctrl-C or SIGTERM.

    The base and each task are models. Needs the extra `serve`. Without a key it listens on loopback addresses only.

    \b
    Example:
      adalink serve ./deployment
      adalink serve ./deployment --host 0.0.0.0 --api-key-file keys.txt --slots 32 --variant int4
    """  # noqa: D301
    run(make_options(ServeCommandOptions, values))


def run(options: ServeCommandOptions) -> None:
    """Serve until a signal comes.

    Raises:
        AdaLinkError: the deployment, the address or the key file cannot be used.
    """
    from adalink.runtime.deployment import Deployment
    from adalink.serving.keys import read_keys
    from adalink.serving.options import ServeOptions
    from adalink.serving.server import serve
    from adalink.tools.preflight.deployment import check_deployment

    check_deployment(options.deployment, backend=options.backend, variant=options.variant)
    keys = () if options.api_key_file is None else read_keys(options.api_key_file)
    settings = ServeOptions(
        api_keys=keys,
        tasks_folder=_folder(options.tasks_folder),
        body_bytes=None if options.body_limit is None else options.body_limit << 20,
        request_seconds=options.timeout,
        watch_seconds=_WATCH_SECONDS if options.watch else None,
        drain_seconds=options.drain,
        connections=options.connections,
        slots=options.slots,
        context=options.context,
        page=not options.no_page,
    )
    with (
        warnings_to_stderr(),
        Deployment.open(
            options.deployment,
            options.backend,
            variant=options.variant,
            threads=options.threads,
            prefix_cache_bytes=options.prefix_cache << 20,
            slots=options.slots,
            context=options.context,
            queue_limit=options.queue,
            kv_cache_dtype=options.kv_cache_dtype,
            gpu_layers=options.gpu_layers,
        ) as deployment,
    ):

        def announce(host: str, port: int) -> None:
            url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
            models = [deployment.manifest.base.name, *deployment.tasks]
            page = None if options.no_page else f"{url}/"
            report = {"url": url, "host": host, "port": port, "models": models, "page": page}

            def show() -> None:
                echo(f"serving {', '.join(models)} at {url}/v1{f', with a page at {page}' if page else ''}")
                say(f"next: curl {url}/v1/models")

            options.output.give(report, show, one_line=True)

        serve(
            deployment,
            options.host,
            options.port,
            settings,
            allow_without_key=options.allow_without_key,
            on_listen=announce,
        )


def _folder(path: Path | None) -> Path | None:
    if path is None:
        return None
    if not path.is_dir():
        raise ConfigError(f"--tasks-folder {path} is no folder")
    return path.resolve()
