"""``adalink chat``: a conversation with a deployment, in a terminal or line by line from a pipe."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adalink.runtime.errors import AdaLinkError, BackendError, DataError, RequestError
from adalink.runtime.request import check_text
from adalink.runtime.sampling.sampler import SamplingParams
from adalink.runtime.storage.variants import choose_variant
from adalink.tools.command_line.json_output import JsonOutput, json_options
from adalink.tools.command_line.next_step import say_next
from adalink.tools.command_line.options import (
    deployment_argument,
    engine_options,
    gpu_layers_option,
    kv_cache_option,
    make_options,
    sampling_options,
    task_option,
    typed_options,
)
from adalink.tools.command_line.verb import Verb
from adalink.tools.common.chat_session import ChatSession
from adalink.tools.terminal.interrupts import Interrupts
from adalink.tools.terminal.terminal_text import echo, echo_generated, printable

if TYPE_CHECKING:
    from adalink.runtime.storage.manifest import Manifest

# A limit, not taken at once. A position of SmolLM2-135M takes 46 kB in float32, one of a model of 1B some 130 kB.
_CACHE_BYTES = 1 << 30
_FILTERS = ("top_k", "top_p", "min_p")
_HELP = """\
/task          list the tasks
/task NAME     let this task answer; the conversation goes on
/base          let the base model answer, without a task
/system TEXT   set the system message; without TEXT, remove it
/clear         forget the conversation
/reload        take up what 'adalink export adapter' and 'adalink remove' have changed in the folder
/help          show this
/quit          leave, as Ctrl-D does
Ctrl-C ends a reply and keeps what came. A message that begins with / is written with two: //"""


@dataclass(frozen=True, kw_only=True)
class ChatSettings:
    """Options of ``adalink chat``.

    Attributes:
        deployment: the folder.
        task: the task that answers first; ``None`` for the base model.
        system: the system message.
        backend: the engine's backend.
        variant: variant of the base; see ``Deployment.open``.
        threads: threads of the engine.
        kv_cache_dtype: dtype of the KV cache; see ``Deployment.open``.
        gpu_layers: see ``Deployment.open``.
        max_new_tokens: most tokens of a reply.
        sampling: the options of ``SamplingParams``.
        output: where replies go as JSON.
    """

    deployment: Path
    task: str | None
    system: str | None
    backend: str
    variant: str | None
    threads: int | None
    kv_cache_dtype: str | None
    gpu_layers: int | None
    max_new_tokens: int
    sampling: Mapping[str, Any]
    output: JsonOutput


@dataclass(frozen=True)
class _Mode:
    """How lines come, and how replies go out: as text, or as what ``json_line`` makes of them."""

    is_terminal: bool
    prints_json: bool
    json_line: Callable[[Mapping[str, Any]], str]


@click.command(cls=Verb, short_help="Chat with a deployment in the terminal.")
@deployment_argument
@task_option("The task that answers; the base model without it.")
@click.option("--system", metavar="TEXT", help="The system message.")
@click.option(
    "-n",
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    help="Tokens of a reply at most; fewer where the model's context ends.",
)
@sampling_options
@click.option("--repetition-penalty", type=float, help="Above 1, tokens of the conversation get less likely.")
@engine_options
@kv_cache_option
@gpu_layers_option
@json_options("Print one JSON line for each reply, when it is whole.")
def command(**values: Any) -> None:
    """Chat with the deployment in DIR, in its model's chat template.

    The conversation is kept: each turn sees those before it. A conversation that outgrows the model's context loses its
    oldest turns, and says so. Lines that begin with / are commands, such as /task NAME; /help lists them. Ctrl-C ends a
    reply, Ctrl-D leaves. From a pipe, each line is a turn, and an error ends the conversation.

    \b
    Example:
      adalink chat ./deployment
      adalink chat ./deployment --task support --system "Be brief." --temperature 0.7
      printf 'Is corn a grain?\\nAnd rice?\\n' | adalink chat ./deployment
    """  # noqa: D301
    settings = make_options(ChatSettings, values, rest="sampling")
    run(settings)
    say_next("serve", settings.deployment, output=settings.output)


def run(settings: ChatSettings) -> None:
    """Answer lines of standard input until it ends.

    Raises:
        click.UsageError: an option would have no effect.
        AdaLinkError: the deployment cannot chat; from a pipe, also what a turn raises.
    """
    from adalink.runtime.deployment import Deployment
    from adalink.tools.preflight.deployment import check_deployment

    manifest = check_deployment(
        settings.deployment, [settings.task], backend=settings.backend, variant=settings.variant, nested=True
    )
    _check_can_chat(manifest)
    sampling = _sampling(manifest, settings.sampling)
    with Deployment.open(
        settings.deployment,
        settings.backend,
        variant=settings.variant,
        threads=settings.threads,
        prefix_cache_bytes=_cache_bytes(manifest, settings),
        kv_cache_dtype=settings.kv_cache_dtype,
        gpu_layers=settings.gpu_layers,
    ) as deployment:
        session = ChatSession(
            deployment,
            task=settings.task,
            system=settings.system,
            max_new_tokens=settings.max_new_tokens,
            sampling=sampling,
        )
        is_terminal = sys.stdin is not None and sys.stdin.isatty()
        if is_terminal:
            with contextlib.suppress(ImportError):
                importlib.import_module("readline")  # `input` then has a history, and keys that edit
            echo(f"{manifest.base.name}: /help lists commands; Ctrl-C ends a reply, Ctrl-D leaves", err=True)
        with settings.output.lines() as json_line:
            _converse(session, _Mode(is_terminal, settings.output.on_stdout, json_line))


