"""Ratios between cases: of figures of the same round, so that a drift of the machine meets both sides; their median."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

Cases = Mapping[str, Mapping[str, Any]]


def ratio(cases: Cases, above: str, below: str, field: str) -> float | None:
    """Median over the rounds of one case's figure over another's; ``None`` if one was not measured."""
    sides = [cases.get(name, {}).get("rounds", {}).get(field, []) for name in (above, below)]
    pairs = list(zip(*sides, strict=False))
    return statistics.median(top / bottom for top, bottom in pairs) if pairs else None


def adapter_cost(cases: Cases, name: str) -> float | None:
    """Share of the tokens/s that an active adapter takes: 0.1 is ten percent slower than without."""
    without = cases[name].get("without")
    kept = None if without is None else ratio(cases, name, without, "decode_tok_s")
    return None if kept is None else 1 - kept


GROUPS = {
    "fp32, no adapter": ("kit", "genai", "ort", "torch"),
    "fp32, the same AdaLink adapter": ("kit-task", "torch-adalink"),
    "fp32, the same LoRA adapter": ("genai-lora", "ort-lora", "merged", "peft"),
}


def agreement(cases: Cases) -> list[list[str]]:
    """For each group of cases that compute the same: its cases, and how many of their first tokens are the same."""
    rows = []
    for title, names in GROUPS.items():
        first_tokens = {name: cases[name]["first_tokens"] for name in names if cases.get(name, {}).get("first_tokens")}
        columns = [len(set(column)) == 1 for column in zip(*first_tokens.values(), strict=True)]
        common = columns.index(False) if False in columns else len(columns)
        rows.append([title, ", ".join(first_tokens), f"{common} of {len(columns)}"])
    return rows


def share_of_limit(case: Mapping[str, Any]) -> float | None:
    """Tokens/s over those that reading every weight once a token allows, at the bandwidth measured around the case."""
    rounds = case.get("rounds", {})
    pairs = list(zip(rounds.get("decode_tok_s", []), rounds.get("memory_gb_s", []), strict=True))
    shares = [speed * case["weight_bytes"] / (gb_s * 1e9) for speed, gb_s in pairs]
    return statistics.median(shares) if shares else None
