"""The plots: nothing overlaps, every number has a unit that people read, and precisions stand apart."""

from __future__ import annotations

import copy
import itertools
import json
import re

import matplotlib
import pytest
from matplotlib import pyplot
from matplotlib.colors import to_hex
from matplotlib.text import Text

from benchmarks import plots
from benchmarks.plot_units import duration_text, duration_ticks, size_text, size_ticks, spread, thin, tick_text
from benchmarks.plots import FIGURES, LIMIT_COLOUR, TASK_COUNTS, draw, task_memory
from benchmarks.process import REPOSITORY

RESULTS = REPOSITORY / "benchmarks/results"
OKABE_ITO = {"#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#000000"}
DURATION, SIZE = r"[\d,.]+ (s|ms|µs)", r"[\d,.]+ (kB|MB|GB|TB)"


@pytest.fixture(autouse=True)
def agg():
    matplotlib.use("Agg")
    yield
    pyplot.close("all")


@pytest.fixture(scope="module")
def stored():
    return json.loads((RESULTS / "cpu.json").read_text(encoding="utf-8"))


def crowded(report):
    """The same run where all engines take the same memory, are nearly as fast as the memory allows, and switch fast."""
    report = copy.deepcopy(report)
    for case in report["peers"].values():
        case["decode_tok_s"] = 0.97 * report["memory_gb_s"] * 1e9 / case["weight_bytes"]
        case["resident_mb"] = 700.0
        if case["adapter_resident_bytes"] is not None:
            case |= {"adapter_resident_bytes": 2e7, "swap_us": 900.0, "adapter_load_ms": 1.0}
    return report


@pytest.fixture(params=["stored", "crowded"])
def report(request, stored):
    return stored if request.param == "stored" else crowded(stored)


def boxes(figure):
    """Every text that is drawn, with its bounding box in pixels."""
    figure.canvas.draw()
    hidden = {id(text) for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for text in ticks_beyond(axis)}
    texts = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
    return [(text.get_text(), Text.get_window_extent(text)) for text in texts if id(text) not in hidden]


def ticks_beyond(axis):
    """Labels of ticks that are not drawn, because they lie beyond the axis's ends."""
    low, high = sorted(axis.get_view_interval())
    ticks = (*axis.get_major_ticks(), *axis.get_minor_ticks())
    return [text for tick in ticks if not low <= tick.get_loc() <= high for text in (tick.label1, tick.label2)]


def overlaps(figure):
    return [
        (first, second)
        for (first, box), (second, other) in itertools.combinations(boxes(figure), 2)
        if min(box.x1, other.x1) - max(box.x0, other.x0) > 0.5 and min(box.y1, other.y1) - max(box.y0, other.y0) > 0.5
    ]


@pytest.mark.parametrize("name", FIGURES)
def test_texts_do_not_overlap_and_lie_within_the_figure(name, report):
    figure = FIGURES[name](report)
    assert overlaps(figure) == []
    for text, box in boxes(figure):
        assert box.x0 >= 0, text
        assert box.y0 >= 0, text
        assert box.x1 <= figure.bbox.x1, text
        assert box.y1 <= figure.bbox.y1, text


def test_labels_that_are_not_spread_overlap(stored, monkeypatch):
    """Planted: three LoRA engines take nearly the same memory, and their names stay where their lines end."""
    monkeypatch.setattr(plots, "spread", lambda places, gap: list(places))
    found = {text for pair in overlaps(FIGURES["memory"](stored)) for text in pair}
    assert any(text.startswith("PEFT LoRA, all linear") for text in found)


def test_speed_labels_do_not_touch_the_limit(report):
    figure = FIGURES["tokens-per-second"](report)
    figure.canvas.draw()
    for axes in figure.axes:
        limits = [line.get_window_extent() for line in axes.get_lines() if line.get_color() == LIMIT_COLOUR]
        assert limits
        for text in axes.texts:
            box = text.get_window_extent()
            crossing = [
                limit
                for limit in limits
                if limit.y0 < box.y1 and box.y0 < limit.y1 and box.x0 < limit.x1 and limit.x0 < box.x1
            ]
            assert not crossing, text.get_text()


@pytest.mark.parametrize("name", FIGURES)
def test_figure_has_a_title_and_no_powers_of_ten(name, stored):
    figure = FIGURES[name](stored)
    assert figure.get_suptitle()
    assert not [text for text, _ in boxes(figure) if "^" in text or re.search(r"\de[+-]?\d", text)]


