"""Chat templates, rendered in a sandbox as transformers renders them, within limits of work and text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from adalink.runtime.errors import RequestError
from adalink.runtime.request import check_text
from adalink.runtime.text.template_budget import Budget, limited, size_of
from adalink.runtime.text.template_sandbox import TemplateSandbox

# Published templates have up to 30,000 characters.
_MAX_SOURCE = 1 << 17
_MAX_REASON = 500
# A text that no template contains, and that templates copy unchanged.
_PROBE = "27182818284590452353602874713527"
# Marks the end of a message that is continued; transformers does it in the same way.
_END = "CONTINUE_FINAL_MESSAGE_TAG "


class ChatTemplate:
    """A compiled chat template; safe for several threads."""

    def __init__(self, source: str, name: str, special_tokens: Mapping[str, str | Sequence[str]]) -> None:
        """Compile a template.

        Args:
            source: the template's text.
            name: its name in errors.
            special_tokens: special tokens that it may use, such as ``bos_token``.

        Raises:
            RequestError: the text is not a Jinja template, or uses what chat templates cannot.
        """
        self._name = name
        self._special_tokens = special_tokens
        if len(source) > _MAX_SOURCE:
            raise RequestError(f"{name} has {len(source)} characters, expected at most {_MAX_SOURCE}")
        try:
            self._template = TemplateSandbox().from_string(source)
        except Exception as error:  # a SyntaxError of Python for `{% break %}` outside of a loop, among others
            raise RequestError(
                f"{name} is no Jinja template for chats: {_reason(error)}; write the whole prompt yourself"
            ) from error

    @cached_property
    def takes_text(self) -> bool:
        """Whether the content of a message may be a string."""
        return self._copies(_PROBE)

    @cached_property
    def takes_parts(self) -> bool:
        """Whether the content of a message may be a list of texts and images."""
        parts = [{"type": "text", "text": _PROBE}]
        if not self.takes_text:
            return self._copies(parts)
        try:
            return self._render_content(parts) == self._render_content(_PROBE)
        except RequestError:
            return False

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """Render a conversation.

        Args:
            messages: checked messages of plain JSON values.
            variables: further variables, such as ``tools``; one named like a special token replaces it.

        Raises:
            RequestError: the template refuses the messages, exceeds its limits, or writes half a character.
        """
        given = {"tools": None, "documents": None, "add_generation_prompt": False, **self._special_tokens, **variables}
        budget = Budget(size_of([messages, given], 1 << 40))
        pieces = []
        try:
            with limited(budget):
                for piece in self._template.generate(messages=messages, **given):
                    budget.write(len(piece))
                    pieces.append(piece)
        except Exception as error:  # a template is a program: it raises whatever Python raises
            raise RequestError(f"{self._name} cannot render this message: {_reason(error)}") from error
        return check_text("".join(pieces), f"the text of {self._name}")

    def render_open(self, messages: list[dict[str, Any]], **variables: Any) -> str:
        """Render a conversation whose last message is left open, for the model to continue it.

        Args:
            messages: checked messages, the last with a content; it is changed.
            variables: as in ``render``.

        Raises:
            RequestError: as ``render``; or the last message has no text, or the template does not copy it.
        """
        content = messages[-1].get("content")
        parts = [part for part in content if part["type"] == "text"] if isinstance(content, list) else []
        final = parts[-1]["text"] if parts else content
        if not isinstance(final, str):
            raise RequestError("continue_final_message needs a last message with a text")
        if parts:
            parts[-1]["text"] = final + _END
        else:
            messages[-1]["content"] = final + _END
        text = self.render(messages, **variables)
        end = text.rfind(_END.strip())
        if end < 0 or final.strip() not in text:
            raise RequestError(f"{self._name} does not copy the last message: it cannot be continued")
        # A template that trims messages takes the space at the mark's end away, and so would have the message's.
        return text[:end] if text[end:].startswith(_END) else text[:end].rstrip()

    def _render_content(self, content: str | list[dict[str, str]]) -> str:
        return self.render([{"role": "user", "content": content}], add_generation_prompt=True)

    def _copies(self, content: str | list[dict[str, str]]) -> bool:
        try:
            return _PROBE in self._render_content(content)
        except RequestError:
            return False


def _reason(error: Exception) -> str:
    """What an exception says, on one line and not too long."""
    text = str(error) or type(error).__name__
    return text.encode("utf-8", "backslashreplace").decode("utf-8")[:_MAX_REASON]
