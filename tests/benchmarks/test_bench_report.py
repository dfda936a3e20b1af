"""The table and the plots of a stored run."""

from __future__ import annotations

import json

import pytest

from benchmarks.cases import CASES
from benchmarks.plots import draw
from benchmarks.process import REPOSITORY
from benchmarks.ratios import adapter_cost, agreement, ratio, share_of_limit
from benchmarks.readme import BEGIN, END, section, update
from benchmarks.slopes import LAWS, Model, fit
from benchmarks.table import render

MODEL = Model(weight_bytes=538e6, cache_bytes=46e3, parameters=134e6, attention=35e3, bandwidth=40e9, rate=2e11)


def case(definition, speeds, swap):
    found = {
        "label": definition.label,
        "precision": definition.precision,
        "without": definition.without,
        "prefill_ms": 100.0,
        "first_token_ms": 80.0,
        "decode_tok_s": sorted(speeds)[1],
        "swap_us": swap,
        "adapter_load_ms": swap and 1.5,
        "adapter_disk_bytes": swap and 149_000,
        "adapter_resident_bytes": swap and 75_000.0,
        "engine_load_s": 0.5,
        "resident_mb": 700.0,
        "weight_bytes": 538_000_000,
        "first_tokens": [1, 2, 3, 4],
    }
    found["rounds"] = {"decode_tok_s": speeds, "first_token_ms": [80.0] * 3, "prefill_ms": [100.0] * 3}
    found["rounds"]["memory_gb_s"] = [40.0, 50.0, 30.0]
    return found


@pytest.fixture
def report():
    speeds = {"kit-task": [60.0, 66.0, 63.0], "genai": [40.0, 44.0, 50.0], "genai-lora": [36.0, 33.0, 40.0]}
    cases = {
        definition.name: case(
            definition, speeds.get(definition.name, [20.0, 30.0, 25.0]), 9.0 if definition.without else None
        )
        for definition in CASES
    }
    cases["peft"] = {"label": "PEFT", "precision": "fp32", "without": "torch", "error": "peft is not installed"}
    points = {
        x: {"prefill_ms": 50.0 * x, "decode_ms": 13.0, "swap_us": 9.0, "memory_bytes": 75e3 * x} for x in (1, 16, 256)
    }
    return {
        "date": "2026-01-01",
        "command": "make bench",
        "environment": {"cpu": "a CPU"},
        "settings": {
            "task_rank": 16,
            "model": "tiny",
            "threads": 2,
            "prompt_tokens": 128,
            "new_tokens": 256,
            "rounds": 3,
        },
        "memory_gb_s": 40.0,
        "kit": {
            "metrics": [
                {"name": "prefill_ratio", "value": 1.004, "unit": "1"},
                {"name": "decode_ratio", "value": 0.996, "unit": "1"},
                {"name": "mixed_batch_ratio", "value": 1.021, "unit": "1"},
            ]
        },
        "peers": cases,
        "growth": {series: {"points": points, "fits": fit(series, points, MODEL)} for series in LAWS},
    }


def test_ratios_are_of_the_same_round(report):
    cases = report["peers"]
    # 60/40, 66/44, 63/50: the median is 1.5, where the ratio of the medians would be 63/44.
    assert ratio(cases, "kit-task", "genai", "decode_tok_s") == 1.5
    assert ratio(cases, "kit-task", "peft", "decode_tok_s") is None
    # 36/40, 33/44, 40/50
    assert adapter_cost(cases, "genai-lora") == pytest.approx(0.2)
    assert adapter_cost(cases, "genai") is None
    # 60/40, 66/50, 63/30 times 0.538: the median of the shares
    assert share_of_limit(cases["kit-task"]) == pytest.approx(60 * 0.538 / 40)
    assert share_of_limit(cases["peft"]) is None


def test_the_table_holds_every_case_and_every_reason(report):
    page = render(report)
    for definition in CASES:
        if definition.name != "peft":
            assert f"| {definition.label} | {definition.precision} | 100 |" in page
    assert "| PEFT | fp32 | not measured |" in page
    assert "- PEFT: peft is not installed" in page
    assert "| fp32, tokens/s: kit with a task / onnxruntime-genai | 1.50 |" in page
    assert "| tasks | `memory_bytes` | 1.00 | 1.00 |" in page
    assert "| fp32, no adapter | kit, genai, ort, torch | 4 of 4 |" in page
    columns = {line.count("|") for line in page.split("## Speed")[1].split("## Adapters")[0].splitlines() if line}
    assert columns == {9}


def test_the_plots_come_from_a_stored_report(report, tmp_path):
    stored = json.loads(json.dumps(report))
    drawn = draw(stored, tmp_path)
    assert {path.name for path in drawn} == {
        "tokens-per-second.png",
        "adapter-cost.png",
        "swap.png",
        "memory.png",
        "growth.png",
    }
    for path in drawn:
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG")
        assert 2_000 < len(data) < 250_000


def test_another_model_in_one_peer_shows(report):
    """Planted: an adapter that does nothing gives the base's tokens, other than those of its group."""
    report["peers"]["ort-lora"]["first_tokens"] = [1, 2, 9, 4]
    (row,) = [row for row in agreement(report["peers"]) if "LoRA" in row[0]]
    assert row[2] == "2 of 4"


def test_readme_gets_what_was_measured(report, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"# Top\n\n{BEGIN}\nold\n{END}\n\nEnd.\n")
    update(readme, report)
    update(readme, report)
    text = readme.read_text()
    assert text == f"# Top\n\n{BEGIN}\n{section(report)}\n{END}\n\nEnd.\n"
    assert "| tokens/s, fp32, adapter active | 63 | 36 | 25 | not measured | 25 |" in text
    assert "| switch to a loaded adapter | 9.0 µs | 9.0 µs |" in text
    assert "| load an adapter | 1.5 ms | 1.5 ms |" in text
    assert "| first token, 128-token prompt | 80 ms | 80 ms |" in text
    told = " ".join(text.split())
    assert "genai's: 1.50x without an adapter and 1.67x with LoRA in fp32; 1.00x without an adapter" in told
    assert "first token 1.00x, decode step 1.00x, a batch of 32 tasks 1.02x of one task." in told
    assert [line for line in text.splitlines() if len(line) > 120 and not line.startswith("|")] == []
    readme.write_text("# Top\n")
    with pytest.raises(ValueError, match="has no marks"):
        update(readme, report)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.09, "0.1 µs"),
        (499.0, "499.0 µs"),
        (738.0, "0.7 ms"),
        (29_900.0, "29.9 ms"),
        (290_860.0, "291 ms"),
        (2.3e6, "2.3 s"),
    ],
)
def test_readme_times_have_the_unit_that_people_read(report, value, shown):
    report["peers"]["kit-task"]["swap_us"] = value
    assert f"| switch to a loaded adapter | {shown} |" in section(report)


def test_readme_says_what_the_stored_run_says():
    path = REPOSITORY / "benchmarks/results/cpu.json"
    if not path.is_file():
        pytest.skip("no run is stored yet: make bench")
    stored = json.loads(path.read_text(encoding="utf-8"))
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert section(stored) in readme, "run: python -m benchmarks.readme"
    assert render(stored) == (REPOSITORY / "benchmarks/results/cpu.md").read_text(encoding="utf-8")
