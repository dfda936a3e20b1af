"""Completions and tokens by OpenAI's client and HTTP, compared with ``Deployment.generate``."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.served import Served


@pytest.mark.parametrize("task", [None, "alpha", "prompted"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_completion_is_generate(served: Served, task: str | None, stream: bool) -> None:
    wanted = served.deployment.generate(["wheat"], tasks=task, max_new_tokens=12)[0]
    settings: dict[str, Any] = {"model": task or served.base, "prompt": "wheat", "max_tokens": 12}
    if stream:
        chunks = list(served.openai.completions.create(**settings, stream=True))
        text, reason = "".join(chunk.choices[0].text for chunk in chunks), chunks[-1].choices[0].finish_reason
    else:
        choice = served.openai.completions.create(**settings).choices[0]
        text, reason = choice.text, choice.finish_reason
    assert (text, reason) == (wanted.text, wanted.finish_reason)


@pytest.mark.parametrize("as_ids", [False, True], ids=["texts", "ids"])
def test_prompts_are_rows_of_generate(served: Served, as_ids: bool) -> None:
    texts = ["wheat", "a bank", "oil"]
    ids = [served.deployment.tokenizer.encode(text) for text in texts]
    wanted = served.deployment.generate(texts, tasks="beta", max_new_tokens=8)
    prompt: Any = ids if as_ids else texts
    reply = served.openai.completions.create(model="beta", prompt=prompt, max_tokens=8)
    assert [choice.text for choice in reply.choices] == [generation.text for generation in wanted]
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == sum(map(len, ids))
    one: Any = ids[0] if as_ids else texts[0]
    assert served.openai.completions.create(model="beta", prompt=one, max_tokens=8).choices[0].text == wanted[0].text


def test_usage_counts_each_prompt_once(served: Served) -> None:
    reply = served.openai.completions.create(
        model=served.base, prompt=["wheat", "oil"], n=3, max_tokens=4, temperature=1, seed=1
    )
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == len("wheat") + len("oil")
    assert [choice.index for choice in reply.choices] == list(range(6))


def test_logprobs_have_texts_and_offsets(served: Served) -> None:
    reply = served.openai.completions.create(model="beta", prompt="wheat", max_tokens=5, logprobs=2)
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert "".join(logprobs.tokens or []) == reply.choices[0].text
    assert logprobs.text_offset == list(range(5))  # a token is a character here
    assert [len(top) for top in logprobs.top_logprobs or []] == [2] * 5


def test_tokenize_and_back(served: Served) -> None:
    answer = served.post("/tokenize", {"model": "beta", "prompt": "wheat", "return_token_strs": True}).json()
    tokens = served.deployment.tokenizer.encode("wheat")
    assert answer == {"count": 5, "max_model_len": 64, "tokens": tokens, "token_strs": list("wheat")}
    assert served.post("/detokenize", {"tokens": tokens}).json() == {"prompt": "wheat"}
    messages = [{"role": "user", "content": "Hi"}]
    chat = served.post("/tokenize", {"messages": messages}).json()
    assert chat["tokens"] == served.deployment.tokenizer.encode_messages(messages)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/detokenize", {"tokens": [96]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": False}, "add_special_tokens"),
    ],
)
def test_tokenize_refuses(served: Served, path: str, body: Any, param: str) -> None:
    answer = served.post(path, body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
