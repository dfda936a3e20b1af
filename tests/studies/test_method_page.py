"""The tables of docs/concepts/when-it-is-enough.md say what the committed studies found."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import pytest
from helpers.paths import REPOSITORY

ROOT = REPOSITORY
PAGE = (ROOT / "docs" / "concepts" / "when-it-is-enough.md").read_text()
TABLES = {
    "### The decoder, 200 steps": "decoder",
    "### The decoder, 80 steps": "reduced",
    "### The encoder": "encoder",
    "**Few training rows,**": "few-rows",
    "**One for all.**": "encoder",
}
METHODS = {
    "zero-shot": "zero-shot",
    "prompt tuning, 10 tokens": "Prompt 10",
    "P-tuning, 10 tokens": "P-tuning 10",
    "AdaLink 4": "AdaLink 4",
    "AdaLink 4, gelu": "AdaLink 4 gelu",
    "AdaLink 4, along the gradient": "AdaLink 4 gradient",
    "AdaLink 16": "AdaLink 16",
    "AdaLink 16, gelu": "AdaLink 16 gelu",
    "AdaLink 16, centered start": "AdaLink 16 centered",
    "AdaLink 16, along the gradient": "AdaLink 16 gradient",
    "the same and 8 soft tokens": "AdaLink 16 gradient + 8 tokens",
    "AdaLink 64": "AdaLink 64",
    "AdaLink 64, gelu": "AdaLink 64 gelu",
    "AdaLink 64 and 10 soft tokens": "AdaLink 64 + 10 tokens",
    "AdaLink 64, centered start": "AdaLink 64 centered",
    "AdaLink 64, along the gradient": "AdaLink 64 gradient",
    "the same, `down` at a tenth of the rate": "AdaLink 64 gradient ratio 10",
    "AdaLink 256": "AdaLink 256",
    "AdaLink 256, gelu": "AdaLink 256 gelu",
    "LoRA 16 on the embeddings alone": "LoRA 16 embeddings",
    "LoRA 8": "LoRA 8 attention",
    "LoRA 16": "LoRA 16 attention",
    "LoRA 8 on all linear layers": "LoRA 8 all-linear",
    "full fine-tuning": "full fine-tuning",
}
REDUCED = {**METHODS, "AdaLink 16, gelu": "AdaLink 16", "LoRA 8": "LoRA 8"}
SIZES = {"32 rows": 32, "128": 128, "512": 512, "all 3,672": "all"}
GRADIENT = "AdaLink 64, along the gradient"


class Findings:
    """What a table of the page has to say of a committed study."""

    def __init__(self, study: str) -> None:
        self.summary: dict[str, Any] = json.loads((ROOT / "studies/results" / study / "summary.json").read_text())
        self.lora = self.summary["study"]["compare_to"]
        self.methods = REDUCED if study == "reduced" else METHODS

    def right(self, label: str, column: str) -> set[str]:
        """The texts that the cell of this row and column may hold."""
        if label.startswith("one "):
            return self._shared(label, column)
        method = self.methods[label]
        if column.startswith("parameters"):
            return self._parameters(method)
        if column == "minus LoRA":
            return self._overall(method)
        where = {"method": method, "size": SIZES.get(column, "all")}
        if column not in SIZES:
            where["data"] = column.partition(" (")[0]
        accuracy = _find(self.summary["cells"], **where)["accuracy"]
        text = f"{100 * accuracy['mean']:.1f}"
        if accuracy["deviation"] is not None:
            text += f" ± {100 * accuracy['deviation']:.1f}"
            if method != self.lora and column not in SIZES:
                text += f" ({_find(self.summary['comparisons'], **where, against=self.lora)['ratio']:.3f})"
        return {text}

    def _parameters(self, method: str) -> set[str]:
        counts = {cell["method"]: cell["trained_parameters"] for cell in self.summary["cells"]}
        count, percent = counts[method], 100 * counts[method] / counts[self.lora] + 1e-9  # a half is rounded up
        if method in (self.lora, "zero-shot", "full fine-tuning"):
            return {"0" if not count else f"{count / 1e6:.1f} million" if count > 1e6 else f"{count:,} parameters"}
        if method.startswith("P-tuning"):  # its network gives the prompt that is deployed
            deployed = f"{100 * counts['Prompt 10'] / counts[self.lora]:#.2g} %"
            return {f"{deployed} deployed, {float(f'{percent:.2g}'):g} % trained"}
        return {f"{float(f'{percent:.2g}'):g} %", f"{percent:.1f} %"}

    def _shared(self, label: str, column: str) -> set[str]:
        method, where = label.removeprefix("one ").split(" for ")
        which = {"each": "alone", "all": "together"}[where]
        pairs = [pair for pair in self.summary["shared"] if pair["method"] == self.methods[method]]
        if column == "parameters":
            return {f"{pair[f'parameters_{which}']:,}" for pair in pairs}
        return {f"{100 * _find(pairs, data=column)[which]['mean']:.1f}"}

    def _overall(self, method: str) -> set[str]:
        if method in (self.lora, "zero-shot"):
            return {""}
        pair = _find(self.summary["overall"], method=method, against=self.lora)
        mean, p_value = f"{100 * pair['mean']:+.1f}", pair["p_value"]
        value = f"{p_value:.2f}" if p_value >= 0.01 else f"{p_value:.1g}"
        return {f"{mean} ({value})", f"{mean} (p = {value})"}


def _find(entries: list[dict[str, Any]], **wanted: object) -> dict[str, Any]:
    """The one entry with these values."""
    (entry,) = [entry for entry in entries if all(entry[name] == value for name, value in wanted.items())]
    return entry


def wrong_cells(page: str, heading: str) -> list[tuple[str, str, str]]:
    """Row, column and text of the cells below a heading of the page that say something else than the study."""
    findings = Findings(TABLES[heading])
    lines = itertools.dropwhile(lambda line: not line.startswith("|"), page.partition(heading)[2].splitlines())
    table = [re.split(r" *\| *", line.strip("| ")) for line in itertools.takewhile(lambda line: line, lines)]
    wrong = []
    for label, *cells in table[2:]:
        cells += [""] * (len(table[0]) - 1 - len(cells))  # where the last is empty
        wrong += [
            (label, column, cell)
            for column, cell in zip(table[0][1:], cells, strict=True)
            if cell not in findings.right(label, column)
        ]
    assert len(table) > 5  # with two lines of headings
    return wrong


@pytest.mark.parametrize("heading", TABLES)
def test_the_tables_say_what_was_found(heading: str) -> None:
    assert wrong_cells(PAGE, heading) == []


@pytest.mark.parametrize(
    ("heading", "true", "false", "cell"),
    [
        ("### The decoder, 200 steps", "91.3 ± 0.9", "91.4 ± 0.9", (GRADIENT, "election-tweets (author)")),
        ("### The decoder, 200 steps", "0.7 (1.005)", "0.7 (1.006)", (GRADIENT, "reuters-r8 (topic)")),
        ("### The decoder, 200 steps", "-0.6 (0.14)", "-0.6 (0.13)", (GRADIENT, "minus LoRA")),
        ("### The decoder, 80 steps", "-3.9 (p", "3.9 (p", ("prompt tuning, 10 tokens", "minus LoRA")),
        ("### The encoder", "| 4.2 % |", "| 4.1 % |", ("AdaLink 4", "parameters, of LoRA's")),
        ("**One for all.**", "| 72.5 |", "| 76.1 |", ("one AdaLink 64 for all", "film-reviews")),
        ("**One for all.**", "| 49,152 |", "| 196,608 |", ("one AdaLink 64 for all", "parameters")),
        ("**Few training rows,**", "73.9 ± 10.1", "73.9 ± 1.1", ("prompt tuning, 10 tokens", "32 rows")),
    ],
)
def test_a_wrong_cell_is_found(heading: str, true: str, false: str, cell: tuple[str, str]) -> None:
    assert true in PAGE
    page = PAGE.partition(heading)
    changed = page[0] + page[1] + page[2].replace(true, false, 1)
    assert [wrong[:2] for wrong in wrong_cells(changed, heading)] == [cell]
