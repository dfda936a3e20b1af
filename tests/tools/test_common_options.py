"""What all verbs share: options, where their values come from, near names, and the last line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from adalink.runtime.storage.pooling_schema import Pooling
from adalink.tools.cli import SECTIONS, VERBS, main
from adalink.tools.command_line.json_output import JsonOutput, json_options
from adalink.tools.command_line.next_step import say_next, verb_for_texts
from adalink.tools.command_line.verb import Verb, VerbGroup
from adalink.tools.terminal.verbose import say

# Letters that stand for options of several names, and what they all mean.
SAME_MEANING = {"m": {"base", "against"}}  # the base model
WITHOUT_JSON = {"completion"}


def walk(command: click.Command = main, path: str = "") -> Iterator[tuple[str, click.Command]]:
    yield path.strip(), command
    if isinstance(command, click.Group):
        for name in command.list_commands(click.Context(command)):
            inner = command.get_command(click.Context(command), name)
            assert inner is not None
            yield from walk(inner, f"{path} {name}")


def options_of(command: click.Command) -> dict[str, click.Option]:
    options = [one for one in command.params if isinstance(one, click.Option)]
    return {name: option for option in options for name in option.opts}


ALL = dict(walk())
LEAVES = {path: command for path, command in ALL.items() if not isinstance(command, click.Group)}


@pytest.mark.parametrize("path", ALL)
def test_every_verb_has_the_common_options(path: str) -> None:
    command = ALL[path]
    assert isinstance(command, VerbGroup if isinstance(command, click.Group) else Verb)
    assert {"--config", "-v", "--verbose", "-q", "--quiet"} <= set(options_of(command))
    if path in LEAVES and path not in WITHOUT_JSON:
        assert options_of(command)["--json"].is_flag
        assert not options_of(command)["--json-file"].is_flag


def letters_of_two_meanings(commands: dict[str, click.Command]) -> list[str]:
    """Letters that stand for options of different names."""
    meanings: dict[str, set[str]] = {}
    for command in commands.values():
        for name, option in options_of(command).items():
            if not name.startswith("--"):
                long = next(one for one in option.opts if one.startswith("--")).removeprefix("--")
                meanings.setdefault(name.removeprefix("-"), set()).add(long)
    return [letter for letter, names in meanings.items() if len(names) > 1 and names != SAME_MEANING.get(letter)]


def test_a_letter_means_the_same_in_all_verbs() -> None:
    assert letters_of_two_meanings(ALL) == []
    planted = click.Command("planted", params=[click.Option(["-t", "--threads"])])
    assert letters_of_two_meanings({**ALL, "planted": planted}) == ["t"]


def test_every_verb_is_in_one_section_of_the_help() -> None:
    assert sum(map(len, SECTIONS.values())) == len(VERBS)
    shown = CliRunner().invoke(main, ["--help"]).stdout
    assert [title for title in SECTIONS if f"\n{title}:\n" in shown] == list(SECTIONS)
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize(
    ("words", "near"),
    [("rnu", "'run'"), ("verfy deployment", "'verify'"), ("export bsae x", "'base'"), ("run --tsak x", "--task")],
)
def test_near_name_is_suggested(words: str, near: str) -> None:
    result = CliRunner().invoke(main, words.split())
    assert result.exit_code == 2
    assert near in result.stderr.replace("Did you mean", "did you mean").partition("did you mean ")[2]


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Call a verb that answers with its options, in the place of ``doctor``; no file of the user's own is read."""

    @click.command(cls=Verb)
    @click.argument("text", default="text")
    @click.option("-n", "--most-tokens", "most", type=int, default=1)
    @click.option("--choice", type=click.Choice(["a", "b"]))
    @click.option("--flag", is_flag=True)
    @click.option("--stop", "stops", multiple=True)
    @json_options("")
    def command(text: str, most: int, choice: str, flag: bool, stops: tuple[str, ...], output: JsonOutput) -> None:
        answer = {"most": most, "choice": choice, "flag": flag, "stops": list(stops)}
        say("progress")
        output.give(answer, lambda: click.echo(json.dumps(answer)))
        say_next("inspect", "a b", "--task", None, output=output)

    monkeypatch.setattr("adalink.tools.commands.doctor.command", command)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))

    def call(*words: object, **variables: str) -> Result:
        return CliRunner().invoke(main, [*map(str, words)], env=variables)

    return call


