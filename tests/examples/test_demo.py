"""The demo on a tiny model: the whole path, what a second run reuses, and what makes it start again."""

import importlib.util
import re
import shutil

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from helpers.heads import make_head
from helpers.sentences import save_encoder
from helpers.tiny_deployments import make_model_folder, seeded_adapter, write_adapter

from adalink.runtime.deployment import Deployment
from adalink.runtime.device.gpus import find_gpus
from adalink.runtime.storage.adapter import make_adapter
from adalink.runtime.storage.head_spec import SINGLE_LABEL, TOKENS
from adalink.runtime.trt.record import read_record
from examples.demo.answers import shorten
from examples.demo.run import command
from examples.make_data import write_lines

HAS_RTX = importlib.util.find_spec("tensorrt_rtx_bindings") is not None


@pytest.fixture
def workplace(tmp_path):
    model = make_model_folder(tmp_path / "tiny", "mistral")
    examples = tmp_path / "examples"
    for seed, name in enumerate(("alpha", "beta"), 1):
        write_adapter(examples / "adapters" / name, seeded_adapter(model, seed))
    write_rows(examples, [("Hello 12", "alpha", "x"), ("What is it", "beta", "y")])
    return tmp_path, model, examples


def write_rows(examples, rows):
    fields = ("prompt", "task", "expected")
    write_lines(examples / "demo/rows.jsonl", [dict(zip(fields, row, strict=True)) for row in rows])


@pytest.fixture
def classifiers(workplace, monkeypatch):
    """Two tasks with heads for the same demo, on a tiny encoder; returns the encoder's folder."""
    root, _, examples = workplace
    encoder = save_encoder(root / "encoder")
    for seed, (name, kind) in enumerate({"names": TOKENS, "topic": SINGLE_LABEL}.items()):
        adapter = seeded_adapter(encoder, seed)
        config = msgspec.structs.replace(adapter.config, head=make_head(kind))
        count, width = len(config.head.labels), config.hidden_size
        head = {"head.weight": np.eye(count, width, dtype=np.float32), "head.bias": np.arange(count, dtype=np.float32)}
        write_adapter(examples / "classifiers/adapters" / name, make_adapter(config, {**adapter.weights, **head}))
    rows = {
        "topic": {"text": "oil prices rose", "label": "oil"},
        "names": {"text": "ada lovelace wrote it", "spans": [{"start": 0, "end": 12, "label": "PER"}]},
    }
    monkeypatch.setattr("examples.demo.classifiers.make_rows", lambda task, seed: {"test": [rows[task]] * 3})
    return encoder


def run(workplace, *arguments):
    root, model, examples = workplace
    options = ["--out", root / "out", "--model", model, "--examples", examples, *arguments]
    return CliRunner().invoke(command, [*map(str, options)])


def test_whole_path_then_reuse_then_change_then_anew(workplace, classifiers):
    root, _, examples = workplace
    first = run(workplace, "--encoder", classifiers)
    assert first.exit_code == 0, first.output
    assert "reused" not in first.stderr
    for text in ("Answers of one engine", "All 52 checks passed", "engine_builds_during_swaps", "decode_ratio"):
        assert text in first.stdout
    with Deployment.open(root / "out/deployment") as deployment:
        assert deployment.tasks == ("alpha", "beta")
        (reply,) = deployment.generate(["Hello 12"], tasks="alpha", max_new_tokens=8)
    assert shorten(reply.text, 14) in first.stdout
    assert "0 of 2 answers are right" in first.stdout
    assert "In one batch of mixed tasks 2 of 2 answers are the same" in first.stdout
    assert "alpha: not measured: no test rows of this task are known" in first.stdout
    encoder_checks = re.findall(r"All (\d+) checks passed", first.stdout)[1]
    assert int(encoder_checks) > 20
    with Deployment.open(root / "out/encoder/deployment") as deployment:
        (said,) = deployment.classify(["oil prices rose"], "topic")
    share = 100.0 * (said.label == "oil")
    assert f"topic (one of 8 labels): F1 {share:.1f} % over 3 test rows" in first.stdout
    assert first.stdout.count("ada lovelace") >= 2  # the text, and the span that is expected

    base = {path: path.stat().st_mtime_ns for path in (root / "out/deployment/base").rglob("*")}
    second = run(workplace, "--encoder", classifiers)
    assert second.exit_code == 0, second.output
    assert second.stderr.count("reused") == 4 + HAS_RTX + 4  # base, two tasks, parity, engine; the same of the encoder
    assert re.findall(r"All (\d+) checks passed", second.stdout) == ["52", encoder_checks]

    shutil.rmtree(examples / "classifiers")  # what follows is of the first engine alone
    # Another adapter under the same name: that task and parity are made anew, the base is not.
    shutil.rmtree(examples / "adapters/beta")
    write_adapter(examples / "adapters/beta", seeded_adapter(workplace[1], 9))
    third = run(workplace)
    assert third.exit_code == 0, third.output
    assert third.stderr.count("reused") == 2 + HAS_RTX
    assert {path: path.stat().st_mtime_ns for path in (root / "out/deployment/base").rglob("*")} == base

    again = run(workplace, "--fresh")
    assert again.exit_code == 0, again.output
    assert "reused" not in again.stderr


def test_a_folder_of_somebody_else_is_left_alone(workplace):
    root, *_ = workplace
    precious = root / "out/deployment/precious.txt"
    precious.parent.mkdir(parents=True)
    precious.write_text("mine")
    result = run(workplace)
    assert result.exit_code == 2
    assert "no demo made it" in result.stderr
    assert precious.read_text() == "mine"


def test_wrong_places_are_named(workplace, classifiers, tmp_path):
    *_, examples = workplace
    (tmp_path / "file").write_text("")
    for arguments, message in (
        (["--out", tmp_path / "file" / "demo"], "file/demo: Not a directory; choose a writable place with --out"),
        (["--examples", tmp_path / "nowhere"], "holds no adapter folders"),
        (["--model", tmp_path / "nowhere"], "no such file or folder"),
        (["--encoder", tmp_path / "nowhere"], "no such folder; the classifiers need a local encoder"),
    ):
        result = run(workplace, *arguments)
        assert result.exit_code == 2
        assert message in result.stderr
    for row in ('{"prompt": "x", "expected": "y"}', '{"prompt": "x", "task": "alpha"}'):
        (examples / "demo/rows.jsonl").write_text(f"{row}\n")
        result = run(workplace)
        assert result.exit_code == 2
        assert "rows.jsonl:1: a row of the demo names its task and its expected answer" in result.stderr


@pytest.mark.skipif(not HAS_RTX, reason="TensorRT-RTX is not installed")
@pytest.mark.skipif(bool(find_gpus().devices), reason="there is a GPU")
def test_without_a_gpu_an_engine_is_built_for_another_machine(workplace):
    result = run(workplace)
    assert result.exit_code == 0, result.output
    assert "engine: building it with TensorRT-RTX for sm86" in result.stderr
    assert "engine: built, not run: " in result.stderr
    folder = workplace[0] / "out/deployment"
    assert read_record(folder / "engines/tensorrt-rtx").target == ("sm86",)


def test_without_the_package_it_says_how_to_get_it(workplace, monkeypatch):
    monkeypatch.setattr("examples.demo.engine._MODULES", ("no_such_module",))
    result = run(workplace)
    assert result.exit_code == 0, result.output
    assert "make demo TRT=1" in result.stderr
