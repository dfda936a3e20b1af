"""The part of the guide on GPUs that a run writes: what ran, on what, with which figures, and what never did.

``python -m benchmarks.gpu_proof.page`` writes it anew from the latest ``benchmarks/results/gpu-*.json``.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu_proof.record import CRASHED, FAILED, MISSING, NO_DEVICE, PASSED, SKIPPED, TIMED_OUT, read_json
from benchmarks.gpu_proof.schedule import STEPS
from benchmarks.table import table

BEGIN, END = "<!-- proof: written by python -m benchmarks.gpu_proof.page -->", "<!-- end of proof -->"
_REPOSITORY = Path(__file__).parents[2]
PAGE = _REPOSITORY / "docs" / "guides" / "nvidia.md"
RESULTS = _REPOSITORY / "benchmarks" / "results"
_WIDTH = 120
# Whose versions are named.
_VERSIONS = {
    *("onnxruntime-gpu", "onnxruntime-ep-nv-tensorrt-rtx-cu13"),
    *("tensorrt", "tensorrt-rtx-cu13-bindings", "torch"),
}
_SAID = {
    PASSED: "ran",
    FAILED: "failed",
    CRASHED: "crashed",
    TIMED_OUT: "took too long",
    NO_DEVICE: "never ran: no GPU",
    MISSING: "never ran: not installed",
    SKIPPED: "never ran: no time left",
}
# Figure of a step -> how it is shown. A path goes through the parts of a step, of which any may have it.
_SHOWN = (
    ("copy_gigabytes_per_second", "memory {:.0f} GB/s"),
    ("bfloat16_teraflops", "bfloat16 products {:.0f} TFLOP/s"),
    ("checks", "{} checks of verify"),
    ("swap_host.us_p50", "swap {:.1f} µs of host time"),
    ("swap_requests.recorded", "{} steps recorded anew"),
    ("decode_1.base_ms", "a step {:.2f} ms"),
    ("decode_1.task_ratio", "with a task {:.3f} times"),
    ("decode_32.task_ratio", "32 rows with a task {:.3f} times"),
    ("decode_32.mixed_ratio", "32 rows of 32 tasks {:.3f} times"),
    ("decode_32.tokens_per_second_with_task", "{:.0f} tokens/s in 32 rows"),
    ("build_seconds", "built in {:.0f} s"),
    ("steps_per_second", "{:.1f} steps/s"),
    ("peak_gigabytes", "{:.1f} GB at the peak"),
    ("gain", "{:.1f} times the steps of one by one"),
)


def latest(folder: Path = RESULTS) -> tuple[str, dict[str, Any]] | None:
    """Name and content of the newest committed run; ``None`` without one."""
    runs = [(path.name, read_json(path)) for path in sorted(folder.glob("gpu-*.json"))]
    read = [(name, content) for name, content in runs if content is not None and "steps" in content]
    return max(read, key=lambda run: (str(run[1].get("date", "")), run[0]), default=None)


def section(run: tuple[str, Mapping[str, Any]] | None) -> str:
    """The part between the marks."""
    if run is None:
        return "\n".join(_nothing())
    name, report = run
    steps = report["steps"]
    columns = ["step", "what it tries", "how it went", "figures"]
    lines = [*_wrapped(_where(name, report)), "", *table(columns, _rows(steps))]
    if rows := [_target(step, target) for step, result in steps.items() for target in result.get("targets", [])]:
        lines += ["", *table(["step", "target", "measured", "at most", "met"], rows)]
    faults = [(step, result) for step, result in steps.items() if result["status"] in (FAILED, CRASHED, TIMED_OUT)]
    if faults:
        lines += ["", "What went wrong, in its own words:", ""]
        lines += [line for step, result in faults for line in _item(f"`{step}`: `{_code(result['reason'])}`")]
    return "\n".join(lines)


def update(page: Path = PAGE, run: tuple[str, Mapping[str, Any]] | None = None) -> None:
    """Write the part into the page.

    Raises:
        ValueError: the marks are not there.
    """
    page.write_text(replaced(page.read_text(encoding="utf-8"), section(run)), encoding="utf-8")


def written(page: Path = PAGE) -> str:
    """The part as it is in the page; raises ``ValueError`` without marks."""
    text = page.read_text(encoding="utf-8")
    _, _, rest = text.partition(f"{BEGIN}\n")
    part, mark, _ = rest.partition(f"\n{END}")
    if not mark:
        raise ValueError(f"{page} has no marks {BEGIN} and {END}: put them where the part belongs")
    return part


def replaced(text: str, part: str) -> str:
    """A page with another part between the marks; raises ``ValueError`` without them."""
    before, _, rest = text.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise ValueError(f"the page has no marks {BEGIN} and {END}: put them where the part belongs")
    return f"{before}{BEGIN}\n{part}\n{END}{after}"


def _nothing() -> Iterator[str]:
    yield "**Nothing has run on a GPU yet.** These steps of `python -m benchmarks.gpu_proof` are waiting for one:"
    yield ""
    for step in STEPS:
        yield f"- `{step.name}`: {step.what}."
    yield ""
    yield "So no figure of speed on a GPU is claimed anywhere."


def _where(name: str, report: Mapping[str, Any]) -> str:
    figures = report["steps"].get("machine", {}).get("figures", {})
    gpus = figures.get("gpus", {})
    devices = ", ".join(f"{gpu['name']} (`{gpu['capability']}`)" for gpu in gpus.get("devices", [])) or "no GPU"
    packages = figures.get("environment", {}).get("packages", {})
    versions = ", ".join(f"{package} {version}" for package, version in packages.items() if package in _VERSIONS)
    return (
        f"Run on {report['date']}: {devices}, driver for CUDA {gpus.get('driver')}. Packages: {versions}. "
        f"All of it is in [{name}](../../benchmarks/results/{name})."
    )


def _rows(steps: Mapping[str, Any]) -> list[list[str]]:
    known = {step.name: step.what for step in STEPS}
    rows = []
    for name in [*known, *(name for name in steps if name not in known and name != "wheels")]:
        result = steps.get(name, {"status": SKIPPED, "figures": {}})
        said = _SAID.get(result["status"], result["status"])
        rows.append([f"`{name}`", known.get(name, ""), said, _cell("; ".join(_shown(result.get("figures", {}))))])
    return rows


def _target(step: str, target: Mapping[str, Any]) -> list[str]:
    met = "yes" if target["met"] else "**no**"
    return [f"`{step}`", _cell(target["name"]), _number(target["measured"]), f"{target['limit']:g}", met]


def _shown(figures: Mapping[str, Any]) -> Iterator[str]:
    """Figures of a step worth a line, those of its parts after the part's name."""
    found = [form.format(value) for path, form in _SHOWN if (value := _at(figures, path)) is not None]
    if found:
        yield ", ".join(found)
    for part, inner in figures.items():
        if isinstance(inner, Mapping):
            found = [form.format(value) for path, form in _SHOWN if (value := _at(inner, path)) is not None]
            if found and "." not in part and part not in _PARENTS:
                yield f"{part}: {', '.join(found)}"


_PARENTS = {path.partition(".")[0] for path, _ in _SHOWN if "." in path}


def _at(figures: Mapping[str, Any], path: str) -> float | None:
    value: Any = figures
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _number(value: float | None) -> str:
    return "no number" if value is None else f"{value:.4g}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _code(text: str) -> str:
    return " ".join(text.replace("`", "'").split())[:300]


def _item(text: str) -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, initial_indent="- ", subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    update(PAGE, latest())
