"""Ratios, table and plot of a measured run. ``python -m benchmarks.serving.report`` writes README's part again."""

from __future__ import annotations

import json
import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.plots import KIT_COLOUR, LIMIT_COLOUR, PEER_COLOUR
from benchmarks.plots import LINES as COLOURS
from benchmarks.serving.measure import USERS
from benchmarks.table import table

BEGIN, END = "<!-- measured: written by make bench-serving -->", "<!-- end of measured servers -->"
STORED = Path("benchmarks/results/serving.json")
PLOT = Path("benchmarks/results/serving.png")
# Precision: the kit's server, and the others in the order of ``PEERS``.
PANELS = {
    "float32": ("kit-fp32", "llama-f32-lora", "llama-f32", "genai-fp32"),
    "4 bit": ("kit-int4", "llama-q4_0-lora", "llama-q4_0", "genai-int4"),
}
PEERS = ("llama.cpp with LoRAs", "llama.cpp without", "onnxruntime-genai, a process a task")
LINES = (
    (KIT_COLOUR, "o", "AdaLink Kit, 16 tasks"),
    (LIMIT_COLOUR, "s", "llama.cpp, 16 LoRAs"),
    (PEER_COLOUR, "^", "llama.cpp, no adapter"),
    (COLOURS[1], "v", "onnxruntime-genai, 16 processes"),
)
Rounds = Mapping[str, Sequence[Mapping[str, Any]]]


def ratios(measured: Rounds, closed: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Medians of the rounds' own ratios, of what was measured."""

    def speeds(name: str, part: str) -> list[float]:
        return [figures[part]["tok_s"] for figures in measured.get(name, []) if part in figures]

    def values(name: str, part: str) -> list[Any]:
        return [figures[part] for figures in measured.get(name, []) if part in figures]

    result = {}
    for precision, (kit, *others) in PANELS.items():
        for users in (1, 16):
            for peer, other in zip(PEERS, others, strict=True):
                part = f"users-{users}"
                result[f"{precision}: {users} users over {peer}"] = _ratio(speeds(kit, part), speeds(other, part))
        result[f"{precision}: 16 tasks over one task"] = _median(values(kit, "sixteen-over-one"))
        result[f"{precision}: server over closed batch"] = _ratio(
            values(kit, "burst"), closed[kit.removeprefix("kit-")]
        )
        long = values(kit, "long-prompt")
        for base in ("during", "before"):
            result[f"{precision}: p99 between tokens while a long prompt joins over p50 {base}"] = _ratio(
                [figures["during_ms_p99"] for figures in long], [figures[f"{base}_ms_p50"] for figures in long]
            )
    return {name: value for name, value in result.items() if not math.isnan(value)}


def _ratio(above: Sequence[float], below: Sequence[float]) -> float:
    return _median([top / bottom for top, bottom in zip(above, below, strict=False) if bottom])


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else float("nan")


def rows(report: Mapping[str, Any]) -> list[list[str]]:
    """The table's rows: medians of the rounds of each server."""
    result = []
    for name, rounds in report["servers"].items():
        if not rounds:
            continue

        def middle(part: str, field: str, rounds: Sequence[Mapping[str, Any]] = rounds) -> str:
            known = [figures[part][field] for figures in rounds if part in figures]
            return f"{_median(known):.0f}" if known else "not measured"

        result.append(
            [
                report["labels"][name],
                *(middle(f"users-{users}", "tok_s") for users in USERS),
                *(f"{middle('users-16', f'first_ms_{p}')} ms" for p in ("p50", "p99")),
                *(f"{middle('users-16', f'between_ms_{p}')} ms" for p in ("p50", "p99")),
                f"{_median([figures['memory_mb'] for figures in rounds]):,.0f} MB",
            ]
        )
    return result


HEAD = ["", *(f"tokens/s, {users} user{'s' * (users > 1)}" for users in USERS), "first token, p50 of 16 users", "p99"]
HEAD += ["between tokens, p50", "p99", "memory"]


def show(report: Mapping[str, Any]) -> None:
    """Print the table and the ratios."""
    print("\n".join(["", *table(HEAD, rows(report)), ""]))
    for name, value in report["ratios"].items():
        print(f"{name:80} {value:6.2f}")


def section(report: Mapping[str, Any]) -> str:
    """README's part: how it was measured, the ratios, table and plot."""
    setting, found = report["setting"], report["ratios"]
    said = [
        f"{found[f'{precision}: 16 users over llama.cpp with LoRAs']:.1f} and "
        f"{found[f'{precision}: 16 users over llama.cpp without']:.1f} times in {precision}"
        for precision in PANELS
        if f"{precision}: 16 users over llama.cpp with LoRAs" in found
    ]
    prose = (
        f"Servers of SmolLM2-135M, {report['environment']['cpu']}, {setting['threads']} threads: each request has one "
        f"of {setting['tasks']} tasks, prompts have 14 to 450 tokens, answers {setting['new_tokens']}; medians of "
        f"{setting['rounds']} alternating rounds, {report['date']} ([method](benchmarks/README.md#servers)). "
    )
    if said:
        prose += (
            "With 16 users the kit's tokens/s are, over llama.cpp with LoRAs and over llama.cpp without any adapter, "
        )
        prose += f"{'; '.join(said)}."
    wrapped = textwrap.wrap(prose, 120, break_long_words=False, break_on_hyphens=False)
    plot = f"![Tokens per second against users]({PLOT.as_posix()})"
    return "\n".join([*wrapped, "", *table(HEAD, rows(report)), "", plot])


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Plot tokens/s against users, a panel a precision."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(8, 3.4), sharey=True, layout="constrained")
    for axes, (precision, names) in zip(panels, PANELS.items(), strict=True):
        for name, (colour, marker, label) in zip(names, LINES, strict=True):
            rounds = report["servers"].get(name)
            if rounds:
                speeds = [_median([figures[f"users-{users}"]["tok_s"] for figures in rounds]) for users in USERS]
                axes.plot(USERS, speeds, color=colour, marker=marker, label=label)
                axes.annotate(f"{speeds[-1]:.0f}", (USERS[-1], speeds[-1]), xytext=(0, 6), textcoords="offset points",
                              ha="center", fontsize=8)  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_xticks(USERS, [str(users) for users in USERS])
        axes.set_title(precision, loc="left", fontsize=10)
        axes.set_xlabel("users at once")
        axes.grid(alpha=0.3)
        axes.margins(x=0.1)
    panels[0].set_ylabel("tokens per second, all users")
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylim(top=panels[0].get_ylim()[1] * 1.08)
    lines = panels[0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle("Requests of 16 tasks, SmolLM2-135M, two threads (more is better)", fontsize=11)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def main() -> None:
    """Write README's part and the plot of the stored run again."""
    report = json.loads(STORED.read_text(encoding="utf-8"))
    readme = Path("README.md")
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    if not after:
        raise ValueError(f"{readme} has no marks {BEGIN} and {END}: put them where the measured part belongs")
    readme.write_text(f"{before}{BEGIN}\n{section(report)}\n{END}{after}", encoding="utf-8")
    draw(report, PLOT)


if __name__ == "__main__":
    main()
