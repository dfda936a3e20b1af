"""Several labels against scikit-learn, and spans against tags counted as CoNLL's script counts them."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import precision_recall_fscore_support

from adalink.tools.evaluation.item_metrics import measure_items
from adalink.tools.evaluation.rows import Item

NAMES = ("red", "green", "blue", "<b>")
KINDS = ("LOC", "PER")


@pytest.mark.parametrize("seed", range(3))
def test_several_labels_as_scikit_learn_says(seed: int) -> None:
    rng = np.random.default_rng(seed)
    expected, given = rng.random((60, 4)) < 0.4, rng.random((60, 4)) < 0.5
    measures = measure_items(*([items(row) for row in side] for side in (expected, given)))
    for average, ours in (("micro", (measures.precision, measures.recall, measures.f1.value)),):
        assert ours == pytest.approx(precision_recall_fscore_support(expected, given, average=average)[:3])
    each = precision_recall_fscore_support(expected, given, average=None)
    for one in measures.classes:
        place = NAMES.index(one.label)
        theirs = [float(values[place]) for values in each]
        assert (one.precision, one.recall, one.f1, one.rows) == pytest.approx(tuple(theirs))
    assert measures.macro_f1 == pytest.approx(float(np.mean(each[2])))
    assert measures.f1.low < measures.f1.value < measures.f1.high


def items(row: np.ndarray) -> frozenset[Item]:
    return frozenset(name for name, is_there in zip(NAMES, row, strict=True) if is_there)


@pytest.mark.parametrize("seed", range(5))
def test_spans_as_conll_counts_them(seed: int) -> None:
    """`conlleval` reads two columns of tags, token by token, and compares chunks when they end."""
    rng = np.random.default_rng(seed)
    tags = np.array(["O", *(f"{begin}-{kind}" for kind in KINDS for begin in "BI")])
    expected = [tags[rng.integers(0, 5, 12)].tolist() for _ in range(40)]
    given = [[tag if rng.random() < 0.8 else str(tags[rng.integers(0, 5)]) for tag in row] for row in expected]
    measures = measure_items(*([chunks(row) for row in side] for side in (expected, given)))
    right, gold, found = conlleval(expected, given)
    assert (measures.right, measures.expected, measures.given) == (right, gold, found)
    assert measures.precision == pytest.approx(right / found)
    assert measures.recall == pytest.approx(right / gold)
    assert measures.f1.value == pytest.approx(2 * right / (gold + found))


def chunks(tags: list[str]) -> frozenset[Item]:
    """Spans of a row of tags, by token: what the reader of rows makes of them."""
    spans: list[tuple[int, int, str]] = []
    for place, tag in enumerate(tags):
        kind = tag[2:]
        if tag.startswith("I") and spans and spans[-1][1:] == (place, kind):
            spans[-1] = (spans[-1][0], place + 1, kind)
        elif tag != "O":
            spans.append((place, place + 1, kind))
    return frozenset(spans)


def conlleval(expected: list[list[str]], given: list[list[str]]) -> tuple[int, int, int]:
    """Right, expected and given chunks, in the manner of the script of CoNLL 2000: one pass, no sets."""
    right = gold = found = 0
    for row, answer in zip(expected, given, strict=True):
        is_in_right = False
        last, last_answer = "O", "O"
        for tag, said in zip([*row, "O"], [*answer, "O"], strict=True):
            ends, ends_answer = ends_chunk(last, tag), ends_chunk(last_answer, said)
            starts, starts_answer = starts_chunk(last, tag), starts_chunk(last_answer, said)
            if is_in_right:
                if ends and ends_answer and last[2:] == last_answer[2:]:
                    right, is_in_right = right + 1, False
                elif ends != ends_answer or tag[2:] != said[2:]:
                    is_in_right = False
            if starts and starts_answer and tag[2:] == said[2:]:
                is_in_right = True
            gold += starts
            found += starts_answer
            last, last_answer = tag, said
    return right, gold, found


def ends_chunk(last: str, tag: str) -> bool:
    return last != "O" and (tag == "O" or tag[0] == "B" or last[2:] != tag[2:])


def starts_chunk(last: str, tag: str) -> bool:
    return tag != "O" and (tag[0] == "B" or last == "O" or last[2:] != tag[2:])


@pytest.mark.parametrize("wrong", [(0, 7, "LOC"), (1, 8, "LOC"), (0, 8, "PER")])
def test_a_span_that_is_nearly_right_is_wrong(wrong: Item) -> None:
    whole = [frozenset({(0, 8, "LOC"), (10, 12, "PER")})] * 10
    assert measure_items(whole, whole).f1.value == 1.0
    assert measure_items(whole, [frozenset({wrong, (10, 12, "PER")})] * 10).f1.value == 0.5


def test_nothing_to_find() -> None:
    nothing: list[frozenset[Item]] = [frozenset()] * 3
    assert measure_items(nothing, nothing).f1.value == 1.0
    assert measure_items(nothing, [frozenset({"red"}), *nothing[1:]]).f1.value == 0.0
