"""A quick start: real steps on a tiny encoder, each a command that the verbs take, and none done twice."""

from __future__ import annotations

import csv
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from helpers.code_blocks import check_command
from helpers.sentences import save_encoder

from adalink.runtime.errors import ConfigError
from adalink.runtime.rows.source import RowSource
from adalink.runtime.storage.adapter import read_adapter
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.tools.cli import main
from adalink.tools.command_line.verb import VerbGroup, words_for_steps
from adalink.tools.commands import quickstart
from adalink.tools.quickstart.run import run_steps
from adalink.tools.quickstart.state import STATE_FILE, State
from adalink.tools.quickstart.steps import TEMPLATE, Places, Step, choose_template, make_steps, name_task
from adalink.tools.terminal.verbose import say

WORDS = ("oil", "corn", "gold")
VERBS = ["export base", "split", "train", "export adapter", "verify", "eval"]
# Defaults of three steps, each of which leaves a trace.
CONFIG = '[export.base]\ntarget = "portable"\n[train]\nmax-steps = 4\n[verify]\nthreads = 1\n'


def write_rows(path: Path, count: int) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = [[f"{word} rose {number}", word] for word in WORDS for number in range(count)]
        csv.writer(file).writerows([["body", "topic"], *rows])


def start(*more: str, rows: str | Path = "my news.csv", out: str | Path = "here") -> Result:
    words = ["quickstart", "tiny", str(rows), "--out", str(out), "--map", "text=body,label=topic", "--rank", "4"]
    return CliRunner().invoke(main, [*words, "--config", "my.toml", *more], catch_exceptions=False)


