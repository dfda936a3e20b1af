"""Measures against numbers worked out by hand, and against scikit-learn and scipy called directly."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, classification_report, confusion_matrix, f1_score

from adalink.tools.evaluation.metrics import calibration, gain, majority, mcnemar, measure_labels, wilson

# Worked out by hand: cat 2 of 3 found, 2 of 3 answers right; dog 1 of 2 and 1 of 2; owl 0 of 1, never answered.
EXPECTED = ["cat", "cat", "cat", "dog", "dog", "owl"]
ANSWERS = ["cat", "cat", "dog", "dog", "cat", "emu"]
CONFIDENCE = np.array([0.95, 0.85, 0.55, 0.65, 1.0, 0.05])


def test_labels_by_hand() -> None:
    measures = measure_labels(EXPECTED, ANSWERS, CONFIDENCE)
    shown = {one.label: (one.rows, one.answers, one.precision, one.recall, one.f1) for one in measures.classes}
    assert shown["cat"] == (3, 3, pytest.approx(2 / 3), pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert shown["dog"] == (2, 2, 0.5, 0.5, 0.5)
    assert (shown["owl"], shown["emu"]) == ((1, 0, 0.0, 0.0, 0.0), (0, 1, 0.0, 0.0, 0.0))
    assert [one.label for one in measures.classes] == ["cat", "dog", "owl", "emu"]
    assert measures.confusion == [[2, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    assert measures.macro_f1.value == pytest.approx((2 / 3 + 1 / 2) / 4)
    assert measures.macro_f1.low <= measures.macro_f1.value <= measures.macro_f1.high


def test_calibration_by_hand() -> None:
    right = np.array([one == other for one, other in zip(EXPECTED, ANSWERS, strict=True)])
    error, bins = calibration(right, CONFIDENCE)
    # Bins: 0.05 wrong; 0.55 wrong; 0.65 right; 0.85 right; 0.95 right and 1.0 wrong together: 0.975 against 0.5.
    assert [(one.low, one.rows, one.accuracy) for one in bins] == [
        (0.0, 1, 0.0),
        (0.5, 1, 0.0),
        (0.6, 1, 1.0),
        (0.8, 1, 1.0),
        (0.9, 2, 0.5),
    ]
    assert error == pytest.approx((0.05 + 0.55 + 0.35 + 0.15 + 2 * 0.475) / 6)
    assert calibration(np.array([True] * 4), np.ones(4))[0] == 0.0


@pytest.mark.parametrize("seed", range(5))
def test_labels_as_scikit_learn_says(seed: int) -> None:
    rng = np.random.default_rng(seed)
    names = np.array(["oil", "grain", "trade", "tea", "<b>"])
    expected = names[rng.integers(0, 5, 200)].tolist()
    answers = [one if rng.random() < 0.7 else str(names[rng.integers(0, 5)]) for one in expected]
    measures = measure_labels(expected, answers, rng.random(200))
    report = classification_report(expected, answers, output_dict=True, zero_division=0)
    for one in measures.classes:
        theirs = report[one.label]
        assert (one.precision, one.recall, one.f1, one.rows) == pytest.approx(
            (theirs["precision"], theirs["recall"], theirs["f1-score"], theirs["support"])
        )
    order = [one.label for one in measures.classes]
    assert measures.confusion == confusion_matrix(expected, answers, labels=order).tolist()
    assert measures.macro_f1.value == pytest.approx(f1_score(expected, answers, average="macro"))
    trace = sum(measures.confusion[place][place] for place in range(len(order)))
    assert trace / 200 == pytest.approx(accuracy_score(expected, answers))


def test_intervals_of_shares_are_wilsons() -> None:
    for right, rows in ((0, 7), (7, 7), (3, 4), (457, 500)):
        one = wilson(right, rows)
        theirs = binomtest(right, rows).proportion_ci(method="wilson")
        assert (one.value, one.low, one.high) == pytest.approx((right / rows, theirs.low, theirs.high), abs=1e-12)


def test_difference_on_the_same_rows() -> None:
    ours = np.array([True] * 80 + [False] * 20)
    theirs = np.array([True] * 60 + [False] * 30 + [True] * 10)
    assert gain(ours, theirs) == gain(ours, theirs)
    assert gain(ours, theirs).value == pytest.approx(0.1)
    assert gain(ours, theirs).low < 0.1 < gain(ours, theirs).high
    assert mcnemar(ours, theirs) == pytest.approx(binomtest(20, 30).pvalue)
    assert (mcnemar(ours, ours), gain(ours, ours).low) == (1.0, 0.0)
    assert mcnemar(np.array([True] * 3), np.array([False] * 3)) == pytest.approx(0.25)  # three rows show nothing


def test_swapped_labels_are_seen() -> None:
    """Planted: two labels exchanged throughout. Their F1 falls to 0, others stay."""
    expected = ["oil"] * 10 + ["tea"] * 10 + ["tin"] * 10
    swapped = [{"oil": "tea", "tea": "oil"}.get(one, one) for one in expected]
    measures = measure_labels(expected, swapped, np.full(30, 0.9))
    assert {one.label: one.f1 for one in measures.classes} == {"oil": 0.0, "tea": 0.0, "tin": 1.0}
    assert measures.confusion == [[0, 10, 0], [10, 0, 0], [0, 0, 10]]


def test_dropped_class_is_seen() -> None:
    """Planted: a rare label is never answered. Accuracy hardly moves, macro F1 does."""
    expected = ["oil"] * 95 + ["tea"] * 5
    measures = measure_labels(expected, ["oil"] * 100, np.full(100, 0.95))
    assert measures.macro_f1.value == pytest.approx((190 / 195) / 2)
    assert measures.classes[1].answers == 0
    assert measures.calibration_error == pytest.approx(0.0, abs=1e-12)


def test_commonest_label() -> None:
    assert majority(["b", "a", "b", "a", "c"]) == "a"
