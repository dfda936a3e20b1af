"""Logits that wait in a file are those that were written, whatever was written around them."""

import numpy as np
import pytest

from adalink.tools.parity.checks.step_logits import LogitsFile, StepLogits


@pytest.mark.parametrize(
    ("base", "stored"), [("float32", np.float32), ("float16", np.float16), ("bfloat16", np.uint16)]
)
def test_steps_of_two_rows_in_turn(base, stored):
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((2, 5, 7)).astype(np.float32)
    written = (rows.view(np.uint32) >> 16).astype(np.uint16) if base == "bfloat16" else rows.astype(base)
    file = LogitsFile(base)
    places = [[], []]
    for step in range(5):
        for row in range(2):
            places[row].append(file.add(written[row, step]))
    expected = (written.astype(np.uint32) << 16).view(np.float32) if base == "bfloat16" else written
    del places[1][3:]  # draft tokens that were rolled back
    for row in range(2):
        steps = StepLogits(file, places[row])
        assert len(steps) == len(places[row])
        np.testing.assert_array_equal(steps[:], expected[row, : len(steps)])
        np.testing.assert_array_equal(steps[1:3], expected[row, 1:3])
        np.testing.assert_array_equal(steps.first(2)[:], expected[row, :2])
