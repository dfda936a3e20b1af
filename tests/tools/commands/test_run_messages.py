"""`adalink run --messages` against the deployment called directly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from helpers.tiny_deployments import make_deployment

from adalink.runtime import ChatOptions, Deployment
from adalink.tools.cli import main

USER = {"role": "user", "content": "Hello"}
TURNS = [{"role": "system", "content": "Be brief"}, USER, {"role": "assistant", "content": "Hi"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_deployment(tmp_path_factory.mktemp("run"), "mistral", {"alpha": {"seed": 1}})[1]


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(main, ["run", *map(str, arguments), "--max-new-tokens", "5"])


def test_a_conversation_prints_its_reply(folder: Path, tmp_path: Path) -> None:
    with Deployment.open(folder) as deployment:
        expected = deployment.generate(messages=TURNS, max_new_tokens=5)[0].text
        adapted = deployment.generate(messages=TURNS, tasks="alpha", max_new_tokens=5)[0].text
    assert expected != adapted
    for content in (TURNS, {"messages": TURNS}):
        (tmp_path / "chat.json").write_text(json.dumps(content), encoding="utf-8-sig")
        assert run(folder, "--messages", tmp_path / "chat.json").stdout == expected + "\n"
    assert run(folder, "--messages", tmp_path / "chat.json", "--task", "alpha").stdout == adapted + "\n"


def test_rows_of_conversations_keep_order_task_and_options(folder: Path, tmp_path: Path) -> None:
    rows: list[Any] = [
        {"messages": TURNS, "task": "alpha"},
        {"messages": TURNS, "continue_final_message": True},
        [USER],
        {"messages": [USER], "add_generation_prompt": False, "chat_template_kwargs": {"bos_token": "<eos>"}},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = run(folder, "--messages", tmp_path / "rows.jsonl")
    assert result.exit_code == 0, result.stderr
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    with Deployment.open(folder) as deployment:
        settings: list[dict[str, Any]] = [
            {"messages": TURNS, "tasks": "alpha"},
            {"messages": TURNS, "chat": ChatOptions(continue_final_message=True)},
            {"messages": [USER]},
            {
                "messages": [USER],
                "chat": ChatOptions(add_generation_prompt=False, template_kwargs={"bos_token": "<eos>"}),
            },
        ]
        expected = [deployment.generate(max_new_tokens=5, **arguments)[0] for arguments in settings]
    assert [answer["text"] for answer in answers] == [row.text for row in expected]
    assert [answer["prompt_tokens"] for answer in answers] == [row.prompt_tokens for row in expected]
    assert [answer["task"] for answer in answers] == ["alpha", None, None, None]
    assert answers[0]["messages"] == TURNS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "chat.json: not JSON"),
        ("{}", "chat.json: expected {"),
        ("5", "chat.json: expected {"),
        ("[]", "chat.json: messages is [], expected a list of messages"),
        ('[{"content": "a"}]', "chat.json: messages[0] has the role None"),
        ('{"messages": [{"role": "user", "content": "a"}], "tool": []}', "field 'tool' is not known"),
        ('{"messages": [{"role": "user", "content": "a"}], "tools": [5]}', "tools[0] is 5, expected an object"),
        ('{"messages": [{"role": "user", "content": "a"}], "task": 5}', "task is 5, expected a name or null"),
        ('[{"role": "user", "content": "forbidden"}]', "cannot render this message: not this word"),
        ('[{"role": "user", "content": [{"type": "image"}]}]', "takes no images: leave them out of the messages"),
        ('[{"role": "user", "content": "\\ud800"}]', "not JSON"),
    ],
)
def test_wrong_conversations_exit_2(folder: Path, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "chat.json").write_text(content)
    result = run(folder, "--messages", tmp_path / "chat.json")
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


def test_a_bad_row_of_conversations_is_named_or_skipped(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps([USER])}\n[5]\n{json.dumps([USER])}\n")
    stopped = run(folder, "--messages", tmp_path / "rows.jsonl")
    assert (stopped.exit_code, stopped.stdout) == (2, "")
    assert "rows.jsonl:2: messages[0] is 5, expected an object" in stopped.stderr
    skipped = run(folder, "--messages", tmp_path / "rows.jsonl", "--on-error", "skip")
    assert skipped.exit_code == 2
    answers = [json.loads(line) for line in skipped.stdout.splitlines()]
    assert [answer.get("line") for answer in answers] == [None, 2, None]


@pytest.mark.parametrize("options", [["text"], ["--jsonl", "rows.jsonl"], ["--image", "a.png"], ["--text-pair", "a"]])
def test_options_that_exclude_messages(folder: Path, options: list[str]) -> None:
    result = run(folder, *options, "--messages", "chat.json")
    assert result.exit_code == 2
    assert "--messages" in result.stderr or "one prompt" in result.stderr
