"""Verification of quantised bases: passes when all is well, attributes the error, and finds each planted fault."""

import json
import shutil

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from helpers.quantized_graphs import MATRIX_OPERATOR, dequantized
from helpers.runtime import reseal
from helpers.tiny_deployments import make_deployment
from onnx import helper, numpy_helper

from adalink.export.base.export import export_base
from adalink.runtime.errors import DataError, RequestError, UnknownTaskError
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.tools.cli import main
from adalink.tools.parity.checks.quantization import check_cost
from adalink.tools.parity.reference.quantized_weights import read_matrices
from adalink.tools.parity.suite import VerifyOptions, verify

TASKS = {"alpha": {"seed": 1}}
TEXT = "the quick brown fox jumps over the lazy dog and then sleeps for a while near the old gate " * 4


def quantized_deployment(root, family, scheme, tasks=TASKS):
    model, folder = make_deployment(root, family, tasks)
    export_base(model, folder, quantization=scheme)
    return model, folder


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return quantized_deployment(tmp_path_factory.mktemp("clean"), "llama", "int4")


@pytest.fixture
def deployment(clean, tmp_path):
    model, original = clean
    return model, shutil.copytree(original, tmp_path / "deployment")


def measure(model, folder, variant="int4", **settings):
    return verify(folder, str(model), {}, VerifyOptions(variant=variant, threads=1, quick=True, **settings))


def failures(model, folder):
    return {check.name for check in measure(model, folder).checks if not check.passed}


def edit(folder, change):
    """Change the quantised graph, its weights inside the file, with integrity intact."""
    path = folder / read_manifest(folder).variants["int4"].graph
    model = onnx.load(path)
    change(model.graph)
    path.write_bytes(model.SerializeToString())
    reseal(folder)


def change_part(part, layer, change):
    """Change codes (1), scales (2) or zero points (3) of the product whose name holds ``layer``."""

    def apply(graph):
        node = next(node for node in graph.node if node.op_type == MATRIX_OPERATOR and layer in node.name)
        tensor = next(tensor for tensor in graph.initializer if tensor.name == node.input[part])
        values = numpy_helper.to_array(tensor).copy()
        change(values)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    return apply


@pytest.mark.parametrize(
    ("family", "scheme"),
    [
        *((family, "int4") for family in ("llama", "gemma3", "gpt2", "bert")),
        *(pytest.param(family, "int4", marks=pytest.mark.slow) for family in ("qwen2", "qwen3", "phi3", "t5")),
        ("gpt2", "int8"),
    ],
)
def test_a_quantised_deployment_passes(tmp_path, family, scheme):
    model, folder = quantized_deployment(tmp_path / "root", family, scheme)
    report = measure(model, folder, scheme)
    assert not [check for check in report.checks if not check.passed]
    names = {check.name for check in report.checks}
    output = "last_hidden_state" if family in ("bert", "t5") else "logits"
    assert {"quantization/matrices", "quantization/weights", "quantization/scales", f"base/{output}"} <= names
    assert {f"activations/base/{output}", f"activations/task/alpha/{output}", "swap/return"} <= names
    change = report.cost["max_change" if family == "bert" else "max_logit_change"]
    assert change["float32"] == 0 < change["weights"]
    assert change["deployed"] > 0


def test_dequantised_matrices_agree_with_a_slow_reading(clean):
    _, folder = clean
    path = folder / read_manifest(folder).variants["int4"].graph
    slow = dequantized(path)
    matrices = list(read_matrices(path))
    assert [matrix.name for matrix in matrices] == list(slow)
    for matrix in matrices:
        np.testing.assert_allclose(matrix.read(), slow[matrix.name], rtol=1e-6, atol=0)


def test_the_plain_variant_is_verified_by_default(clean):
    model, folder = clean
    report = measure(model, folder, None)
    assert report.passed
    assert not report.cost
    assert not [check.name for check in report.checks if check.name.startswith(("quantization", "activations"))]