def _check_can_chat(manifest: Manifest) -> None:
    """Check that a base takes conversations; raises ``RequestError``."""
    base = manifest.base
    if base.kind == "encoder":
        raise RequestError(f"{base.name} is an encoder and writes no text: use 'adalink run', which prints its states")
    if base.tokenizer is None or base.chat_template is None:
        raise RequestError(
            f"{base.name} has no chat template, so it was not trained for conversations: use 'adalink run' with whole "
            "prompts, or export a model that has one, such as an 'Instruct' model"
        )


def _sampling(manifest: Manifest, values: Mapping[str, Any]) -> SamplingParams:
    params, base = SamplingParams(**values), manifest.base
    unused = typed_options(_FILTERS)
    if unused and params.resolve(base.generation, base.vocab_size).temperature == 0:
        raise click.UsageError(f"{unused[0]} needs a --temperature above 0: the likeliest token is taken without one")
    return params


def _cache_bytes(manifest: Manifest, settings: ChatSettings) -> int:
    """Size of the prefix cache: a turn then reads only what is new. 0 for engines that cannot go on from a prefix."""
    try:
        variant = manifest.variants[choose_variant(manifest, settings.backend, settings.variant)]
    except BackendError:
        return 0  # opening says what is wrong
    base = manifest.base
    goes_on = variant.target in ("onnxruntime-cpu", "llama.cpp") and base.kind == "decoder"
    return _CACHE_BYTES if goes_on and not base.bidirectional_prompt else 0


def _converse(session: ChatSession, mode: _Mode) -> None:
    """Answer lines until they end. In a terminal an error is shown, and the conversation goes on."""
    while True:
        try:
            line = _read_line(f"{session.task or ''}> ") if mode.is_terminal else _read_piped()
            if line is None or not _answer(session, line.strip(), mode):
                break
        except AdaLinkError as error:
            if not mode.is_terminal:
                raise
            echo(f"Error: {error}", err=True)
        except KeyboardInterrupt:
            if not mode.is_terminal:
                raise
            echo("\n/quit or Ctrl-D leaves", err=True)


def _read_line(prompt: str) -> str | None:
    """A line from the terminal; ``None`` at its end. Raises ``DataError``."""
    is_shown = sys.stdout is not None and sys.stdout.isatty()
    try:
        return input(printable(prompt) if is_shown else "")
    except EOFError:
        echo(err=True)
        return None
    except UnicodeDecodeError as error:
        raise DataError(f"this line is not UTF-8 text: {error}") from error


def _read_piped() -> str | None:
    """A line of standard input; ``None`` at its end. Raises ``DataError``."""
    if sys.stdin is None:
        return None
    try:
        line = sys.stdin.readline()
    except UnicodeDecodeError as error:
        raise DataError(f"standard input: cannot be read as UTF-8 text: {error}") from error
    return line.removeprefix("\ufeff") if line else None


def _answer(session: ChatSession, text: str, mode: _Mode) -> bool:
    """Answer a message, or do what a command says; returns whether the conversation goes on."""
    if text.startswith("/") and not text.startswith("//"):
        name, _, argument = text.partition(" ")
        return _obey(session, name, argument.strip())
    if text:
        _reply(session, text[1:] if text.startswith("//") else text, mode)
    return True


def _obey(session: ChatSession, name: str, argument: str) -> bool:
    """Do what a command says; returns whether the conversation goes on. Raises ``RequestError``."""
    if name in ("/quit", "/exit"):
        return False
    if name == "/help":
        echo(_HELP, err=True)
    elif name == "/clear":
        session.clear()
        echo("the conversation is forgotten", err=True)
    elif name == "/reload":
        changes = [f"{what} {', '.join(names)}" for what, names in asdict(session.reload()).items() if names]
        echo("; ".join(changes) or "nothing has changed", err=True)
    elif name == "/system":
        session.use_system(argument or None)
        echo("the system message is set" if argument else "there is no system message", err=True)
    elif name == "/base" or (name == "/task" and argument):
        session.use_task(None if name == "/base" else argument)
        echo(f"task {session.task} answers" if session.task else "the base model answers", err=True)
    elif name == "/task":
        for task in (None, *session.tasks):
            echo(f"{'*' if task == session.task else ' '} {task or '(base model)'}", err=True)
    else:
        raise RequestError(f"{name} is no command: /help lists them; write // to begin a message with /")
    return True


def _reply(session: ChatSession, text: str, mode: _Mode) -> None:
    """Send a message and print its reply as it comes; in a terminal Ctrl-C ends it."""
    check_text(text, "the message")
    with Interrupts() if mode.is_terminal else contextlib.nullcontext() as interrupts:
        turn = session.send(text)
        if interrupts is not None:
            interrupts.call(turn.handle.cancel)
        if turn.dropped:
            turns = "the oldest turn was" if turn.dropped == 1 else f"the {turn.dropped} oldest turns were"
            echo(f"[{turns} left out: the conversation has outgrown the model's context]", err=True)
        try:
            for piece in turn.handle:
                if not mode.prints_json:
                    echo_generated(piece.text, nl=False)
        finally:
            turn.handle.cancel()  # without effect on a reply that has ended
            if not mode.prints_json:
                echo_generated("")
        generation = turn.handle.result()
    line = mode.json_line({"message": turn.text, "task": session.task, **asdict(generation)})
    if mode.prints_json:
        echo_generated(line)
    session.keep(turn, generation.text)
    if generation.finish_reason == "cancelled":
        echo("[stopped]" if generation.text else "[stopped before any text: this turn is forgotten]", err=True)
    elif generation.finish_reason == "length":
        echo(f"[ended at its limit of {turn.limit} tokens]", err=True)
