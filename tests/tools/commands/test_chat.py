"""`adalink chat` against the deployment called directly, with pipes and in a real terminal."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result
from helpers.runtime import random_adapter, write_adapter
from helpers.tiny_deployments import make_deployment
from helpers.tiny_models import FAMILIES
from helpers.tiny_tokenizer import make_tokenizer

from adalink.export.adapter.export import export_adapter
from adalink.export.base.export import export_base
from adalink.runtime import Deployment, SamplingParams
from adalink.runtime.errors import RequestError, UnknownTaskError
from adalink.runtime.storage.manifest_io import encode_manifest, read_manifest
from adalink.tools.cli import main
from adalink.tools.common.chat_session import ChatSession

LENGTH, POSITIONS = 5, 256


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, model = tmp_path_factory.mktemp("chat"), FAMILIES["mistral"]()
    model.config.max_position_embeddings = POSITIONS  # its position embeddings are rotary, so there is no table of them
    export_base(model, root / "deployment", tokenizer=make_tokenizer())
    fingerprint = read_manifest(root / "deployment").base.fingerprint
    for seed, task in enumerate(("alpha", "beta")):
        adapter = random_adapter(fingerprint, 48, seed, rank=4, activation="gelu", bias=True, scope="all")
        export_adapter(write_adapter(root / task, adapter), root / "deployment")
    return root / "deployment"


@pytest.fixture(scope="module")
def opened(folder: Path) -> Iterator[Deployment]:
    with Deployment.open(folder, threads=1, prefix_cache_bytes=1 << 20) as deployment:
        yield deployment


def chat(folder: Path, text: str | bytes, *options: Any) -> Result:
    arguments = ["chat", str(folder), "--max-new-tokens", str(LENGTH), *map(str, options)]
    return CliRunner().invoke(main, arguments, input=text)


class Reference:
    """The conversation written out: the whole of it is generated anew at each turn."""

    def __init__(self, folder: Path, system: str | None = None) -> None:
        self.folder, self.messages = folder, list[dict[str, str]]()
        self.say("system", system)

    def say(self, role: str, content: str | None) -> None:
        if content is not None:
            self.messages.append({"role": role, "content": content})

    def reply(self, text: str, task: str | None = None, **settings: Any) -> str:
        self.say("user", text)
        with Deployment.open(self.folder) as deployment:
            settings = {"max_new_tokens": LENGTH} | settings
            reply = deployment.generate(messages=self.messages, tasks=task, **settings)[0].text
        self.say("assistant", reply)
        return reply


def test_each_line_is_a_turn_that_sees_those_before(folder: Path) -> None:
    reference = Reference(folder)
    expected = [reference.reply(text) for text in ("Hi", "Bye", "So")]
    alone = Reference(folder).reply("So")
    assert alone != expected[-1]
    result = chat(folder, "Hi\n\n  Bye \r\nSo")
    assert (result.exit_code, result.stdout) == (0, "".join(f"{text}\n" for text in expected))
    assert chat(folder, "\ufeffHi\nBye\n").stdout == "".join(f"{text}\n" for text in expected[:2])
    assert chat(folder, "").stdout == ""


def test_commands_change_task_system_and_history(folder: Path) -> None:
    reference = Reference(folder, "Be kind")
    expected = [
        reference.reply("Hi", "alpha"),
        reference.reply("Hi", "beta"),
        reference.reply("Hi"),
        Reference(folder, "Be kind").reply("Hi"),
        Reference(folder, "Hush").reply("/Hi"),
        Reference(folder).reply("Hi"),
    ]
    assert len(set(expected)) == 6
    lines = "Hi\n/task beta\nHi\n/base\nHi\n/clear\nHi\n/clear\n/system Hush\n//Hi\n/clear\n/system\nHi\n/quit\nHi"
    result = chat(folder, lines, "--task", "alpha", "--system", "Be kind")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines() == expected
    shown = chat(folder, "/task alpha\n/task\n/help\n").stderr
    assert "task alpha answers\n  (base model)\n* alpha\n  beta\n" in shown
    assert all(name in shown for name in ("/task", "/base", "/system", "/clear", "/quit", "Ctrl-C"))


def test_a_task_that_changes_in_the_folder_is_taken_up(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "deployment"))
    expected = [Reference(copy).reply("Hi", task) for task in ("alpha", "beta")]
    load = ChatSession.use_task

    def load_and_change(self: ChatSession, name: str | None) -> None:
        load(self, name)
        if not (copy / "tasks/new").exists():
            for task in ("alpha", "new"):
                export_adapter(folder.parent / "beta", copy, name=task, replace=True)

    monkeypatch.setattr(ChatSession, "use_task", load_and_change)
    result = chat(copy, "Hi\n/clear\n/reload\nHi\n/reload", "--task", "alpha")
    assert result.stdout.splitlines() == expected
    assert "\nadded new; replaced alpha\n" in result.stderr
    assert result.stderr.endswith("\nnothing has changed\n")


def test_options_of_sampling_reach_the_deployment(folder: Path) -> None:
    sampling = SamplingParams(temperature=0.9, top_k=20, top_p=0.95, seed=3)
    expected = Reference(folder).reply("Hi", sampling=sampling)
    assert expected != Reference(folder).reply("Hi")
    options = ["--temperature", 0.9, "--top-k", 20, "--top-p", 0.95, "--seed", 3]
    assert chat(folder, "Hi", *options).stdout == expected + "\n"


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
    folder: Path, text: str | bytes, options: list[str], message: str
) -> None:
    result = chat(folder, text, *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout.count("\n") == (1 if isinstance(text, str) and text.startswith("Hi\n") else 0)


def test_bases_without_a_chat_template_are_refused(folder: Path, tmp_path: Path) -> None:
    plain = Path(shutil.copytree(folder, tmp_path / "plain"))
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


def test_the_oldest_turns_go_when_the_context_ends(folder: Path, opened: Deployment) -> None:
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
    result = chat(folder, "\n".join(lines))
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


# A process whose steps take long enough for a person, or a test, to press a key.
SCRIPT = """
import fcntl, termios, time
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from adalink.runtime.generation.running_batch import RunningBatch
step = RunningBatch.step
def slow(self):
    time.sleep({seconds})
    step(self)