class Calls:
    """In place of running commands: which were asked for."""

    def __init__(self, code: int = 0) -> None:
        self.verbs: list[str] = []
        self.words: list[Sequence[str]] = []
        self._code = code

    def __call__(self, words: Sequence[str]) -> tuple[int, str]:
        self.words.append(words)
        words = words[2:] if words[0] == "--config" else words
        self.verbs.append(" ".join(words[: 2 if words[0] == "export" else 1]))
        return self._code, "said\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """The folder of a quick start that ran once."""
    root = tmp_path_factory.mktemp("quickstart")
    save_encoder(root / "tiny")
    write_rows(root / "my news.csv", 12)
    (root / "my.toml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        return root, start("--json")


def test_one_command_leads_to_a_measured_task(made: tuple[Path, Result]) -> None:
    root, result = made
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["verdict"].startswith("my-news (portable) is right on ")
    assert report["next"] == "adalink classify here/deployment TEXT --task my-news"
    for step, verb in zip(report["steps"], VERBS, strict=True):
        assert step["command"].startswith(f"adalink --config my.toml {verb} ")
    assert all(step["seconds"] >= 0 for step in report["steps"])  # none was done before
    assert report["evaluation"]["tasks"][0]["rows"] == 6
    task = read_manifest(root / "here/deployment").tasks["my-news"]
    assert task.adapter_digest == read_adapter(root / "here/adapters/my-news").digest
    assert (root / "here/reports/my-news.html").is_file()
    parity = json.loads((root / "here/reports/parity.json").read_text())
    assert (parity["passed"], parity["environment"]["threads"]) == (True, 1)
    assert json.loads((root / "here/adapters/my-news/training.json").read_text())["settings"]["max_steps"] == 4
    for step in report["steps"]:
        assert f"] {step['command']}\n" in result.stderr


def test_told_commands_do_the_same(made: tuple[Path, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tiny", "my news.csv", "my.toml"):
        (tmp_path / name).symlink_to(made[0] / name)
    monkeypatch.chdir(tmp_path)
    for step in json.loads(made[1].stdout)["steps"]:
        result = CliRunner().invoke(main, shlex.split(step["command"])[1:], catch_exceptions=False)
        assert result.exit_code == 0, result.stderr
    assert read_adapter(Path("here/adapters/my-news")).digest == read_adapter(made[0] / "here/adapters/my-news").digest
    assert {path.name for path in Path("here/reports").iterdir()} == {"my-news.html", "my-news.json", "parity.json"}


def again(made: tuple[Path, Result], monkeypatch: pytest.MonkeyPatch, **places: Path) -> Calls:
    """Start again; gives the commands that are run."""
    monkeypatch.chdir(made[0])
    calls = Calls()
    monkeypatch.setattr(quickstart, "_call", calls)
    start(**places)
    return calls


def test_paths_may_be_typed_in_another_way(made: tuple[Path, Result], monkeypatch: pytest.MonkeyPatch) -> None:
    root = made[0].resolve()
    assert again(made, monkeypatch, rows=root / "my news.csv", out=root / "here").verbs == []
    assert again(made, monkeypatch, rows=root / "here/../my news.csv").verbs == []
    assert str(root) not in (root / "here" / STATE_FILE).read_text()


def test_other_defaults_are_another_command(made: tuple[Path, Result], monkeypatch: pytest.MonkeyPatch) -> None:
    root = made[0]
    state = (root / "here" / STATE_FILE).read_bytes()
    (root / "my.toml").write_text(CONFIG.replace("4", "5"))
    assert again(made, monkeypatch).verbs == ["train"]  # no adapter is written here: nothing else has changed
    (root / "here" / STATE_FILE).write_bytes(state)
    (root / "my.toml").write_text(CONFIG)
    monkeypatch.setenv("ADALINK_SPLIT_SEED", "3")
    assert again(made, monkeypatch).verbs == ["split"]
    (root / "here" / STATE_FILE).write_bytes(state)


def test_what_is_done_is_not_done_again(made: tuple[Path, Result], monkeypatch: pytest.MonkeyPatch) -> None:
    root = made[0]
    state = (root / "here" / STATE_FILE).read_bytes()
    assert again(made, monkeypatch).verbs == []
    page = root / "here/reports/my-news.html"
    text = page.read_bytes()
    page.unlink()
    assert again(made, monkeypatch).verbs == ["eval"]
    page.write_bytes(text)
    (root / "here" / STATE_FILE).write_bytes(state)
    write_rows(root / "my news.csv", 13)
    assert again(made, monkeypatch).verbs == ["split"]  # which writes no rows here, so that nothing else has changed
    (root / "here" / STATE_FILE).write_bytes(state)
    (root / "tiny/config.json").touch()
    assert again(made, monkeypatch).verbs == ["export base", "split", "train", "verify"]


def test_other_rows_take_no_task_of_another_file(made: tuple[Path, Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made[0])
    monkeypatch.setattr(quickstart, "_call", Calls())
    (made[0] / "other.csv").write_text("body,topic\noil,oil\ncorn,corn\n")
    words = ["quickstart", "tiny", "other.csv", "--out", "here", "--map", "text=body,label=topic", "--task", "my-news"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2
    assert (
        "task 'my-news' in here was made of my news.csv, not of other.csv: give another name with --task"
        in result.stderr
    )


def test_steps_have_the_options_of_all_verbs(tmp_path: Path) -> None:
    """What a step says is as quiet as the start, and its defaults come from the same file; its answer is taken."""

    @click.group(cls=VerbGroup)
    def root() -> None:
        pass

    @root.command()
    @click.option("--number", default=1)
    def step(number: int) -> None:
        say(f"on the way {number}")
        click.echo("answer")

    @root.command()
    def whole() -> None:
        words = words_for_steps(click.get_current_context())
        assert quickstart._call([*words, "step"]) == (0, "answer\n")

    (tmp_path / "x.toml").write_text("[step]\nnumber = 2\n")
    file = f"--config={tmp_path / 'x.toml'}"
    for words, said in ((["whole"], "on the way 1\n"), (["whole", "-q"], ""), ([file, "whole"], "on the way 2\n")):
        assert CliRunner().invoke(root, words, catch_exceptions=False).stderr == said


@pytest.fixture
def steps(tmp_path: Path) -> list[Step]:
    def make(number: int) -> Step:
        return Step(f"step {number}", ("split", str(number)), (tmp_path / str(number)).read_text)

    return [make(number) for number in range(3)]


def test_a_step_that_fails_is_where_the_next_start_goes_on(tmp_path: Path, steps: list[Step]) -> None:
    lines: list[str] = []
    for number in range(3):
        (tmp_path / str(number)).write_text("made")
    out = tmp_path / "out"

    def fail_second(words: Sequence[str]) -> tuple[int, str]:
        return (1, "why\n") if words[1] == "1" else (0, "made\n")

    with pytest.raises(click.exceptions.Exit) as failed:
        run_steps(steps, State(out), fail_second, lines.append)
    assert failed.value.exit_code == 1
    assert lines[-1] == "why\nstep 2 failed: the same quickstart goes on there, once its cause is mended"

    def refuse(words: Sequence[str]) -> tuple[int, str]:
        raise click.UsageError("no")

    with pytest.raises(click.UsageError):
        run_steps(steps, State(out), refuse, lines.append)
    assert lines[-1] == "step 2 failed: the same quickstart goes on there, once its cause is mended"
    calls = Calls()
    done = run_steps(steps, State(out), calls, lines.append)
    assert [words[1] for words in calls.words] == ["1", "2"]
    assert [one.seconds is None for one in done] == [True, False, False]
    assert "[1/3] done before: adalink split 0" in lines


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_steps_are_commands_that_the_verbs_take(kind: str, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,label\na,x\n")
    (tmp_path / "model").mkdir()
    name = "BertModel" if kind == "encoder" else "LlamaForCausalLM"
    (tmp_path / "model/config.json").write_text(json.dumps({"architectures": [name]}))
    (tmp_path / "model/model.safetensors").touch()
    source = RowSource(tmp_path / "rows.csv", {"text": "text"})
    template = choose_template(str(tmp_path / "model"), source)
    assert template == (TEMPLATE if kind == "decoder" else None)
    places = Places(tmp_path / "out", "topics")
    source = RowSource(source.path, source.columns, template)
    model = str(tmp_path / "model")
    for step in make_steps(model, source, places, seed=0, revision="v2", training=("--max-steps", "9")):
        check_command([*step.command, *step.extra()])
        assert ("--revision" in step.command) == (step.verb in ("export base", "train", "verify"))
        assert step.evidence() is None  # nothing is there yet


def test_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ConfigError, match=r"is not empty and holds no quickstart\.json: choose another --out"):
        State(tmp_path)
    (tmp_path / STATE_FILE).write_text("{")
    with pytest.raises(ConfigError, match=r"quickstart\.json is damaged: .*; remove it: all steps are then done again"):
        State(tmp_path)


@pytest.mark.parametrize(("rows", "name"), [("my news.csv", "my-news"), ("ä.csv", None), ("a" * 99, "a" * 64)])
def test_name_of_a_task_is_that_of_the_file(rows: str, name: Any) -> None:
    if name is None:
        with pytest.raises(ConfigError, match="give one with --task"):
            name_task(None, Path(rows))
    else:
        assert name_task(None, Path(rows)) == name
