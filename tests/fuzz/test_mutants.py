"""Each fault of the list is one that its test catches."""

from __future__ import annotations

import pytest
from fuzz.mutant import Mutant, is_caught
from fuzz.mutants import MUTANTS
from helpers.paths import REPOSITORY


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_the_text_to_change_stands_in_its_file_once(mutant: Mutant) -> None:
    """Then the fault is still one; and its test is still there."""
    assert (REPOSITORY / mutant.path).read_text(encoding="utf-8").count(mutant.old) == 1
    path, _, name = mutant.test.partition("::")
    assert f"def {name}(" in (REPOSITORY / path).read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_a_fault_is_caught_by_its_test(mutant: Mutant) -> None:
    caught, said = is_caught(mutant)
    assert caught, said
