"""Chats by the real client of OpenAI, compared with ``Deployment.generate`` and with PyTorch."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import openai
import pytest
from helpers.runtime import Tiny
from helpers.served import Served

from adalink.runtime import ChatOptions, SamplingParams

TASKS = [None, "alpha", "beta", "prompted", "double"]
HELLO = [{"role": "user", "content": "Hello"}]
TURNS = [
    {"role": "user", "content": "A"},
    {"role": "assistant", "content": "B"},
    {"role": "user", "content": "C"},
]


def model_of(served: Served, task: str | None) -> str:
    return served.base if task is None else task


def expected(served: Served, task: str | None, messages: Any = HELLO, **settings: Any) -> Any:
    return served.deployment.generate(messages=messages, tasks=task, **settings)[0]


@pytest.mark.parametrize("messages", [HELLO, TURNS], ids=["one turn", "turns"])
@pytest.mark.parametrize("task", TASKS)
def test_chat_is_generate(served: Served, task: str | None, messages: Any) -> None:
    reply = served.openai.chat.completions.create(model=model_of(served, task), messages=messages, max_tokens=12)
    wanted = expected(served, task, messages, max_new_tokens=12)
    assert reply.choices[0].message.content == wanted.text
    assert reply.choices[0].finish_reason == wanted.finish_reason
    assert reply.model == model_of(served, task)
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (wanted.prompt_tokens, len(wanted.token_ids))


def test_tasks_answer_differently(served: Served) -> None:
    """Else a task served under another's name would pass."""
    assert len({expected(served, task, max_new_tokens=12).text for task in TASKS}) == len(TASKS)


def test_wrong_task_is_found(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.gateway, "task_of", lambda model: "beta")
    reply = served.openai.chat.completions.create(model="alpha", messages=HELLO, max_tokens=12)
    assert reply.choices[0].message.content != expected(served, "alpha", max_new_tokens=12).text