def scale_one_block(values):
    values.reshape(-1)[5] *= np.float32(1.01)


def shift_zero_point(values):
    values.reshape(-1)[3] ^= 1


@pytest.mark.parametrize(
    ("part", "layer", "change", "check"),
    [
        (2, "o_proj", scale_one_block, "quantization/scales"),
        (2, "lm_head", scale_one_block, "quantization/scales"),
        (3, "gate_proj", shift_zero_point, "quantization/weights"),
        (3, "lm_head", shift_zero_point, "quantization/weights"),
        (
            1,
            "down_proj",
            lambda values: values.reshape(-1).__setitem__(7, values.reshape(-1)[7] ^ 4),
            "quantization/weights",
        ),
    ],
    ids=["scale", "head-scale", "zero-point", "head-zero-point", "code"],
)
def test_weights_that_are_not_the_models(deployment, part, layer, change, check):
    model, folder = deployment
    edit(folder, change_part(part, layer, change))
    found = failures(model, folder)
    assert check in found
    assert "base/logits" not in found  # the engine computes what the file says; it is the file that is wrong


def test_a_head_of_another_model(deployment):
    model, folder = deployment
    edit(folder, change_part(1, "lm_head", lambda values: np.random.default_rng(0).shuffle(values)))
    assert "quantization/matrices" in failures(model, folder)


def test_two_products_exchanged(deployment):
    """Every weight is some layer's, but the engine multiplies with the wrong one."""
    model, folder = deployment

    def exchange(graph):
        products = [node for node in graph.node if node.op_type == MATRIX_OPERATOR]
        first, second = (node for node in products if "gate_proj" in node.name)  # one a layer
        for part in (1, 2, 3):
            first.input[part], second.input[part] = second.input[part], first.input[part]

    edit(folder, exchange)
    found = failures(model, folder)
    assert "base/logits" in found
    assert not [name for name in found if name.startswith("quantization/")]


def test_an_engine_that_rounds_activations_too_coarsely(deployment):
    """Products whose input is rounded to a sixteenth of the largest number: the weights are right."""
    model, folder = deployment

    def coarsen(graph):
        constants = {"coarse": np.array(16, np.float32), "axes": np.array([-1], np.int64)}
        graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
        node = next(node for node in graph.node if node.op_type == MATRIX_OPERATOR and "o_proj" in node.name)
        source, at = node.input[0], list(graph.node).index(node)
        chain = [
            helper.make_node("Abs", [source], ["c_abs"]),
            helper.make_node("ReduceMax", ["c_abs", "axes"], ["c_max"], keepdims=1),
            helper.make_node("Div", [source, "c_max"], ["c_unit"]),
            helper.make_node("Mul", ["c_unit", "coarse"], ["c_wide"]),
            helper.make_node("Round", ["c_wide"], ["c_round"]),
            helper.make_node("Div", ["c_round", "coarse"], ["c_near"]),
            helper.make_node("Mul", ["c_near", "c_max"], ["c_out"]),
        ]
        node.input[0] = "c_out"
        for new in reversed(chain):
            graph.node.insert(at, new)

    edit(folder, coarsen)
    found = failures(model, folder)
    assert {"base/logits", "activations/base/logits"} <= found
    assert not [name for name in found if name.startswith("quantization/")]


def test_cost_is_attributed_and_may_be_limited(clean):
    model, folder = clean
    report = measure(model, folder, text=TEXT, max_perplexity_increase=1e6)
    assert report.passed
    perplexity = report.cost["perplexity"]
    assert len({perplexity[side] for side in ("float32", "weights", "deployed")}) == 3
    assert report.cost["kl"]["float32"] == 0 < report.cost["kl"]["weights"] < 1
    assert report.cost["top1"]["float32"] == 1
    assert 0 < report.cost["rows with the tokens of each alone"]["deployed"] <= 1
    increase = 100 * (perplexity["deployed"] / perplexity["float32"] - 1)
    (check,) = (check for check in report.checks if check.name == "quantization/perplexity")
    assert check.measured == pytest.approx(increase)