def answer(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    values: dict[str, Any] = json.loads(result.stdout)
    return values


def test_command_line_then_environment_then_file(probe: Any, tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text('[doctor]\nmost-tokens = 2\nstop = ["a b", "c"]\nflag = true\nchoice = "b"\n')
    variables = {"ADALINK_DOCTOR_MOST_TOKENS": "3"}
    assert answer(probe("doctor"))["most"] == 1
    assert answer(probe("doctor", "--config", file)) == {"most": 2, "choice": "b", "flag": True, "stops": ["a b", "c"]}
    assert answer(probe("doctor", "--config", file, **variables))["most"] == 3
    assert answer(probe("--config", file, "doctor", "-n", 4, **variables))["most"] == 4
    assert answer(probe("doctor", ADALINK_CONFIG=str(file)))["most"] == 2
    assert answer(probe("doctor", "--stop", "d", "--config", file))["stops"] == ["d"]


def test_only_the_users_own_file_is_read_by_itself(probe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of the current folder may come with somebody else's repository."""
    monkeypatch.chdir(tmp_path)
    for name in ("adalink.toml", "config.toml"):
        Path(name).write_text("[doctor]\nmost-tokens = 5\n")
    assert answer(probe("doctor"))["most"] == 1
    own = tmp_path / "home" / "adalink"
    own.mkdir(parents=True)
    Path("config.toml").rename(own / "config.toml")
    assert answer(probe("doctor"))["most"] == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[doctor", "is not TOML"),
        ("[doctr]", "doctr is no verb, expected a table of one, such as [quickstart]; did you mean 'doctor'?"),
        ("doctor = 3", "doctor is 3, expected a table of options: [doctor]"),
        ("[export]\nout = 'x'", "export.out is no verb, expected a table of one, such as [export.adapter]"),
        ("[doctor]\nmost-token = 3", "[doctor] has 'most-token', expected options by their long names"),
        ("[doctor]\nmost-token = 3", "did you mean 'most-tokens'?"),
        ("[doctor]\nflag = 'yes'", "[doctor] flag is 'yes', expected true or false"),
        ("[doctor]\nchoice = ['a']", "[doctor] choice is ['a'], expected a text or a number"),
        ("[doctor]\nchoice = true", "[doctor] choice is True, expected a text or a number"),
        ("[doctor]\nstop = [[1]]", "[doctor] stop is [[1]], expected a list of texts or numbers"),
        ("[doctor]\nchoice = 'c'", "x.toml: choice)"),
        ("[doctor]\ntoken = 'secret-word'", "[doctor] has a token, which does not belong into a file"),
        ("[doctor]\nconfig = 'x'", "[doctor] has 'config'"),
    ],
)
def test_wrong_file_is_an_error_that_names_the_line(probe: Any, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.toml").write_text(text)
    words = ("export", "base", "x") if "export" in text else ("doctor",)
    result = probe("--config", tmp_path / "x.toml", *words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert "secret-word" not in result.stderr


def test_wrong_variable_is_named(probe: Any) -> None:
    result = probe("doctor", ADALINK_DOCTOR_MOST_TOKENS="tcp://10.0.0.1:80")
    assert result.exit_code == 2
    assert "(from the environment variable ADALINK_DOCTOR_MOST_TOKENS)" in result.stderr


@pytest.mark.parametrize("words", [("--json", "report.json"), ("--json=report.json",)])
def test_old_json_with_a_file_is_told_the_new_name(probe: Any, words: tuple[str, ...]) -> None:
    result = probe("doctor", "text", *words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "for a file: --json-file FILE" in result.stderr


def test_json_is_alone_on_stdout_and_the_same_in_the_file(probe: Any, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    both = probe("doctor", "--json", "--json-file", report)
    assert (answer(both), both.stderr) == (json.loads(report.read_text()), "progress\n")
    report.unlink()
    alone = probe("doctor", "--json-file", report)
    assert answer(alone) == json.loads(report.read_text())
    assert alone.stderr == "progress\nnext: adalink inspect 'a b'\n"


@pytest.mark.parametrize(
    ("pooling", "verb"), [(None, "run"), (Pooling(), "run"), (Pooling(modes=("mean",)), "embed")], ids=str
)
def test_next_verb_is_one_that_the_base_can(pooling: Pooling | None, verb: str) -> None:
    """`embed` guesses no pooling."""
    base: Any = SimpleNamespace(pooling=pooling)
    assert verb_for_texts(base) == verb


def test_quiet_leaves_the_answer_alone(probe: Any) -> None:
    for words in (("-q", "doctor"), ("doctor", "-q")):
        result = probe(*words)
        assert (answer(result)["most"], result.stderr) == (1, "")
    assert answer(probe("doctor", ADALINK_DOCTOR_QUIET="1")) == answer(probe("doctor"))
    assert "No such option" in probe("doctor", "--nonesuch", "-q").stderr
    assert "give one of --verbose and --quiet" in probe("-v", "doctor", "-q").stderr
    loud = probe("-v", "doctor", ADALINK_DOCTOR_QUIET="1")  # the command line wins
    assert (loud.exit_code, loud.stderr.startswith("progress\n")) == (0, True)
    assert probe("-q", "doctor", "-q").stderr == ""


def test_numbers_that_are_not_finite_are_null(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = {"a": [float("nan"), 1.5], "b": {"c": float("inf")}}
    output = JsonOutput(on_stdout=True, file=tmp_path / "x.json")
    output.give(report, lambda: None)
    with output.lines() as json_line:
        line = json_line(report)
    expected = {"a": [None, 1.5], "b": {"c": None}}
    assert json.loads(capsys.readouterr().out) == json.loads(line) == expected
    assert json.loads((tmp_path / "x.json").read_text()) == expected


def test_config_shows_what_is_set_and_where(probe: Any, tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text("[doctor]\nmost-tokens = 2\n[export.base]\ndtype = 'fp16'\n")
    variables = {"ADALINK_DOCTOR_MOST_TOKENS": "3", "ADALINK_DOCTR_FLAG": "1", "HF_TOKEN": "secret-word"}
    file = str(tmp_path / "x.toml")
    result = probe("config", "--config", file, "--json", **variables)
    assert "secret-word" not in result.output
    report = answer(result)
    assert report["file"] == file
    assert report["unknown_variables"] == ["ADALINK_DOCTR_FLAG"]
    of = {"verb": "doctor", "option": "most-tokens"}
    assert report["settings"] == [
        {"verb": "export base", "option": "dtype", "value": "fp16", "source": file, "is_used": True},
        {**of, "value": "3", "source": "ADALINK_DOCTOR_MOST_TOKENS", "is_used": True},
        {**of, "value": 2, "source": file, "is_used": False},
    ]
    shown = probe("config", "--config", file, **variables)
    assert "adalink doctor --most-tokens: 2, from" in shown.stdout
    assert "did you mean 'ADALINK_DOCTOR_FLAG'?" in shown.stderr
    (tmp_path / "x.toml").write_text("[doctor]\nmost-token = 2\n")
    assert "did you mean 'most-tokens'?" in probe("config", "--config", file).stderr
