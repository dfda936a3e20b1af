"""Conversations that cannot be answered: each is refused before anything runs, and the message names the place."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import numpy as np
import pytest
from helpers.chat_templates import TEMPLATES
from helpers.tiny_tokenizer import make_tokenizer

from adalink.runtime import ChatOptions, Deployment, RequestError
from adalink.runtime.text.messages import check_conversation, images_of
from adalink.runtime.text.tokenizer import Tokenizer

USER = {"role": "user", "content": "Hello"}
IMAGE = {"type": "image", "image": b"bytes"}


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], "messages is [], expected a list of messages"),
        ("Hello", "messages is 'Hello', expected a list"),
        (USER, "expected a list of messages"),
        (["Hello"], "messages[0] is 'Hello', expected an object"),
        ([USER, {"content": "a"}], "messages[1] has the role None, expected a text"),
        ([{"role": 5, "content": "a"}], "messages[0] has the role 5"),
        ([{"role": "user"}], "messages[0] has no content"),
        ([{"role": "user", "content": None}], "messages[0] has no content"),
        ([{"role": "user", "content": 5}], "messages[0].content is 5, expected a text or a list"),
        ([{"role": "user", "content": []}], "messages[0].content is [], expected"),
        ([{"role": "user", "content": ["a"]}], "messages[0].content[0] is 'a', expected a part"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "messages[0].content[0] is of the type 'audio'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0] is of the type 'text'"),
        ([{"role": "user", "content": "\ud800"}], "messages[0].content holds '\\ud800'"),
        ([{**USER, "name": "\ud800"}], "messages[0].name holds '\\ud800'"),
        ([{**USER, "x": {5: 6}}], "messages[0].x has the key 5, expected a text"),
        ([{**USER, "x": np.zeros(1)}], "messages[0].x is a ndarray, expected texts, numbers"),
        ([{**USER, "tool_calls": "f()"}], "messages[0].tool_calls is 'f()', expected a list of objects"),
        ([{**USER, "tool_calls": [{"function": {"arguments": "{"}}]}], "arguments are '{', expected an object"),
        ([{**USER, "tool_calls": [{"function": {"arguments": "[1]"}}]}], "arguments are '[1]', expected an object"),
    ],
)
def test_wrong_messages_are_named(deployment: Deployment, messages: Any, expected: str) -> None:
    with pytest.raises(RequestError) as caught:
        deployment.generate(messages=messages)
    assert expected in str(caught.value)


def test_deeply_nested_messages_are_refused() -> None:
    value: Any = "a"
    for _ in range(5000):
        value = [value]
    with pytest.raises(RequestError, match="nested more than 64 levels deep"):
        check_conversation([{**USER, "x": value}])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (ChatOptions(tools="f"), "tools is 'f', expected a list of objects"),
        (ChatOptions(tools=[print]), "tools[0] is <built-in function print>, expected an object"),
        (ChatOptions(documents=["a"]), "documents[0] is 'a', expected an object"),
        (ChatOptions(template_kwargs=[1]), "chat_template_kwargs is [1], expected names and values"),
        (ChatOptions(template_kwargs={"messages": []}), "holds 'messages', which has an option of its own"),
        (ChatOptions(template_kwargs={"x": print}), "x is a builtin_function_or_method"),
        (ChatOptions(continue_final_message=1), "continue_final_message is 1, expected true or false"),
        ("yes", "chat is 'yes', expected true, false or ChatOptions"),
    ],
)
def test_wrong_options_are_named(deployment: Deployment, options: Any, expected: str) -> None:
    with pytest.raises(RequestError) as caught:
        deployment.generate(messages=[USER], chat=options)
    assert expected in str(caught.value)


def test_a_batch_names_the_conversation(deployment: Deployment) -> None:
    with pytest.raises(RequestError, match=r"^conversation 1: messages\[0\] has the role None"):
        deployment.generate(messages=[[USER], [{"content": "a"}]])
    with pytest.raises(RequestError, match="give either prompts or messages, not both"):
        deployment.generate(["a"], messages=[USER])
    with pytest.raises(RequestError, match="prompts is None, expected a list"):
        deployment.generate()
    with pytest.raises(RequestError, match="takes no images: leave them out of the messages"):
        deployment.generate(messages=[{"role": "user", "content": [IMAGE]}])


def test_conversations_generate_as_their_ids_do(deployment: Deployment) -> None:
    conversations = [[USER], [{"role": "system", "content": "Be brief"}, USER]]
    ids = [deployment.tokenizer.encode_messages(messages) for messages in conversations]
    expected = deployment.generate(ids, max_new_tokens=4)
    assert deployment.generate(messages=conversations, max_new_tokens=4) == expected
    assert deployment.generate(messages=conversations[0], max_new_tokens=4) == expected[:1]
    assert deployment.generate(["Hello"], chat=ChatOptions(), max_new_tokens=4) == expected[:1]
    closed = deployment.generate(["Hello"], chat=ChatOptions(add_generation_prompt=False), max_new_tokens=4)
    assert closed[0].prompt_tokens == expected[0].prompt_tokens - len("[assistant] ")
    # One beginning token: the template writes it, and the tokenizer adds none.
    assert [row.count(1) for row in ids] == [1, 1]


def test_arguments_of_tool_calls_may_be_json_texts(deployment: Deployment) -> None:
    """OpenAI's API has texts, and templates expect objects."""
    reference = make_tokenizer()
    own = Tokenizer(reference.backend_tokenizer.to_str().encode(), TEMPLATES["qwen-2.5"], deployment.manifest.base)
    texts = []
    for arguments in ({"city": "Köln"}, json.dumps({"city": "Köln"})):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        texts.append(own.render_messages([USER, {"role": "assistant", "content": "", "tool_calls": [call]}]))
    assert texts[0] == texts[1]
    assert '"arguments": {"city": "Köln"}}' in texts[0]


@pytest.mark.parametrize(("name", "expected"), [("chatml", "a\nb"), ("gemma-3", "ab"), ("smolvlm", "ab")])
def test_texts_in_parts_reach_every_template(deployment: Deployment, name: str, expected: str) -> None:
    """Where a template takes no parts they become one text, a line each."""
    data = make_tokenizer().backend_tokenizer.to_str().encode()
    own = Tokenizer(data, TEMPLATES[name], deployment.manifest.base)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert expected in own.render_messages([{"role": "user", "content": parts}])


def test_deployments_of_older_kits_keep_the_models_tokens(deployment: Deployment) -> None:
    base = msgspec.structs.replace(deployment.manifest.base, special_tokens=None)
    data = make_tokenizer().backend_tokenizer.to_str().encode()
    assert Tokenizer(data, TEMPLATES["every-token"], base).render_chat("a").startswith("bos=<bos>;eos=<eos>;pad=undef")


def test_images_come_from_their_parts() -> None:
    url = {"type": "image_url", "image_url": {"url": "data:image/png;base64,YWI="}}
    messages = [{"role": "user", "content": [IMAGE, {"type": "text", "text": "a"}, url]}]
    assert images_of(messages) == [b"bytes", b"ab"]
    assert check_conversation(messages)[0]["content"][0] == {"type": "image"}
    for part, expected in (
        ({"type": "image"}, "give every part its image, or none"),
        (
            {"type": "image_url", "image_url": {"url": "http://a/b.png"}},
            r"content\[1\] has the address 'http://a/b.png'",
        ),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,%"}}, r"content\[1\] is no base64"),
    ):
        with pytest.raises(RequestError, match=expected):
            images_of([{"role": "user", "content": [IMAGE, part]}])
