"""Tokenizer and chat template of a deployment: text to token ids and back."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from adalink.runtime.errors import IntegrityError, RequestError
from adalink.runtime.request import check_text
from adalink.runtime.storage.manifest import Base

if TYPE_CHECKING:
    from tokenizers import Tokenizer as FastTokenizer

    from adalink.runtime.text.chat_template import ChatTemplate

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class Tokenizer:
    """The base's tokenizer; safe for several threads."""

    def __init__(self, tokenizer_json: bytes, chat_template: str | None, base: Base) -> None:
        from tokenizers import Tokenizer as FastTokenizer

        try:
            self._tokenizer: FastTokenizer = FastTokenizer.from_buffer(tokenizer_json)
        except Exception as error:  # the package raises nothing narrower
            raise IntegrityError(f"{base.tokenizer} is not a tokenizer.json: {error}; export the base again") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._chat_template = chat_template
        self._base = base

    def encode(self, text: str, images: int = 0) -> list[int]:
        """Token ids of a prompt, with the special tokens that the model's tokenizer or processor adds.

        Args:
            text: the prompt.
            images: its number of images; a base with a ``PromptForm`` adds missing placeholders for them.

        Raises:
            RequestError: the text holds half a character.
        """
        check_text(text)
        vision = self._base.vision
        form = None if vision is None else vision.prompt_form
        if form is None:
            return list(self._tokenizer.encode(text).ids)
        return list(self._tokenizer.encode(form.format(text, images), add_special_tokens=False).ids)

    def encode_pair(self, text: str, text_pair: str | None = None) -> tuple[list[int], list[int]]:
        """Token ids and token types of a text or a pair of texts, as the model's tokenizer makes them.

        The types go into ``Deployment.run(token_type_ids=...)``. They are all 0 for a model that has none, or whose
        tokenizer gives none.

        Raises:
            RequestError: the base is no encoder, the deployment was written by a kit without token types, or a text
                holds half a character.
        """
        base = self._base
        if text_pair is not None and base.kind != "encoder":
            raise RequestError(
                f"text_pair is for encoders, and {base.name} is not one: write both texts into the prompt"
            )
        if text_pair is not None and base.token_types is None:
            raise RequestError(
                f"text_pair cannot be used: this deployment of {base.name} was written by a kit without token types; "
                "export the base again, into another folder"
            )
        pair = None if text_pair is None else check_text(text_pair, "text_pair")
        encoding = self._tokenizer.encode(check_text(text), pair)
        ids, types = list(encoding.ids), list(encoding.type_ids)
        return ids, types if base.takes_token_types and base.tokenizer_types else [0] * len(ids)

    def encode_chat(self, message: str) -> list[int]:
        """Token ids of one user message in the model's chat template, ready for the reply.

        Raises:
            RequestError: the model has no template, the template refuses, or the message holds half a character.
        """
        return list(self._tokenizer.encode(self.render_chat(message), add_special_tokens=False).ids)

    def render_chat(self, message: str) -> str:
        """One user message in the model's chat template.

        Templates of vision models often expect a list of texts and images, and ignore a string. They get the message as
        such a list, with an image for each placeholder.
        """
        check_text(message)
        is_text = self._base.vision is None or self._chat.takes_text
        return self._chat.render(message if is_text else self._content(message))

    @cached_property
    def _chat(self) -> ChatTemplate:
        path = self._base.chat_template
        if self._chat_template is None or path is None:
            raise RequestError(f"{self._base.name} has no chat template: write the whole prompt yourself")
        from adalink.runtime.text.chat_template import ChatTemplate

        eos = self._base.eos_token_ids[:1]
        return ChatTemplate(
            self._chat_template,
            path,
            bos_token=self._special(self._base.bos_token_id),
            eos_token=self._special(eos[0] if eos else None),
        )

    def _content(self, message: str) -> list[dict[str, str]]:
        """The message as a list of texts and images, in order."""
        placeholder = self._special(self._base.vision.image_token_id if self._base.vision else None)
        content: list[dict[str, str]] = []
        for number, text in enumerate(message.split(placeholder)):
            content += [{"type": "image"}] if number else []
            content += [{"type": "text", "text": text}] if text else []
        return content

    def decode(self, token_ids: list[int]) -> str:
        """Text of token ids, without special tokens."""
        return str(self._tokenizer.decode(token_ids))

    def _special(self, token_id: int | None) -> str:
        return "" if token_id is None else self._tokenizer.id_to_token(token_id) or ""


class TextStream:
    """Incremental decoding: the text of a growing list of token ids, at constant cost for each token.

    Only ids since the last settled piece are decoded again, with that piece as context. A token may begin a word or be
    part of a character.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._pending: list[int] = []
        self.text = ""

    def push(self, token_id: int) -> str:
        """Append a token; returns the newly settled text."""
        self._pending.append(token_id)
        return self._settle(final=False)

    def finish(self) -> str:
        """The remaining text; incomplete characters become replacement characters."""
        return self._settle(final=True)

    def _settle(self, *, final: bool) -> str:
        before = self._tokenizer.decode(self._context)
        after = self._tokenizer.decode(self._context + self._pending)
        if len(after) <= len(before) or (after.endswith(_UNFINISHED) and not final):
            return ""
        # Some decoders join consecutive bytes: an incomplete character then changes the characters before it.
        piece = after[len(before) :] if after.startswith(before) else self._tokenizer.decode(self._pending)
        self._context, self._pending = self._pending, []
        self.text += piece
        return piece
