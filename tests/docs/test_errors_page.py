"""The page of errors has each error of the kit once, and draws the tree that the classes are."""

from __future__ import annotations

import re

from helpers.paths import REPOSITORY

from adalink.runtime import errors
from adalink.tools.command_line.error_boundary import UserError

PAGE = (REPOSITORY / "docs/reference/errors.md").read_text(encoding="utf-8")


def tree(error, lead="", branch=""):
    """The classes below an error as lines, in the order of the module."""
    below = [getattr(errors, name) for name in order() if getattr(errors, name).__bases__[0] is error]
    lines = [f"{branch}{error.__name__}"]
    for kind in below:
        is_last = kind is below[-1]
        lines += tree(kind, lead + ("    " if is_last else "│   "), lead + ("└── " if is_last else "├── "))
    return lines


def order():
    return [name for name, kind in vars(errors).items() if isinstance(kind, type) and name in errors.__all__]


def test_errors_page_has_a_row_for_every_error():
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| ([^|]+) \|$", PAGE, re.MULTILINE)
    assert [name for name, *_ in rows] == order()
    assert set(order()) == set(errors.__all__)


def test_errors_page_draws_the_tree():
    assert "\n".join(tree(errors.AdaLinkError)) in PAGE


def test_errors_page_says_the_exit_code():
    assert f"Every error below ends a command with code {UserError.exit_code}." in PAGE
