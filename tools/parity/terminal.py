"""A parity run on a terminal: the verdict, a line for each check, and the verdict again."""

from __future__ import annotations

import math

from adalink.tools.parity.report import Check, Report
from adalink.tools.terminal.console import line_width, print_fields, print_marked, print_table, print_wrapped
from adalink.tools.terminal.terminal_text import echo
from adalink.tools.terminal.verbose import is_quiet, is_verbose

# Columns of a line beside the check's name.
_VERDICT, _FIGURES = 6, 22


def print_report(report: Report) -> None:
    """Print a report for people on stdout; details of failed checks, and with ``-v`` of all, and the receipt.

    With ``-q`` the failed checks and one verdict.
    """
    if not is_quiet():
        print_wrapped(_verdict(report))
    for check in report.checks:
        if not (is_quiet() and check.passed):
            _print_check(check)
    if report.cost:
        sides = ("float32", "weights", "deployed")
        lines = [(name, *map(_figure, (row[side] for side in sides))) for name, row in report.cost.items()]
        print_table("Cost of quantising", ("", "float32", "quantised", "deployed"), lines)
    for line in report.skipped:
        print_wrapped(f"not checked: {line}")
    if is_verbose():
        echo("receipt")
        print_fields(report.receipt, indent=2)
    print_wrapped(_verdict(report))


def _verdict(report: Report) -> str:
    failed = [check.name for check in report.checks if not check.passed]
    if failed:
        return f"{len(failed)} of {len(report.checks)} checks failed: {', '.join(failed)}"
    return f"All {len(report.checks)} checks passed."


def _print_check(check: Check) -> None:
    sign = ">" if check.name.startswith("control/") else "≤"
    width = line_width() - _VERDICT - _FIGURES
    figures = f"{check.measured:.3g}".rjust(9) + f" {sign} {check.limit:.3g}"
    print_marked("pass" if check.passed else "FAIL", f"  {_fit(check.name, width):<{width}}{figures}")
    if check.detail and (is_verbose() or not check.passed):
        print_wrapped(check.detail, indent=_VERDICT)


def _fit(name: str, width: int) -> str:
    """A name with its middle left out, if it is longer than ``width``."""
    if len(name) <= width:
        return name
    start = (width - 1) // 2
    return f"{name[:start]}…{name[start + 1 - width :]}"


def _figure(value: float) -> str:
    """A figure of the cost; nothing where there is none."""
    return "" if math.isnan(value) else f"{value:.5g}"