def test_precisions_stand_in_panels_of_their_own(stored):
    for name in ("tokens-per-second", "adapter-cost", "swap", "memory"):
        figure = FIGURES[name](stored)
        assert [axes.get_title(loc="left") for axes in figure.axes] == ["float32", "4 bit"]
    labels = [{tick.get_text() for tick in axes.get_yticklabels()} for axes in FIGURES["swap"](stored).axes]
    cases = [case for case in stored["peers"].values() if case["swap_us"] is not None]
    for precision, names in zip(("fp32", "int4"), labels, strict=True):
        assert names == {case["label"].replace(" int4", "") for case in cases if case["precision"] == precision}


def test_axes_carry_units(stored):
    (memory, _), (switch, _) = FIGURES["memory"](stored).axes, FIGURES["swap"](stored).axes
    assert all(re.fullmatch(SIZE, tick.get_text()) for tick in memory.get_yticklabels())
    assert all(re.fullmatch(DURATION, tick.get_text()) for tick in switch.get_xticklabels())
    assert all(re.fullmatch(DURATION, text.get_text()) for text in switch.texts)
    assert "tokens per second" in FIGURES["tokens-per-second"](stored).axes[-1].get_xlabel()
    assert "%" in FIGURES["adapter-cost"](stored).axes[-1].get_xlabel()
    growth = FIGURES["growth"](stored)
    columns = len(stored["growth"])
    for number, axes in enumerate(growth.axes):
        unit = SIZE if number >= 3 * columns else DURATION
        assert all(re.fullmatch(unit, tick.get_text()) for tick in axes.get_yticklabels())


def test_memory_labels_say_what_was_measured(stored):
    """Counted anew: one task's resident memory, and 9,999 further adapters."""
    case = stored["peers"]["peft-attention"]
    size_gb = (case["resident_mb"] + 9999 * case["adapter_resident_bytes"] / 2**20) / 1024
    assert f"PEFT LoRA, attention: {size_gb:.0f} GB" in [text for text, _ in boxes(FIGURES["memory"](stored))]
    assert task_memory(case, TASK_COUNTS[0]) == case["resident_mb"] * 2**20


def test_growth_panels_hold_every_line(stored):
    for axes in FIGURES["growth"](stored).axes:
        low, high = axes.get_ylim()
        for line in axes.get_lines():
            assert all(low <= y <= high for y in line.get_ydata())


def test_colours_are_safe_for_all_eyes(stored):
    for name in FIGURES:
        for axes in FIGURES[name](stored).axes:
            colours = {to_hex(line.get_color()) for line in axes.get_lines()}
            colours |= {to_hex(bar.get_facecolor()) for bar in axes.patches}
            assert colours <= OKABE_ITO | {"#999999"}, name


def test_committed_plots_are_of_the_committed_results(stored, tmp_path):
    for path in draw(stored, tmp_path):
        drawn, committed = (pyplot.imread(image) for image in (path, RESULTS / path.name))
        assert drawn.shape == committed.shape, f"{path.name}: run python -m benchmarks.plots"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (9.1e-8, "0.091 µs"),
        (8.76e-6, "8.8 µs"),
        (7.44e-4, "744 µs"),
        (0.0177, "18 ms"),
        (0.9996, "1.0 s"),
        (12.3, "12 s"),
    ],
)
def test_durations_read_well(seconds, text):
    assert duration_text(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"), [(91008, "89 kB"), (667.9 * 2**20, "668 MB"), (1.5 * 2**30, "1.5 GB"), (6.3 * 2**40, "6.3 TB")]
)
def test_sizes_read_well(size, text):
    assert size_text(size) == text


def test_ticks_lie_within_and_are_few():
    assert duration_ticks(2e-6, 0.5) == pytest.approx([1e-5, 1e-4, 1e-3, 1e-2, 1e-1])
    assert [tick_text(size_text(tick)) for tick in size_ticks(5e7, 2e10)] == ["100 MB", "1 GB", "10 GB"]
    assert thin([1, 2, 3, 4, 5, 6, 7], 4) == [1, 3, 5, 7]
    assert thin([], 4) == []


def test_spread_keeps_order_and_gap():
    places = [10.0, 50.0, 11.0, 10.5, 80.0, 14.0]
    moved = spread(places, 5)
    ordered = sorted(range(len(places)), key=lambda index: places[index])
    assert all(moved[second] - moved[first] >= 5 - 1e-9 for first, second in itertools.pairwise(ordered))
    assert (moved[1], moved[4]) == (50.0, 80.0)
    assert sum(moved) == pytest.approx(sum(places))