def test_more_perplexity_than_is_accepted_is_found():
    cost = {"perplexity": {"float32": 10.0, "weights": 10.4, "deployed": 11.0}}
    assert check_cost(cost, 10.1).passed
    assert not check_cost(cost, 9.9).passed


def test_perplexity_against_a_direct_computation(clean):
    """float32's perplexity of a text, with transformers' own loss."""
    import torch

    from adalink.training.models.loading import load_base, load_tokenizer

    model, folder = clean
    loaded, tokenizer = load_base(model), load_tokenizer(model)
    ids = tokenizer(TEXT)["input_ids"]
    longest = read_manifest(folder).base.max_positions
    rows = torch.tensor([ids[start : start + longest] for start in range(0, len(ids) - longest + 1, longest)][:2])
    with torch.no_grad():
        expected = float(loaded(input_ids=rows, labels=rows).loss.exp())
    found = measure(model, folder, text=TEXT).cost["perplexity"]["float32"]
    assert found == pytest.approx(expected, rel=1e-5)


def test_limits_where_there_is_nothing_to_limit(clean):
    model, folder = clean
    with pytest.raises(RequestError, match=r"'onnxruntime-cpu' is not quantised.*--variant"):
        measure(model, folder, None, max_perplexity_increase=5.0)
    with pytest.raises(RequestError, match=r"'onnxruntime-cpu' is not quantised.*leave --text out"):
        measure(model, folder, None, text=TEXT)
    with pytest.raises(DataError, match=r"the text has \d tokens, expected at least 2"):
        measure(model, folder, text="a")


def write_rows(path, rows):
    path.write_text("".join(json.dumps({"prompt": prompt, "completion": reply}) + "\n" for prompt, reply in rows))
    return path


def test_rows_of_a_task_are_not_measured_where_that_means_nothing(clean, tmp_path):
    model, folder = clean
    rows = write_rows(tmp_path / "rows.jsonl", [("a", "b")])
    with pytest.raises(RequestError, match=r"'onnxruntime-cpu' is not quantised.*--rows"):
        measure(model, folder, None, task_rows={"alpha": rows})
    with pytest.raises(UnknownTaskError, match=r"'beta' is not deployed here; deployed are: alpha"):
        measure(model, folder, task_rows={"beta": rows})


def test_the_command_shows_what_quantising_costs(clean, tmp_path):
    model, folder = clean
    (tmp_path / "text.txt").write_text(TEXT)
    arguments = ["verify", str(folder), "--against", str(model), "--variant", "int4", "--quick", "--threads", "1"]
    arguments += ["--text", str(tmp_path / "text.txt"), "--json-file", str(tmp_path / "report.json")]
    arguments += ["--rows", f"alpha={write_rows(tmp_path / 'rows.jsonl', [('a', 'b')])}"]
    result = CliRunner().invoke(main, [*arguments, "--max-perplexity-increase", "1e6"])
    assert result.exit_code == 0, result.output
    assert "Cost of quantising" in result.output
    assert "exact match of alpha" in result.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["cost"]["perplexity"]["deployed"] > 1
    assert report["cost"]["exact match of alpha"].keys() == {"float32", "weights", "deployed"}
    (check,) = (check for check in report["checks"] if check["name"] == "quantization/perplexity")
    assert check["limit"] == 1e6


@pytest.mark.parametrize("option", ["--rows", "--adapter"])
def test_a_task_that_is_named_twice_is_refused(clean, option):
    model, folder = clean
    twice = [option, "alpha=a", option, "alpha=b"]
    result = CliRunner().invoke(main, ["verify", str(folder), "--against", str(model), *twice])
    assert result.exit_code == 2
    assert "'alpha' is named twice, expected each once" in result.stderr
