"""The part of README that a measured run writes: python -m benchmarks.readme, between the two marks."""

from __future__ import annotations

import json
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
    "merged": "merged engine a task",
}
INT4 = {"kit-task": "kit-int4-task", "genai-lora": "genai-int4-lora"}


def section(report: Mapping[str, Any]) -> str:
    """Table and plots, without the marks."""
    cases, settings = report["peers"], report["settings"]
    rows: list[list[str]] = []

    def add(title: str, cell: Callable[[str], str | None]) -> None:
        rows.append([title, *((cell(name) or "not measured") for name in COLUMNS)])

    add("tokens/s, fp32, adapter active", lambda name: _figure(cases, name, "decode_tok_s", "{:.0f}"))
    add("tokens/s, 4 bit, adapter active", lambda name: _figure(cases, INT4.get(name), "decode_tok_s", "{:.0f}"))
    add("what the adapter costs of them, fp32", lambda name: _percent(adapter_cost(cases, name)))
    add("first token, 128-token prompt", lambda name: _figure(cases, name, "first_token_ms", "{:.0f} ms"))
    add("swap to a loaded adapter", lambda name: _figure(cases, name, "swap_us", "{:,.1f} µs"))
    add("load an adapter", lambda name: _figure(cases, name, "adapter_load_ms", "{:.1f} ms"))
    add("adapter on the disk", lambda name: _figure(cases, name, "adapter_disk_bytes", "{:,.2f} MB", 1e-6))
    add("memory a further adapter", lambda name: _figure(cases, name, "adapter_resident_bytes", "{:,.2f} MB", 1e-6))
    faster = []
    for title, kit, peers in (
        ("fp32", "kit-task", ("genai", "genai-lora")),
        ("4 bit", "kit-int4-task", ("genai-int4", "genai-int4-lora")),
    ):
        plain, adapted = (ratio(cases, kit, peer, "decode_tok_s") for peer in peers)
        if plain is not None and adapted is not None:
            faster.append(f"{plain:.2f} times without an adapter and {adapted:.2f} times with LoRA in {title}")
    how = (
        f"SmolLM2-135M, {report['environment']['cpu']}, {settings['threads']} threads, rank {settings['task_rank']}, "
        f"{settings['new_tokens']} new tokens, medians of {settings['rounds']} alternating rounds on {report['date']}. "
        "[How, all peers, and how cost grows](benchmarks/README.md), "
        "[all figures](benchmarks/results/cpu.md); `make bench` measures yours."
    )
    lines = [how, "", *table(["", *COLUMNS.values()], rows), ""]
    if faster:
        told = "; ".join(faster)
        lines += [f"Tokens/s of the kit with a task over onnxruntime-genai's, in the same rounds: {told}.", ""]
    if metrics := {metric["name"]: metric["value"] for metric in report["kit"].get("metrics", [])}:
        shown = {
            "prefill_ratio": "first token x {:.2f}",
            "decode_ratio": "decode step x {:.2f}",
            "mixed_batch_ratio": "a batch of many tasks x {:.2f} of one task",
        }
        told = ", ".join(form.format(metrics[name]) for name, form in shown.items() if name in metrics)
        lines += [f"In turns with the base model in one process ([how](docs/parity.md#benchmark)): {told}.", ""]
    plots = (("tokens-per-second.png", "Tokens a second of each engine"), ("memory.png", "Memory for many tasks"))
    lines += [f"![{title}](benchmarks/results/{file})" for file, title in plots]
    return "\n".join(lines)


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


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.0f} %"


def main() -> None:
    """Write the stored run's section again."""
    update(Path("README.md"), json.loads(Path("benchmarks/results/cpu.json").read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
