"""Conversations in chat templates, against transformers' `apply_chat_template`."""

from __future__ import annotations

import copy
from typing import Any

import msgspec
import pytest
from helpers.chat_templates import CONVERSATIONS, TEMPLATES
from helpers.tiny_tokenizer import make_tokenizer

from adalink.export.base.files import special_tokens
from adalink.runtime import ChatOptions, Deployment, RequestError
from adalink.runtime.storage.manifest import Base
from adalink.runtime.text.tokenizer import Tokenizer

_OPTIONS = ("tools", "documents", "add_generation_prompt", "continue_final_message")


def make_reference(form: str) -> Any:
    """A tokenizer of transformers with special tokens that are set, null, or others than the model's."""
    reference = make_tokenizer()
    reference.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<end_of_turn>"]})
    if form == "null":
        reference.bos_token = reference.eos_token = reference.pad_token = None
    if form == "others":
        reference.eos_token, reference.pad_token, reference.mask_token = "<|im_end|>", "<|im_start|>", "<mask>"
        reference.sep_token, reference.cls_token = "</s>", "<|im_start|>"
    return reference


def make_own(reference: Any, template: str, base: Base) -> Tokenizer:
    """The kit's tokenizer of the same."""
    base = msgspec.structs.replace(base, special_tokens=special_tokens(reference))
    return Tokenizer(reference.backend_tokenizer.to_str().encode(), template, base)


def make_options(arguments: dict[str, Any]) -> ChatOptions:
    named = {name: arguments[name] for name in _OPTIONS if name in arguments}
    rest = {name: value for name, value in arguments.items() if name not in _OPTIONS}
    return ChatOptions(template_kwargs=rest, **named)


@pytest.mark.parametrize("form", ["set", "null", "others"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_conversations_are_rendered_as_transformers_does(deployment: Deployment, name: str, form: str) -> None:
    reference = make_reference(form)
    own = make_own(reference, TEMPLATES[name], deployment.manifest.base)
    rendered = 0
    for title, (messages, arguments) in CONVERSATIONS.items():
        settings = {"chat_template": TEMPLATES[name], **arguments}
        given = copy.deepcopy(messages)
        try:
            text = reference.apply_chat_template(messages, tokenize=False, **settings)
        except Exception:  # the template refuses this conversation, in one of Python's ways
            with pytest.raises(RequestError):
                own.render_messages(messages, make_options(arguments))
            continue
        ids = reference.apply_chat_template(messages, tokenize=True, return_dict=False, **settings)
        assert own.render_messages(messages, make_options(arguments)) == text, title
        assert own.encode_messages(messages, make_options(arguments)) == ids, title
        assert messages == given  # neither changes what it is given
        rendered += 1
    # Where a token is null, templates that join it to a text refuse, in transformers too.
    assert rendered >= (3 if form == "set" else 0)


def test_templates_write_different_tokens_in_the_three_forms(deployment: Deployment) -> None:
    """The comparison above could not fail if no template showed the difference."""
    texts = set()
    for form in ("set", "null", "others"):
        own = make_own(make_reference(form), TEMPLATES["every-token"], deployment.manifest.base)
        texts.add(own.render_chat("a"))
    assert len(texts) == 3
