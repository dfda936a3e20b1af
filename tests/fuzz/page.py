"""The figures of docs/project/reliability.md: kept as JSON, written as tables."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from fuzz.outcomes import BAD, GOOD
from helpers.paths import REPOSITORY

FIGURES = REPOSITORY / "docs" / "project" / "reliability.json"
PAGE = REPOSITORY / "docs" / "project" / "reliability.md"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
# A report says by these fields what it is of.
_MARKS = {"inputs": "classes", "kills": "changes", "threads": "differing", "mutants": "by_name"}


def read_figures() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.exists() else {}
    return found


def take(report: dict[str, Any]) -> None:
    """Put one report in place of the last of its kind; of failures only their number is kept."""
    (part,) = (name for name, mark in _MARKS.items() if mark in report)
    if "failures" in report:
        report = report | {"failures": len(report["failures"])}
    FIGURES.write_text(json.dumps(read_figures() | {part: report}, indent=2) + "\n", encoding="utf-8")


def add(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One report of inputs out of several: a run that was stopped, and those that went on with the next seeds."""
    names = sorted({name for report in reports for name in report["kinds"]})
    kinds: dict[str, Counter[str]] = {name: Counter() for name in names}
    for report in reports:
        for name, kind in report["kinds"].items():
            slowest = max(kinds[name]["slowest_ms"], kind["slowest_ms"])
            kinds[name].update(kind)
            kinds[name]["slowest_ms"] = slowest
    return {
        "seed": min(report["seed"] for report in reports),
        "inputs": sum(report["inputs"] for report in reports),
        "seconds": sum(report["seconds"] for report in reports),
        "classes": {name: sum(report["classes"][name] for report in reports) for name in reports[0]["classes"]},
        "kinds": {name: dict(kinds[name]) for name in names},
        "failures": [failure for report in reports for failure in report["failures"]],
    }


def add_kills(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One report of kills out of several."""
    changes: dict[str, Counter[str]] = {}
    for report in reports:
        for name, counts in report["changes"].items():
            changes.setdefault(name, Counter()).update(counts)
    return {
        "kills": sum(report["kills"] for report in reports),
        "seconds": sum(report["seconds"] for report in reports),
        "changes": {name: dict(counts) for name, counts in changes.items()},
        "faults": [fault for report in reports for fault in report["faults"]],
    }


def tables(figures: dict[str, Any]) -> str:
    """The page's measured part."""
    parts = []
    if inputs := figures.get("inputs"):
        rows = [_row(name, kind, str(kind["slowest_ms"])) for name, kind in inputs["kinds"].items()]
        classes = inputs["classes"]
        heads = ["kind", "inputs", "typed error", "same result", "accepted", "anything else", "slowest, ms"]
        parts += [_table(heads, [*rows, _row("all", classes | {"inputs": inputs["inputs"]}, "")])]
        named = ", ".join(f"{_count(classes[name])} {name}" for name in BAD)
        parts += [f"Of anything else: {named}. First seed {inputs['seed']}, {inputs['seconds']:.0f} seconds."]
    if kills := figures.get("kills"):
        rows = [[name, *map(_count, (each["before"], each["after"]))] for name, each in kills["changes"].items()]
        parts += [_table(["killed change", "kills before the commit", "kills after it"], rows)]
        parts += [f"{_count(kills['kills'])} kills, {len(kills['faults'])} faults."]
    if threads := figures.get("threads"):
        differing = len(threads["differing"])
        made = f"{threads['threads']} threads made {_count(threads['requests'])} requests"
        parts += [f"{made}; {differing} results differed from those of one thread."]
    if mutants := figures.get("mutants"):
        parts += [f"{mutants['caught']} of {mutants['mutants']} faults in the source were caught by their tests."]
    return "\n\n".join(parts)


def write_page() -> None:
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n\n{tables(read_figures())}\n\n{END}{after}", encoding="utf-8")


def _row(name: str, counts: dict[str, Any], slowest: str) -> list[str]:
    good = (_count(counts.get(each, 0)) for each in GOOD)
    return [name, _count(counts["inputs"]), *good, _bad(counts), slowest]


def _bad(counts: dict[str, Any]) -> str:
    return _count(sum(counts.get(name, 0) for name in BAD))


def _count(number: int) -> str:
    return f"{number:,}".replace(",", " ")


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
