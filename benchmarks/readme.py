"""The part of README that a measured run writes: python -m benchmarks.readme, between the two marks."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.ratios import adapter_cost, ratio
from benchmarks.table import table

BEGIN, END = "<!-- measured: written by make bench -->", "<!-- end of measured -->"
COLUMNS = {
    "kit-task": "AdaLink Kit",
    "genai-lora": "onnxruntime-genai, LoRA",
    "ort-lora": "ONNX Runtime, LoraAdapter",
    "peft": "PEFT LoRA",
    "merged": "one merged engine per task",
}
_WIDTH = 120
INT4 = {"kit-task": "kit-int4-task", "genai-lora": "genai-int4-lora"}


def section(report: Mapping[str, Any]) -> str:
    """Table and plot, without the marks; lines of prose have at most ``_WIDTH`` characters."""
    cases, settings = report["peers"], report["settings"]
    rows: list[list[str]] = []

    def add(title: str, cell: Callable[[str], str | None]) -> None:
        rows.append([title, *((cell(name) or "not measured") for name in COLUMNS)])

    add("tokens/s, fp32, adapter active", lambda name: _figure(cases, name, "decode_tok_s", "{:.0f}"))
    add("tokens/s, 4 bit, adapter active", lambda name: _figure(cases, INT4.get(name), "decode_tok_s", "{:.0f}"))
    add("speed lost to the adapter, fp32", lambda name: _percent(adapter_cost(cases, name)))
    add("first token, 128-token prompt", lambda name: _time(cases, name, "first_token_ms", 1e-3))
    add("switch to a loaded adapter", lambda name: _time(cases, name, "swap_us", 1e-6))
    add("load an adapter", lambda name: _time(cases, name, "adapter_load_ms", 1e-3))
    add("adapter on disk", lambda name: _figure(cases, name, "adapter_disk_bytes", "{:,.2f} MB", 1e-6))
    add("memory of a further adapter", lambda name: _figure(cases, name, "adapter_resident_bytes", "{:,.2f} MB", 1e-6))
    how = (
        f"SmolLM2-135M, {report['environment']['cpu']}, {settings['threads']} threads, rank {settings['task_rank']}, "
        f"{settings['new_tokens']} new tokens; medians of {settings['rounds']} alternating rounds, {report['date']}. "
        "[Method and all peers](benchmarks/README.md), [all figures](benchmarks/results/cpu.md). "
        "`make bench` measures your machine."
    )
    prose = _wrapped(" ".join([how, *_ratios(report)]))
    plot = "![Memory for many tasks](benchmarks/results/memory.png)"
    return "\n".join([*prose, "", *table(["", *COLUMNS.values()], rows), "", plot])


def _ratios(report: Mapping[str, Any]) -> list[str]:
    """Sentences: the kit over onnxruntime-genai, and a task over the base model."""
    cases, speeds = report["peers"], []
    for title, kit, peers in (
        ("fp32", "kit-task", ("genai", "genai-lora")),
        ("4 bit", "kit-int4-task", ("genai-int4", "genai-int4-lora")),
    ):
        without, adapted = (ratio(cases, kit, peer, "decode_tok_s") for peer in peers)
        if without is not None and adapted is not None:
            speeds.append(f"{without:.2f}x without an adapter and {adapted:.2f}x with LoRA in {title}")
    sentences = [f"Tokens/s of the kit with a task over onnxruntime-genai's: {'; '.join(speeds)}."] if speeds else []
    metrics = {metric["name"]: metric["value"] for metric in report["kit"].get("metrics", [])}
    shown = {
        "prefill_ratio": "first token {:.2f}x",
        "decode_ratio": "decode step {:.2f}x",
        "mixed_batch_ratio": "a batch of 32 tasks {:.2f}x of one task",
    }
    if ratios := [form.format(metrics[name]) for name, form in shown.items() if name in metrics]:
        sentences.append(f"Time with a task over the base model's: {', '.join(ratios)}.")
    return sentences


def update(readme: Path, report: Mapping[str, Any]) -> None:
    """Write the section into README.

    Raises:
        ValueError: the marks are not there.
    """
    text = readme.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    if not rest or not after:
        raise ValueError(f"{readme} has no marks {BEGIN} and {END}: put them where the measured part belongs")
    readme.write_text(f"{before}{BEGIN}\n{section(report)}\n{END}{after}", encoding="utf-8")


def _figure(cases: Mapping[str, Any], name: str | None, field: str, form: str, scale: float = 1) -> str | None:
    value = None if name is None else cases.get(name, {}).get(field)
    return None if value is None else form.format(value * scale)


def _time(cases: Mapping[str, Any], name: str, field: str, unit_s: float) -> str | None:
    """A duration in the unit that people read it in."""
    value = cases.get(name, {}).get(field)
    if value is None:
        return None
    seconds = value * unit_s
    if seconds >= 1:
        return f"{seconds:.1f} s"
    if seconds >= 5e-4:
        return f"{seconds * 1e3:.{0 if seconds >= 0.03 else 1}f} ms"
    return f"{seconds * 1e6:.1f} µs"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, break_long_words=False, break_on_hyphens=False)


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.0f} %"


def main() -> None:
    """Write the stored run's section again."""
    update(Path("README.md"), json.loads(Path("benchmarks/results/cpu.json").read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