@pytest.mark.parametrize("task", [None, "beta"])
def test_stream_is_the_whole_answer(served: Served, task: str | None) -> None:
    stream = served.openai.chat.completions.create(
        model=model_of(served, task),
        messages=HELLO,
        max_completion_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    wanted = expected(served, task, max_new_tokens=12)
    choices = [chunk.choices[0] for chunk in chunks[:-1]]
    assert "".join(choice.delta.content or "" for choice in choices) == wanted.text
    assert choices[0].delta.role == "assistant"
    assert [choice.finish_reason for choice in choices] == [None] * (len(choices) - 1) + [wanted.finish_reason]
    assert len(choices) > 3
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(wanted.token_ids)
    assert len({chunk.id for chunk in chunks}) == 1


def test_choices_of_a_seed_are_those_of_generate(served: Served) -> None:
    sampling = SamplingParams(temperature=1.5, top_p=0.9, top_k=40, min_p=0.01, seed=5, repetition_penalty=1.2)
    wanted = served.deployment.generate(
        messages=[HELLO] * 3, tasks="alpha", sampling=sampling, max_new_tokens=8, chat=True
    )
    extra = {"top_k": 40, "min_p": 0.01, "repetition_penalty": 1.2}
    settings: dict[str, Any] = {"model": "alpha", "messages": HELLO, "temperature": 1.5, "top_p": 0.9, "seed": 5}
    reply = served.openai.chat.completions.create(**settings, n=3, max_tokens=8, extra_body=extra)
    texts = [choice.message.content for choice in reply.choices]
    assert texts == [generation.text for generation in wanted]
    assert len(set(texts)) == 3
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == wanted[0].prompt_tokens
    stream = served.openai.chat.completions.create(**settings, n=3, max_tokens=8, extra_body=extra, stream=True)
    streamed = ["", "", ""]
    for chunk in stream:
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


def test_filter_alone_samples(served: Served) -> None:
    """OpenAI's temperature is 1 by default, the kit's is 0: ``top_p`` must not be ignored."""
    sampling = SamplingParams(temperature=1.0, top_p=0.95, seed=3)
    wanted = expected(served, None, max_new_tokens=12, sampling=sampling)
    reply = served.openai.chat.completions.create(model=served.base, messages=HELLO, top_p=0.95, seed=3, max_tokens=12)
    assert reply.choices[0].message.content == wanted.text != expected(served, None, max_new_tokens=12).text


def test_stop_ends_the_text(served: Served) -> None:
    whole = expected(served, None, max_new_tokens=12).text
    stop = whole[4:6]
    reply = served.openai.chat.completions.create(model=served.base, messages=HELLO, max_tokens=12, stop=[stop])
    assert reply.choices[0].message.content == whole[: whole.index(stop)]
    assert reply.choices[0].finish_reason == "stop"


def test_stop_token_ends_the_text(served: Served) -> None:
    whole = expected(served, None, max_new_tokens=12)
    token = whole.token_ids[5]
    reply = served.openai.chat.completions.create(
        model=served.base, messages=HELLO, max_tokens=12, extra_body={"stop_token_ids": [token]}
    )
    assert reply.usage is not None
    assert reply.usage.completion_tokens == whole.token_ids.index(token)


@pytest.mark.parametrize("task", [None, "beta"])
def test_logprobs_are_those_of_pytorch(served: Served, llama: Tiny, task: str | None) -> None:
    """Against PyTorch on the whole sequence, whose prompt the chat template wrote."""
    reply = served.openai.chat.completions.create(
        model=model_of(served, task), messages=HELLO, max_tokens=5, logprobs=True, top_logprobs=3
    )
    tokenizer = served.deployment.tokenizer
    prompt = tokenizer.encode_messages(HELLO, ChatOptions())
    made = list(expected(served, task, max_new_tokens=5).token_ids)
    logits = llama.logits(prompt + made, task).astype(np.float64)
    scores = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [entry.token for entry in logprobs.content] == [tokenizer.decode([token]) for token in made]
    for position, (token, entry) in enumerate(zip(made, logprobs.content, strict=True)):
        row = scores[len(prompt) - 1 + position]
        assert entry.logprob == pytest.approx(row[token], abs=1e-4)
        assert bytes(entry.bytes or []).decode() == entry.token
        best = np.sort(row)[::-1][:3]
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(best, abs=1e-4)


def test_streamed_logprobs_are_the_whole_ones(served: Served) -> None:
    settings: dict[str, Any] = {"model": "beta", "messages": HELLO, "max_tokens": 5, "logprobs": True}
    whole = served.openai.chat.completions.create(**settings).choices[0].logprobs
    entries = []
    for chunk in served.openai.chat.completions.create(**settings, stream=True):
        logprobs = chunk.choices[0].logprobs
        entries += (logprobs.content or []) if logprobs is not None else []
    assert whole is not None
    assert [entry.token for entry in entries] == [entry.token for entry in whole.content or []]


def test_tools_reach_the_template(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    submit = served.deployment.submit
    monkeypatch.setattr(served.deployment, "submit", lambda request: seen.append(request.chat) or submit(request))
    tools: Any = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    for choice in ("auto", "none"):
        served.openai.chat.completions.create(
            model=served.base, messages=HELLO, max_tokens=2, tools=tools, tool_choice=choice
        )
    assert [options.tools for options in seen] == [tools, None]


def test_many_users_of_many_tasks(served: Served) -> None:
    prompts = [f"PROMPT {index}" for index in range(12)]
    messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
    wanted = [expected(served, TASKS[index % 5], messages[index], max_new_tokens=10).text for index in range(12)]

    def ask(index: int) -> str:
        chat: Any = messages[index]
        model = model_of(served, TASKS[index % 5])
        reply = served.openai.chat.completions.create(model=model, messages=chat, max_tokens=10)
        return reply.choices[0].message.content or ""

    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, range(12))) == wanted


def test_unknown_model_is_404(served: Served) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        served.openai.chat.completions.create(model="alpha2", messages=HELLO)  # type: ignore[arg-type]
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"


def test_models_are_the_base_and_the_tasks(served: Served) -> None:
    models = {model.id: model for model in served.openai.models.list()}
    assert set(models) == {served.base, *served.deployment.tasks}
    assert {getattr(models[name], "parent", "") for name in served.deployment.tasks} == {served.base}
    assert getattr(models[served.base], "parent", "") is None
    assert served.openai.models.retrieve("beta").id == "beta"
    with pytest.raises(openai.NotFoundError):
        served.openai.models.retrieve("gamma")
