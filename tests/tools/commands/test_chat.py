"""`adalink chat` line by line, against the deployment called directly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result
from helpers.chats import LENGTH, POSITIONS, Reference, make_chat_deployment
from helpers.runtime import random_adapter, write_adapter
from helpers.tiny_deployments import make_deployment

from adalink.export.adapter.export import export_adapter
from adalink.runtime import Deployment, SamplingParams
from adalink.runtime.errors import RequestError, UnknownTaskError
from adalink.runtime.storage.manifest_io import encode_manifest, read_manifest
from adalink.tools.cli import main
from adalink.tools.common.chat_session import ChatSession, Turn


@pytest.fixture(scope="module")
def opened(chat_folder: Path) -> Iterator[Deployment]:
    with Deployment.open(chat_folder, threads=1, prefix_cache_bytes=1 << 20) as deployment:
        yield deployment


def chat(folder: Path, text: str | bytes, *options: Any) -> Result:
    arguments = ["chat", str(folder), "--max-new-tokens", str(LENGTH), *map(str, options)]
    return CliRunner().invoke(main, arguments, input=text)


def test_each_line_is_a_turn_that_sees_those_before(chat_folder: Path) -> None:
    reference = Reference(chat_folder)
    expected = [reference.reply(text) for text in ("Hi", "Bye", "So")]
    alone = Reference(chat_folder).reply("So")
    assert alone != expected[-1]
    result = chat(chat_folder, "Hi\n\n  Bye \r\nSo")
    assert (result.exit_code, result.stdout) == (0, "".join(f"{text}\n" for text in expected))
    assert chat(chat_folder, "\ufeffHi\nBye\n").stdout == "".join(f"{text}\n" for text in expected[:2])
    assert chat(chat_folder, "").stdout == ""


def test_replies_as_json_lines_and_in_a_file(chat_folder: Path, tmp_path: Path) -> None:
    expected = [Reference(chat_folder).reply("Hi", "alpha")]
    shown = chat(chat_folder, "Hi", "--task", "alpha", "--json-file", tmp_path / "replies.jsonl")
    assert shown.stdout.splitlines() == expected
    printed = chat(chat_folder, "Hi", "--task", "alpha", "--json")
    assert printed.stdout == (tmp_path / "replies.jsonl").read_text()
    reply = json.loads(printed.stdout)
    assert [reply["text"]] == expected
    assert (reply["message"], reply["task"]) == ("Hi", "alpha")


def test_commands_change_task_system_and_history(chat_folder: Path) -> None:
    reference = Reference(chat_folder, "Be kind")
    expected = [
        reference.reply("Hi", "alpha"),
        reference.reply("Hi", "beta"),
        reference.reply("Hi"),
        Reference(chat_folder, "Be kind").reply("Hi"),
        Reference(chat_folder, "Hush").reply("/Hi"),
        Reference(chat_folder).reply("Hi"),
    ]
    assert len(set(expected)) == 6
    lines = "Hi\n/task beta\nHi\n/base\nHi\n/clear\nHi\n/clear\n/system Hush\n//Hi\n/clear\n/system\nHi\n/quit\nHi"
    result = chat(chat_folder, lines, "--task", "alpha", "--system", "Be kind")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines() == expected
    shown = chat(chat_folder, "/task alpha\n/task\n/help\n").stderr
    assert "task alpha answers\n  (base model)\n* alpha\n  beta\n" in shown
    assert all(name in shown for name in ("/task", "/base", "/system", "/clear", "/quit", "Ctrl-C"))


def test_a_task_that_changes_in_the_folder_is_taken_up(chat_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    copy = Path(shutil.copytree(chat_folder, tmp_path / "deployment"))
    expected = [Reference(copy).reply("Hi", task) for task in ("alpha", "beta")]
    load = ChatSession.use_task

    def load_and_change(self: ChatSession, name: str | None) -> None:
        load(self, name)
        if not (copy / "tasks/new").exists():
            for task in ("alpha", "new"):
                export_adapter(chat_folder.parent / "beta", copy, name=task, replace=True)

    monkeypatch.setattr(ChatSession, "use_task", load_and_change)
    result = chat(copy, "Hi\n/clear\n/reload\nHi\n/reload", "--task", "alpha")
    assert result.stdout.splitlines() == expected
    assert "\nadded new; replaced alpha\n" in result.stderr
    assert "\nnothing has changed\n" in result.stderr


def test_options_of_sampling_reach_the_deployment(chat_folder: Path) -> None:
    sampling = SamplingParams(temperature=0.9, top_k=20, top_p=0.95, seed=3)
    expected = Reference(chat_folder).reply("Hi", sampling=sampling)
    assert expected != Reference(chat_folder).reply("Hi")
    options = ["--temperature", 0.9, "--top-k", 20, "--top-p", 0.95, "--seed", 3]
    assert chat(chat_folder, "Hi", *options).stdout == expected + "\n"


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("Hi", ["--task", "gamma"], "task 'gamma' is not deployed here; deployed are: alpha, beta"),
        ("Hi\n/task gamma\nBye", [], "task 'gamma' is not deployed"),
        ("/tasks", [], "/tasks is no command: /help lists them; write // to begin a message with /"),
        ("forbidden", [], "cannot render this message: not this word"),
        (b"\xff\xfe", [], "standard input: cannot be read as UTF-8 text"),
        ("Hi", ["--top-p", "0.5"], "--top-p needs a --temperature above 0"),
        ("Hi", ["--variant", "int4"], "no base variant 'int4'"),
        ("Hi" * POSITIONS, [], f"was made for at most {POSITIONS}: shorten the prompt"),
        ("/system forbidden", [], "cannot render this message: not this word"),
    ],
)
def test_wrong_lines_of_a_pipe_and_options_exit_2(
    chat_folder: Path, text: str | bytes, options: list[str], message: str
) -> None:
    result = chat(chat_folder, text, *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout.count("\n") == (1 if isinstance(text, str) and text.startswith("Hi\n") else 0)


def test_bases_without_a_chat_template_are_refused(chat_folder: Path, tmp_path: Path) -> None:
    plain = Path(shutil.copytree(chat_folder, tmp_path / "plain"))
    manifest = read_manifest(plain)
    files = {path: record for path, record in manifest.files.items() if path != manifest.base.chat_template}
    base = msgspec.structs.replace(manifest.base, chat_template=None)
    (plain / "manifest.json").write_bytes(encode_manifest(msgspec.structs.replace(manifest, files=files, base=base)))
    result = chat(plain, "Hi")
    assert result.exit_code == 2
    assert f"{base.name} has no chat template" in result.stderr
    assert "adalink run" in result.stderr


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    result = chat(make_deployment(tmp_path, "bert", {})[1], "Hi")
    assert result.exit_code == 2
    assert "is an encoder and writes no text: use 'adalink run'" in result.stderr


def test_a_turn_reads_only_what_is_new(opened: Deployment) -> None:
    session, cached = ChatSession(opened, task="alpha", max_new_tokens=LENGTH), []
    for text in ("Hi", "Bye"):
        turn = session.send(text)
        generation = turn.handle.result(60)
        session.keep(turn, generation.text)
        cached.append(generation.cached_tokens)
    assert cached[0] == 0
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": session.turns[0][1]}]
    known = opened.tokenizer.encode_messages(messages[:1])
    assert cached[1] >= len(known) + LENGTH - 1


@pytest.mark.parametrize("target", ["onnxruntime-cpu", "portable"])
def test_the_prefix_cache_is_on_where_the_engine_allows_it(tmp_path: Path, monkeypatch: Any, target: str) -> None:
    folder, cached = make_chat_deployment(tmp_path, target=target), list[int]()
    keep = ChatSession.keep

    def note(self: ChatSession, turn: Turn, reply: str) -> None:
        cached.append(turn.handle.result().cached_tokens)
        keep(self, turn, reply)

    monkeypatch.setattr(ChatSession, "keep", note)
    reference = Reference(folder)
    assert chat(folder, "Hi\nBye").stdout.splitlines() == [reference.reply("Hi"), reference.reply("Bye")]
    assert cached[0] == 0
    assert (cached[1] > 10) == (target == "onnxruntime-cpu")


def test_the_oldest_turns_go_when_the_context_ends(chat_folder: Path, opened: Deployment) -> None:
    """At every turn: as many of the latest turns as fit, before a reply of a quarter of the context or its limit."""
    session, lines = ChatSession(opened, max_new_tokens=LENGTH), ["abcdef"[number % 6] * 20 for number in range(9)]
    turns: list[tuple[str, str]] = []
    dropped, said = [], ""
    for line in lines:
        kept = turns
        while True:
            messages = [
                {"role": role, "content": content}
                for user, reply in kept
                for role, content in (("user", user), ("assistant", reply))
            ] + [{"role": "user", "content": line}]
            if len(opened.tokenizer.encode_messages(messages)) + LENGTH <= POSITIONS:
                break
            kept = kept[1:]
        dropped.append(len(turns) - len(kept))
        reply = opened.generate(messages=messages, max_new_tokens=LENGTH)[0].text
        turn = session.send(line)
        assert turn.handle.result(60).text == reply
        assert turn.dropped == dropped[-1]
        session.keep(turn, reply)
        turns = [*kept, (line, reply)]
        assert list(session.turns) == turns
        said += reply + "\n"
    assert sum(dropped) > 2
    result = chat(chat_folder, "\n".join(lines))
    assert result.stdout == said
    assert result.stderr.count("left out: the conversation has outgrown the model's context") == len(
        [count for count in dropped if count]
    )


def test_a_reply_gets_the_room_that_is_left(opened: Deployment) -> None:
    session = ChatSession(opened, max_new_tokens=10 * POSITIONS)
    turn = session.send("Hi")
    prompt = len(opened.tokenizer.encode_messages([{"role": "user", "content": "Hi"}]))
    assert turn.limit == POSITIONS - prompt
    turn.handle.result(60)
    capacity = POSITIONS // 2
    profile = SimpleNamespace(capacity=capacity)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Deployment, "profile", profile)
        assert session.send("Hi").limit == capacity - prompt, "of a compiled engine"
        with pytest.raises(RequestError, match=f"this engine takes {capacity}: shorten the message"):
            session.send("Hi" * (capacity // 2))


def test_a_soft_prompt_takes_room_under_the_first_dimensions_of_a_task_too(
    chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(chat_folder, tmp_path / "deployment")
    base, settings = read_manifest(folder).base, {"activation": "identity", "bias": False, "scope": "all"}
    adapter = random_adapter(base.fingerprint, base.hidden_size, 3, rank=4, soft_tokens=3, nested=True, **settings)
    export_adapter(write_adapter(tmp_path / "soft", adapter), folder)
    with Deployment.open(folder, threads=1) as deployment:
        prompt = len(deployment.tokenizer.encode_messages([{"role": "user", "content": "Hi"}]))
        capacity = POSITIONS // 2
        monkeypatch.setattr(Deployment, "profile", SimpleNamespace(capacity=capacity))
        for task in ("soft", "soft@2"):
            session = ChatSession(deployment, task=task, max_new_tokens=POSITIONS)
            assert session.send("Hi").limit == capacity - prompt - 3, task


def test_what_fails_changes_no_conversation(opened: Deployment) -> None:
    session = ChatSession(opened, max_new_tokens=LENGTH)
    turn = session.send("Hi")
    session.keep(turn, turn.handle.result(60).text)
    before = session.turns
    with pytest.raises(RequestError):
        session.send("Hi" * POSITIONS)
    with pytest.raises(UnknownTaskError):
        session.use_task("gamma")
    with pytest.raises(RequestError):
        session.use_system("forbidden")
    session.keep(session.send("Bye"), "")
    assert (session.turns, session.task, session.system) == (before, None, None)
