"""Rows held out by lot, and warnings: against counts worked out by hand, and scikit-learn's stratified split."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from sklearn.model_selection import train_test_split

from adalink.runtime.errors import DataError
from adalink.training.data.held_out import hold_out
from adalink.training.data.labelled_rows import LabelledRow, LabelledSpan
from adalink.training.data.row_warnings import warn_of_labels, warn_of_prompts
from adalink.training.data.rows import TrainingRow, read_rows
from adalink.training.search.plan import split_rows

LABELS = ["oil"] * 50 + ["grain"] * 30 + ["tin"] * 19 + ["rare"]
TEXTS = [f"text {number}" for number in range(100)]


def test_every_label_has_its_share() -> None:
    split = hold_out(TEXTS, LABELS, seed=3)
    assert sorted((*split.train, *split.held_out)) == list(range(100))
    counts = Counter(LABELS[number] for number in split.held_out)
    assert counts == {"oil": 10, "grain": 6, "tin": 4}
    _, theirs = train_test_split(LABELS[:-1], test_size=0.2, stratify=LABELS[:-1], random_state=0)
    assert counts == Counter(theirs)


def test_the_seed_alone_decides() -> None:
    first, again, other = (hold_out(TEXTS, LABELS, seed) for seed in (3, 3, 4))
    assert first == again
    assert first.held_out != other.held_out
    assert first.as_record()["row_numbers_sha256"] != other.as_record()["row_numbers_sha256"]
    assert first.held_out != tuple(range(len(first.held_out)))


@pytest.mark.parametrize("seed", range(5))
def test_equal_texts_stay_together(seed: int) -> None:
    texts = [f"text {number // 3}" for number in range(90)]
    split = hold_out(texts, ["a"] * 90, seed)
    assert len(split.held_out) == 18
    assert not {texts[number] for number in split.train} & {texts[number] for number in split.held_out}


def test_different_completions_are_one_group() -> None:
    split = hold_out(TEXTS, TEXTS, seed=0)
    assert (split.stratified, len(split.held_out)) == (False, 20)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_few_texts(count: int) -> None:
    split = hold_out(TEXTS[:count], LABELS[:count], 0)
    assert (len(split.train), len(split.held_out)) == (count - 1, 1)


def test_one_text_cannot_be_split() -> None:
    with pytest.raises(DataError, match=r"all rows have one text, .*train with --eval"):
        hold_out(["a"] * 9, ["b"] * 9, 0)


@pytest.mark.parametrize("seed", range(5))
def test_a_label_of_one_row_is_learned(seed: int) -> None:
    """Of several labels too, which are no groups. Without their names the lot takes some of them."""
    names = [["oil", f"rare {number}"] if number % 5 == 0 else ["oil"] for number in range(100)]
    split = hold_out(TEXTS, [()] * 100, seed, names=names)
    assert {name for number in split.train for name in names[number]} == {name for some in names for name in some}
    lot = hold_out(TEXTS, [()] * 100, seed).held_out
    assert split.held_out == tuple(number for number in lot if number % 5) != lot


def test_rows_that_all_have_a_label_of_their_own() -> None:
    with pytest.raises(DataError, match="each row has a label that no other has"):
        hold_out(TEXTS, TEXTS, 0, names=[[text] for text in TEXTS])


def labelled(text: str, *labels: str) -> LabelledRow:
    return LabelledRow(text=text, labels=labels, line=1)


def test_warnings_of_labels() -> None:
    rows = [labelled("a", "x"), labelled("b", "x"), labelled("c", "y"), labelled("d", "y")]
    assert warn_of_labels(rows, [labelled("e", "x")]) == []
    (rare,) = warn_of_labels([*rows, labelled("f", "z")], [])
    assert rare == "1 labels have one training row ('z'): add rows, or is one misspelt?"
    spans = [LabelledRow(text="g h", spans=(LabelledSpan(0, 1, "LOC"),), line=1)]
    assert "('LOC')" in warn_of_labels(spans, [])[0]
    (both,) = warn_of_labels(rows, [labelled("a", "x"), labelled("q", "x")])
    assert both == "1 of 2 eval rows have texts of training rows: what is measured there is memory"
    (differing,) = warn_of_labels([*rows, labelled("a", "y")], [])
    assert differing.startswith("1 rows have the text of another row, with another label")


@pytest.mark.parametrize(
    ("prompt", "completion", "is_warned"),
    [
        ("Topic:", "oil", True),
        ("Topic:", " oil", False),
        ("Topic: ", "oil", False),
        ("Topic:\n", "oil", False),
        ('Say "', "oil", False),
        ("题目：", "石油", False),
        ("Topic:", ", oil", False),
    ],
)
def test_warning_of_a_missing_space(prompt: str, completion: str, is_warned: bool) -> None:
    warnings = warn_of_prompts([TrainingRow(prompt, completion)], [])
    assert bool(warnings) == is_warned
    if is_warned:
        (line,) = warnings
        assert line == (
            "1 of 1 completions begin without a space behind their prompts (such as 'Topic:oil'): most tokenizers "
            "expect ' oil'"
        )


def test_warnings_of_prompts() -> None:
    rows = [TrainingRow("a", " x"), TrainingRow("b", " y"), TrainingRow("a", " z")]
    differing, both = sorted(warn_of_prompts(rows, [TrainingRow("b", " q")]))
    assert differing.startswith("1 of 1 eval rows have prompts of training rows")
    assert both.startswith("1 rows have the prompt of another row, with another completion")


def test_the_place_of_a_row_is_no_part_of_it(tmp_path: Path) -> None:
    """A search holds out different rows: copies on other lines are the same."""
    lines = [f'{{"prompt": "a{number % 40}", "completion": " b"}}\n' for number in range(80)]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    rows = read_rows(tmp_path / "rows.jsonl")
    assert rows[0].line != rows[40].line
    assert rows[0] == rows[40]
    learned, held = split_rows(rows, 0)
    assert not {rows[number].prompt for number in learned} & {rows[number].prompt for number in held}
