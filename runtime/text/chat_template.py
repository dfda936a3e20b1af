"""Chat templates, rendered in Jinja's sandbox as transformers renders them."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from functools import cached_property
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from adalink.runtime.errors import RequestError

# A text that no template contains, and that templates copy unchanged.
_PROBE = "27182818284590452353602874713527"


class ChatTemplate:
    """A compiled chat template; safe for several threads."""

    def __init__(self, source: str, name: str, **tokens: str) -> None:
        """Compile a template.

        Args:
            source: the template's text.
            name: its name in errors.
            tokens: special tokens that it may use, such as ``bos_token``.

        Raises:
            RequestError: the text is not a Jinja template.
        """
        self._name = name
        try:
            self._template = _environment().from_string(source, tokens)
        except TemplateError as error:
            raise RequestError(f"{name} is no Jinja template: {error}; write the whole prompt yourself") from error

    @cached_property
    def takes_text(self) -> bool:
        """Whether the content of a message is a string; else it is a list of texts and images."""
        try:
            return _PROBE in self.render(_PROBE)
        except RequestError:
            return False

    def render(self, content: str | list[dict[str, str]]) -> str:
        """Render one user message and the generation prompt; raises ``RequestError`` if the template refuses it."""
        try:
            return self._template.render(
                messages=[{"role": "user", "content": content}],
                tools=None,
                documents=None,
                add_generation_prompt=True,
            )
        except Exception as error:  # a template is a program: it raises whatever Python raises
            raise RequestError(f"{self._name} cannot render this message: {error}") from error


class _Generation(Extension):
    """The block ``{% generation %}``, which marks replies for training; rendering ignores it."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        """The statements in the block, in a scope of their own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_render_body"), [], [], body).set_lineno(line)

    def _render_body(self, caller: Callable[[], str]) -> str:
        return caller()


def _environment() -> ImmutableSandboxedEnvironment:
    """The Jinja environment of transformers' ``apply_chat_template``."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    return environment


def _refuse(reason: str) -> None:
    raise TemplateError(reason)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """``tojson`` without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
