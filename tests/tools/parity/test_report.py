"""Checks and reports of parity: limits are reached exactly, and what is no number never passes."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from adalink.tools.parity.checks.outputs import check_change, log_softmax, worst_of
from adalink.tools.parity.report import Report, at_most, more_than


@pytest.mark.parametrize(
    ("measured", "is_at_most", "is_more"),
    [(0.5, True, False), (1.0, True, False), (np.nextafter(1, 2), False, True), (math.inf, False, True),
     (math.nan, False, False), (-math.inf, True, False)],
)  # fmt: skip
def test_limits(measured, is_at_most, is_more):
    assert at_most("a", measured, 1.0, "").passed is is_at_most
    assert more_than("a", measured, 1.0, "").passed is is_more
    assert not at_most("a", measured, math.nan, "").passed
    assert not more_than("a", measured, math.nan, "").passed


def test_a_report_passes_with_all_its_checks_and_not_without_any():
    good, bad = at_most("a", 0, 1, ""), at_most("b", math.inf, 1, "")
    assert [Report(checks).passed for checks in ([], [good], [bad], [good, bad])] == [False, True, False, False]
    found = json.loads(json.dumps(Report([good, bad], cost={"c": {"d": math.nan}}).as_json({}), allow_nan=False))
    assert [check["measured"] for check in found["checks"]] == [0, None]
    assert found["cost"] == {"c": {"d": None}}


def test_the_worst_is_the_nearest_to_its_limit():
    limits = [np.array([1.0, 10.0]), np.array([4.0, 100.0, 1.0])]
    assert worst_of([np.array([0.5, 6.0]), np.array([1.0, 50.0, 0.1])], limits) == (6.0, 10.0, 0, 1)
    assert worst_of([np.array([0.5, 0.0]), np.array([3.0, 50.0, 0.1])], limits) == (3.0, 4.0, 1, 0)
    deviation, limit, row, position = worst_of([np.array([0.5, 9e9]), np.array([3.0, np.nan, 0.1])], limits)
    assert math.isnan(deviation)
    assert (limit, row, position) == (100.0, 1, 1)


def test_a_control_must_exceed_the_largest_limit_of_its_row():
    limits = [np.array([9.0, 9.0]), np.array([0.1, 0.5])]
    for change, passed in ((0.0, False), (0.3, False), (0.5, False), (0.6, True), (np.nan, False)):
        check = check_change("control/topics/logits", [0.0, change], limits)
        assert check.passed is passed, change
        assert check.limit == (0.5 if change else 9.0)


def test_log_probabilities_of_large_logits():
    logits = np.array([[1000.0, 1000.0, -1000.0], [0.0, math.log(3), -math.inf]])
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(np.exp(log_softmax(logits)), [[0.5, 0.5, 0], [0.25, 0.75, 0]], atol=1e-15)
