"""Tokenizer and chat template of a deployment: text to token ids and back."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from adalink.runtime.errors import IntegrityError, RequestError
from adalink.runtime.request import check_text
from adalink.runtime.storage.manifest import Base
from adalink.runtime.text.fast_tokenizer import tokenizer_errors
from adalink.runtime.text.messages import ChatOptions, Conversation, check_conversation, count_images
from adalink.runtime.text.truncation import CutText, encode_cut, lower_cased

if TYPE_CHECKING:
    from tokenizers import Tokenizer as FastTokenizer

    from adalink.runtime.text.chat_template import ChatTemplate

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class Tokenizer:
    """The base's tokenizer; safe for several threads."""

    def __init__(self, tokenizer_json: bytes, chat_template: str | None, base: Base) -> None:
        from tokenizers import Tokenizer as FastTokenizer

        with tokenizer_errors(IntegrityError, f"{base.tokenizer} is not a tokenizer.json; export the base again"):
            self._tokenizer: FastTokenizer = FastTokenizer.from_buffer(tokenizer_json)
            self._tokenizer.no_padding()
            self._tokenizer.no_truncation()
        self._chat_template = chat_template
        self._base = base

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """Id of each special token, which ``decode`` leaves out, by its text."""
        with tokenizer_errors(
            IntegrityError, f"{self._base.tokenizer} has no table of its tokens; export the base again"
        ):
            added = self._tokenizer.get_added_tokens_decoder()
        return {str(token.content): int(token_id) for token_id, token in added.items() if token.special}

    @property
    def vocab_size(self) -> int:
        """Number of its tokens: one more than the highest id."""
        with tokenizer_errors(
            IntegrityError, f"{self._base.tokenizer} has no table of its tokens; export the base again"
        ):
            return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    def to_json(self) -> str:
        """Its ``tokenizer.json``, without padding and truncation."""
        return str(self._tokenizer.to_str())

    def encode(self, text: str, images: int = 0) -> list[int]:
        """Token ids of a prompt, with the special tokens that the model's tokenizer or processor adds.

        Args:
            text: the prompt.
            images: its number of images; a base with a ``PromptForm`` adds missing placeholders for them.

        Raises:
            RequestError: the text holds half a character, or the tokenizer cannot encode it.
        """
        check_text(text)
        vision = self._base.vision
        form = None if vision is None else vision.prompt_form
        if form is None:
            return self._encode(text, add_special_tokens=True)
        return self._encode(form.format(text, images), add_special_tokens=False)

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens around it; raises ``RequestError``."""
        return self._encode(check_text(text), add_special_tokens=False)

    def encode_pair(self, text: str, text_pair: str | None = None) -> tuple[list[int], list[int]]:
        """Token ids and token types of a text or a pair of texts, as the model's tokenizer makes them.

        The types go into ``Deployment.run(token_type_ids=...)``. They are all 0 for a model that has none, or whose
        tokenizer gives none.

        Raises:
            RequestError: the base is no encoder, the deployment was written by a kit without token types, or a text
                holds half a character.
        """
        base = self._base
        if text_pair is not None:
            self.check_pair()
        pair = None if text_pair is None else check_text(text_pair, "text_pair")
        with tokenizer_errors(RequestError, f"{base.tokenizer} cannot encode this text of {len(text)} characters"):
            encoding = self._tokenizer.encode(check_text(text), pair)
        ids, types = list(encoding.ids), list(encoding.type_ids)
        return ids, types if base.takes_token_types and base.tokenizer_types else [0] * len(ids)

    def check_pair(self) -> None:
        """Check that the base takes pairs of texts; raises ``RequestError``."""
        base = self._base
        if base.kind != "encoder":
            raise RequestError(
                f"text_pair is for encoders, and {base.name} is not one: write both texts into the prompt"
            )
        if base.token_types is None:
            raise RequestError(
                f"text_pair cannot be used: this deployment of {base.name} was written by a kit without token types; "
                "export the base again, into another folder"
            )

    def encode_cut(
        self,
        text: str,
        text_pair: str | None = None,
        *,
        limit: int | None,
        left: bool = False,
        lower_case: bool = False,
    ) -> CutText:
        """Tokens of a text or a pair, cut to ``limit`` tokens as transformers cuts them; types as ``encode_pair``.

        Args:
            text: the text.
            text_pair: the second text of a pair.
            limit: most tokens, special tokens included; ``None`` for no limit.
            left: whether the beginning is cut off, rather than the end.
            lower_case: whether the text is lower-cased first.

        Raises:
            RequestError: a text holds half a character, or the tokenizer cannot encode it.
        """
        base = self._base
        pair = None if text_pair is None else check_text(text_pair, "text_pair")
        with tokenizer_errors(RequestError, f"{base.tokenizer} cannot encode this text of {len(text)} characters"):
            tokenizer = self._lower_cased if lower_case else self._tokenizer
            cut = encode_cut(tokenizer, check_text(text), pair, limit, left=left)
        return cut if base.takes_token_types and base.tokenizer_types else replace(cut, types=[0] * len(cut.ids))

    @cached_property
    def _lower_cased(self) -> FastTokenizer:
        return lower_cased(self._tokenizer)

    def encode_chat(self, message: str, options: ChatOptions | None = None) -> list[int]:
        """Token ids of one user message in the model's chat template, ready for the reply.

        Raises:
            RequestError: the model has no template, the template refuses, or the message holds half a character.
        """
        return self._encode(self.render_chat(message, options), add_special_tokens=False)

    def encode_messages(self, messages: Conversation, options: ChatOptions | None = None) -> list[int]:
        """Token ids of a conversation in the model's chat template.

        The template writes the beginning token itself, so none is added.

        Args:
            messages: the conversation; images in it are placeholders here.
            options: how the template is applied.

        Raises:
            RequestError: a message is wrong, the model has no template, or the template refuses.
        """
        return self._encode(self.render_messages(messages, options), add_special_tokens=False)

    def render_chat(self, message: str, options: ChatOptions | None = None) -> str:
        """One user message in the model's chat template.

        Templates of vision models often expect a list of texts and images, and ignore a string. They get the message as
        such a list, with an image for each placeholder.
        """
        return self.render_messages([{"role": "user", "content": check_text(message)}], options)

    def render_messages(self, messages: Conversation, options: ChatOptions | None = None) -> str:
        """A conversation in the model's chat template, as transformers' ``apply_chat_template`` writes it.

        Args:
            messages: the conversation. Parts of a content become one text, a line each, where the template takes no
                parts.
            options: how the template is applied.

        Raises:
            RequestError: a message is wrong, the model has no template, or the template refuses.
        """
        options = options or ChatOptions()
        checked, variables = check_conversation(messages), options.variables()
        if self._base.vision is None and count_images(checked):
            raise RequestError(f"{self._base.name} takes no images: leave them out of the messages")
        template = self._chat
        for message in checked:
            if "content" in message:
                message["content"] = self._as_taken(message["content"])
        if options.continue_final_message:
            return template.render_open(checked, **variables)
        return template.render(checked, **variables)

    @cached_property
    def _chat(self) -> ChatTemplate:
        path = self._base.chat_template
        if self._chat_template is None or path is None:
            raise RequestError(f"{self._base.name} has no chat template: write the whole prompt yourself")
        from adalink.runtime.text.chat_template import ChatTemplate

        return ChatTemplate(self._chat_template, path, self._special_tokens())

    def _special_tokens(self) -> dict[str, str | tuple[str, ...]]:
        """The tokenizer's special tokens; deployments of older kits only know those of the model."""
        if self._base.special_tokens is not None:
            return self._base.special_tokens
        eos = self._base.eos_token_ids[:1]
        return {
            "bos_token": self._token(self._base.bos_token_id),
            "eos_token": self._token(eos[0] if eos else None),
        }

    def _as_taken(self, content: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
        """A message's content in the form that the template takes."""
        template = self._chat
        if isinstance(content, str):
            is_text = self._base.vision is None or template.takes_text
            return content if is_text else self._split(content)
        if template.takes_parts or not template.takes_text:
            return content
        image = self._placeholder
        return "\n".join(part["text"] if part["type"] == "text" else image for part in content)

    def _split(self, text: str) -> list[dict[str, Any]]:
        """A text as a list of texts and images, in order."""
        content: list[dict[str, Any]] = []
        for number, piece in enumerate(text.split(self._placeholder)):
            content += [{"type": "image"}] if number else []
            content += [{"type": "text", "text": piece}] if piece else []
        return content

    @property
    def _placeholder(self) -> str:
        """Text of the image placeholder."""
        return self._token(self._base.vision.image_token_id if self._base.vision else None)

    def decode(self, token_ids: list[int]) -> str:
        """Text of token ids, without special tokens."""
        with tokenizer_errors(IntegrityError, f"{self._base.tokenizer} cannot decode tokens; export the base again"):
            return str(self._tokenizer.decode(token_ids))

    def decode_batch(self, rows: list[list[int]]) -> list[str]:
        """Text of each row of token ids, without special tokens."""
        with tokenizer_errors(IntegrityError, f"{self._base.tokenizer} cannot decode tokens; export the base again"):
            return list(self._tokenizer.decode_batch(rows))

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        with tokenizer_errors(
            RequestError, f"{self._base.tokenizer} cannot encode this text of {len(text)} characters"
        ):
            return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def _token(self, token_id: int | None) -> str:
        if token_id is None:
            return ""
        with tokenizer_errors(
            IntegrityError, f"{self._base.tokenizer} has no table of its tokens; export the base again"
        ):
            return self._tokenizer.id_to_token(token_id) or ""


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