RunningBatch.step = RunningBatch.speculate = slow
{patch}
from adalink.tools.cli import main
main({arguments!r})
"""
EVIL = """
from adalink.runtime.text.tokenizer import TextStream
push = TextStream.push
TextStream.push = lambda self, token: push(self, token) + "\\x1b[2J\\r"
"""
# The planted fault: what the model writes is printed as it is.
RAW = """
from adalink.tools.commands import chat
chat.echo_generated = lambda text, nl=True: print(text, end="\\n" if nl else "", flush=True)
"""


class Terminal:
    """`adalink chat` in a terminal of its own."""

    def __init__(self, folder: Path, *options: str, seconds: float = 0.0, patch: str = "") -> None:
        script = SCRIPT.format(seconds=seconds, arguments=["chat", str(folder), *options], patch=patch)
        self.leader, follower = pty.openpty()
        settings = termios.tcgetattr(follower)
        settings[3] |= termios.NOFLSH  # Ctrl-C discards no text that was not read yet
        termios.tcsetattr(follower, termios.TCSANOW, settings)
        environment = os.environ | {"TERM": "dumb", "PYTHONPATH": os.pathsep.join(sys.path)}
        streams = {"stdin": follower, "stdout": follower, "stderr": follower}
        self.process = subprocess.Popen(
            [sys.executable, "-c", script], env=environment, start_new_session=True, **streams
        )
        os.close(follower)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self.leader, text.encode())

    def type_until(self, text: str, pattern: str) -> str:
        """Type a text, each second again, until there is a match."""
        for _ in range(30):
            self.type(text)
            with contextlib.suppress(AssertionError):
                return self.wait(pattern, seconds=1)
        return self.wait(pattern)

    def wait(self, pattern: str, seconds: float = 30) -> str:
        """What is shown up to and with a match of ``pattern``, from the end of the last one."""
        ends = time.monotonic() + seconds
        while not (found := re.search(pattern, self.shown, re.DOTALL)):
            ready, _, _ = select.select([self.leader], [], [], max(0, ends - time.monotonic()))
            assert ready, f"{pattern!r} did not come: {self.shown!r}"
            self.shown += os.read(self.leader, 1 << 16).decode()
        text, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return text

    def close(self) -> int:
        """End it with Ctrl-D, at its prompt; returns its exit code."""
        self.type("\x04")
        code = self.process.wait(30)
        os.close(self.leader)
        return code


def test_ctrl_c_ends_a_reply_which_is_kept(folder: Path) -> None:
    reference = Reference(folder)
    whole = reference.reply("Hi", "alpha", max_new_tokens=40)
    terminal = Terminal(folder, "--max-new-tokens", "40", "--task", "alpha", seconds=0.1)
    terminal.wait("alpha> ")
    terminal.type("Hi\n")
    shown = terminal.wait("Hi\r\n.{3}")
    terminal.type("\x03")
    shown += terminal.wait(r"\[stopped\]\r\n")
    _, _, printed = shown.partition("Hi\r\n")
    # The terminal shows the key as ^C, in the midst of the reply.
    printed = printed.removesuffix("\r\n[stopped]\r\n")
    cuts = [printed[: at.start()] + printed[at.end() :] for at in re.finditer(r"\^C", printed)]
    (reply,) = [cut for cut in cuts if whole.startswith(cut)]
    assert 3 <= len(reply) < len(whole)
    reference.messages[-1]["content"] = reply
    expected = reference.reply("Bye", "alpha", max_new_tokens=3)
    terminal.wait("alpha> ")
    terminal.type("Bye\n")
    assert terminal.wait("Bye\r\n.{3}").endswith(f"Bye\r\n{expected}")
    terminal.type("\x03")
    terminal.wait(r"\[stopped\]\r\nalpha> ")
    assert terminal.close() == 0


def test_errors_and_ctrl_c_leave_the_prompt(folder: Path) -> None:
    terminal = Terminal(folder, "--max-new-tokens", "2")
    terminal.wait("> ")
    terminal.type("/task gamma\n")
    terminal.wait("Error: task 'gamma' is not deployed[^\n]*\r\n> ")
    # Python's readline misses a Ctrl-C that comes just before it waits for a key, until the next one.
    terminal.type_until("\x03", "/quit or Ctrl-D leaves\r\n> ")
    terminal.type("Hi\n")
    expected = Reference(folder).reply("Hi", max_new_tokens=2)
    assert re.escape(expected) in re.escape(terminal.wait("limit of 2 tokens\\]\r\n> "))
    assert terminal.close() == 0


@pytest.mark.parametrize("patch", [EVIL, EVIL + RAW], ids=["escaped", "planted"])
def test_no_control_character_of_the_model_reaches_the_terminal(folder: Path, patch: str) -> None:
    terminal = Terminal(folder, "--max-new-tokens", "4", patch=patch)
    terminal.wait("> ")
    terminal.type("Hi\n")
    shown = terminal.wait("limit of 4 tokens\\]\r\n> ")
    assert terminal.close() == 0
    is_raw = "\x1b[2J" in shown
    assert is_raw == (RAW in patch)
    assert (r"\x1b[2J\r" in shown) == (not is_raw)
