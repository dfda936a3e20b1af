"""The measured run as a page of Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.ratios import adapter_cost, agreement, ratio, share_of_limit

KIT, PEER, INT4_KIT, INT4_PEER = "kit-task", "genai-lora", "kit-int4-task", "genai-int4-lora"


def render(report: Mapping[str, Any]) -> str:
    """The page."""
    environment, settings, cases = report["environment"], report["settings"], report["peers"]
    how = (
        f"`{report['command']}` on {report['date']}: {settings['model']}, {environment['cpu']}, {settings['threads']} "
        f"threads, {settings['prompt_tokens']} prompt tokens, {settings['new_tokens']} new tokens, medians of "
        f"{settings['rounds']} alternating rounds. Memory was read at {report['memory_gb_s']:.1f} GB/s. "
        "[What each figure means](../README.md)."
    )
    lines = [
        "# Measured on the CPU",
        "",
        how,
        "",
        "## Speed",
        "",
        *table(
            [
                "",
                "precision",
                "prompt, ms",
                "first token, ms",
                "tokens/s",
                "of the memory limit",
                "an adapter costs",
                "resident, MB",
            ],
            [_speed(case, cases, name) for name, case in cases.items()],
        ),
        "",
        "## Adapters",
        "",
        *table(
            ["", "task switch, µs", "load, ms", "on disk, kB", "resident, kB", "engine opens in, s"],
            [_adapter(case) for case in cases.values() if case.get("adapter_disk_bytes") or "error" in case],
        ),
        "",
        "## The kit beside onnxruntime-genai",
        "",
        *table(["ratio of the same round, median", ""], _comparisons(cases)),
    ]
    lines += [
        "",
        "## Did all run the same model?",
        "",
        *table(["group", "cases", "first tokens in common"], agreement(cases)),
    ]
    if failed := [f"- {case['label']}: {case['error']}" for case in cases.values() if "error" in case]:
        lines += ["", "## Not measured", "", *failed]
    if "metrics" in report["kit"]:
        rows = [
            [f"`{metric['name']}`", f"{metric['value']:.4g}", metric["unit"]] for metric in report["kit"]["metrics"]
        ]
        lines += ["", "## adalink bench", "", *table(["metric", "value", "unit"], rows)]
    elif "error" in report["kit"]:
        lines += ["", "## adalink bench", "", f"Not measured: {report['kit']['error']}"]
    if report.get("growth"):
        lines += ["", "## How cost grows", "", "Slopes on log-log axes: 0 does not grow, 1 grows in proportion.", ""]
        lines += table(["with", "figure", "fitted", "expected", "from", "because"], _slopes(report["growth"]))
    return "\n".join(lines) + "\n"


def _speed(case: Mapping[str, Any], cases: Mapping[str, Any], name: str) -> list[str]:
    if "decode_tok_s" not in case:
        return [case["label"], case["precision"], "not measured", "", "", "", "", ""]
    return [
        case["label"],
        case["precision"],
        f"{case['prefill_ms']:.0f}",
        f"{case['first_token_ms']:.0f}",
        f"{case['decode_tok_s']:.1f}",
        _percent(share_of_limit(case)),
        _percent(adapter_cost(cases, name)),
        f"{case['resident_mb']:.0f}",
    ]


def _adapter(case: Mapping[str, Any]) -> list[str]:
    if "swap_us" not in case:
        return [case["label"], "not measured", "", "", "", ""]
    return [
        case["label"],
        f"{case['swap_us']:.1f}",
        f"{case['adapter_load_ms']:.2f}",
        f"{case['adapter_disk_bytes'] / 1e3:,.0f}",
        f"{case['adapter_resident_bytes'] / 1e3:,.0f}",
        f"{case['engine_load_s']:.2f}",
    ]


def _comparisons(cases: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for precision, kit, peers in (
        ("fp32", KIT, ("genai", PEER)),
        ("int4", INT4_KIT, ("genai-int4", INT4_PEER)),
    ):
        for peer in peers:
            for field, title in (("decode_tok_s", "tokens/s"), ("first_token_ms", "time to the first token")):
                median = ratio(cases, kit, peer, field)
                value = "not measured" if median is None else f"{median:.2f}"
                rows.append(
                    [f"{precision}, {title}: kit with a task / {cases.get(peer, {}).get('label', peer)}", value]
                )
    return rows


def _slopes(growth: Mapping[str, Any]) -> list[list[str]]:
    return [
        [series, f"`{name}`", _slope(fit["fitted"]), _slope(fit["expected"]), f"{fit['from']:g}", fit["because"]]
        for series, curves in growth.items()
        for name, fit in curves["fits"].items()
    ]


def _slope(value: float | None) -> str:
    return "too few points" if value is None else f"{value:.2f}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows)]
