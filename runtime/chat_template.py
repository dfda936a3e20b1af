"""A model's chat template, rendered as transformers renders it, in Jinja's sandbox."""

from __future__ import annotations

from functools import cached_property

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from adalink.runtime.errors import RequestError

# No template has it, and none that writes a message changes it.
_PROBE = "27182818284590452353602874713527"


class ChatTemplate:
    """A template, compiled once; safe for use from several threads."""

    def __init__(self, source: str, name: str, **tokens: str) -> None:
        """Compile a template.

        Args:
            source: its text.
            name: what to call it in errors.
            tokens: special tokens that it may write, such as ``bos_token``.

        Raises:
            RequestError: it is no template.
        """
        self._name = name
        try:
            self._template = _environment().from_string(source, tokens)
        except TemplateError as error:
            raise RequestError(f"{name} is no Jinja template: {error}; write the whole prompt yourself") from error

    @cached_property
    def takes_text(self) -> bool:
        """Whether a message may be a plain text; else it is a list of texts and images."""
        try:
            return _PROBE in self.render(_PROBE)
        except RequestError:
            return False

    def render(self, content: str | list[dict[str, str]]) -> str:
        """A user's message, ready for the reply; raises ``RequestError`` if the template refuses it."""
        try:
            return self._template.render(messages=[{"role": "user", "content": content}], add_generation_prompt=True)
        except Exception as error:  # a template is a program: it raises whatever Python raises
            raise RequestError(f"{self._name} cannot render this message: {error}") from error


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _refuse
    return environment


def _refuse(reason: str) -> None:
    raise TemplateError(reason)
