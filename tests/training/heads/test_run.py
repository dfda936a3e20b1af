"""`train` on rows with labels: every kind of head learns, is exported, and says in a deployment what it learned."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from helpers.heads import LABELS, make_head
from helpers.sentences import save_encoder, save_sentence_encoder
from helpers.tiny_deployments import make_model_folder

from adalink.export.adapter.export import export_adapter
from adalink.export.base.export import export_base
from adalink.runtime import ConfigError, DataError, Deployment, ModelError
from adalink.runtime.storage.adapter import read_adapter
from adalink.runtime.storage.head_spec import MULTI_LABEL, REGRESSION, SINGLE_LABEL, TOKENS, Head
from adalink.runtime.text_classifier import Classification, read_scores
from adalink.tools.cli import main
from adalink.tools.evaluation.rows import read_eval_rows, rows_with_labels
from adalink.training import AdaLinkConfig, HeadSettings, TrainSettings, train
from adalink.training.data.labelled_rows import LabelledRow, LabelledSpan, read_labelled_rows
from adalink.training.heads.classifier import _target
from adalink.training.heads.metrics import measure
from adalink.training.loop.options import LoopOptions

QUICK = TrainSettings(max_steps=120, batch_size=8, max_length=40, lr=3e-3, device="cpu", save_steps=1000)
CONFIG = AdaLinkConfig(rank=4)
WORDS = ["oil", "corn", "gold", "tin", "rye", "wheat"]


def texts(seed: int, count: int) -> list[list[str]]:
    rng = np.random.default_rng(seed)
    return [[WORDS[number] for number in rng.integers(0, len(WORDS), rng.integers(2, 5))] for _ in range(count)]


def topic(words: Sequence[str]) -> str:
    return "oil" if "oil" in words else "other"


def rows_of(kind: str, seed: int, count: int) -> list[dict[str, Any]]:
    """Rows whose labels follow from which words there are."""
    rows: list[dict[str, Any]] = []
    for words in texts(seed, count):
        text = " ".join(words)
        if kind == "pairs":
            rows.append({"text": text, "text_pair": words[0], "label": int("oil" in words)})
        elif kind == SINGLE_LABEL:
            rows.append({"text": text, "label": topic(words)})
        elif kind == MULTI_LABEL:
            rows.append({"text": text, "labels": sorted({word for word in words if word in ("oil", "corn")})})
        elif kind == REGRESSION:
            rows.append({"text": text, "label": 100.5 + 10 * ("oil" in words)})
        elif kind == "tags":
            tags = ["B-METAL" if word in ("gold", "tin") else "O" for word in words]
            rows.append({"tokens": words, "tags": tags})
        else:
            starts = np.cumsum([0, *(len(word) + 1 for word in words[:-1])]).tolist()
            spans = [
                {"start": start, "end": start + len(word), "label": "METAL"}
                for start, word in zip(starts, words, strict=True)
                if word in ("gold", "tin")
            ]
            rows.append({"text": text, "spans": spans})
    return rows


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_encoder(tmp_path_factory.mktemp("base") / "tiny")
    export_base(folder, folder.parent / "out")
    return folder


MAIN = {
    SINGLE_LABEL: ("accuracy", 0.9),
    MULTI_LABEL: ("micro_f1", 0.8),
    REGRESSION: ("pearson", 0.8),
    TOKENS: ("span_f1", 0.9),
    "tags": ("span_f1", 0.9),
    "pairs": ("accuracy", 0.9),
}


@pytest.mark.parametrize("kind", MAIN)
def test_each_kind_learns_and_is_deployed(base: Path, tmp_path: Path, kind: str) -> None:
    data, held_out = (
        write(tmp_path / f"{name}.jsonl", rows_of(kind, seed, count))
        for name, seed, count in (("train", 0, 80), ("eval", 1, 40))
    )
    report = train(base, data, held_out, tmp_path / kind, CONFIG, QUICK)
    name, least = MAIN[kind]
    assert report["evaluation"][name] > least
    head = read_adapter(tmp_path / kind).config.head
    assert head is not None
    assert head.max_tokens == 40
    export_adapter(tmp_path / kind, base.parent / "out", name=kind, replace=True)
    rows = rows_of(kind, 2, 12)
    with Deployment.open(base.parent / "out", threads=1) as deployment:
        inputs = [
            (row["text"], row["text_pair"]) if kind == "pairs" else row.get("text") or " ".join(row["tokens"])
            for row in rows
        ]
        said = deployment.classify(inputs, kind)
    right = []
    for row, one in zip(rows, said, strict=True):
        if kind in (SINGLE_LABEL, "pairs"):
            right.append(one.label == str(row["label"]))
        elif kind == MULTI_LABEL:
            right.append(list(one.labels) == row["labels"])
        elif kind == REGRESSION:
            assert one.value is not None
            right.append((one.value > 105) == (row["label"] > 105))
        else:
            words = [span["start"] for span in row["spans"]] if "spans" in row else None
            metals = [word for word in one_text(row).split() if word in ("gold", "tin")]
            right.append(
                [span.text for span in one.spans] == metals and {span.label for span in one.spans} <= {"METAL"}
            )
            assert words is None or [span.start for span in one.spans] == words or not right[-1]
    assert np.mean(right) > 0.7


def one_text(row: dict[str, Any]) -> str:
    return str(row.get("text") or " ".join(row["tokens"]))


def test_base_is_not_changed_and_rows_repeat(base: Path, tmp_path: Path) -> None:
    """The same arguments give the same adapter, also when the run is interrupted and resumed."""
    before = (base / "model.safetensors").read_bytes()
    data = write(tmp_path / "train.jsonl", rows_of(SINGLE_LABEL, 0, 30))
    settings = TrainSettings(max_steps=12, batch_size=4, max_length=20, device="cpu", save_steps=5)
    first = train(base, data, data, tmp_path / "first", CONFIG, settings)

    class StopError(Exception):
        pass

    from transformers import TrainerCallback

    class Interrupt(TrainerCallback):  # type: ignore[misc]  # transformers has no types for it
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if state.global_step == 7:
                raise StopError

    with pytest.raises(StopError):
        train(base, data, data, tmp_path / "second", CONFIG, settings, loop=LoopOptions(callbacks=(Interrupt(),)))
    second = train(base, data, data, tmp_path / "second", CONFIG, settings, loop=LoopOptions(resume=True))
    assert second["adapter_digest"] == first["adapter_digest"]
    assert (base / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("files", "asked", "expected"),
    [(None, None, "mean"), ("cls", None, "cls"), ("cls", "max", "max"), (("cls", "mean"), None, "mean")],
)
def test_pooling_is_the_bases_own(base: Path, tmp_path: Path, files: Any, asked: str | None, expected: str) -> None:
    model = base
    if files is not None:
        model = save_sentence_encoder(tmp_path / "tiny", base, {"pooling_mode": files})
    data = write(tmp_path / "train.jsonl", rows_of(SINGLE_LABEL, 0, 10))
    settings = TrainSettings(max_steps=1, max_length=20, device="cpu")
    train(model, data, data, tmp_path / "out", CONFIG, settings, head=HeadSettings(pooling=asked))
    head = read_adapter(tmp_path / "out").config.head
    assert head is not None
    assert head.pooling == expected


def test_head_alone_leaves_the_states(base: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "train.jsonl", rows_of(SINGLE_LABEL, 0, 60))
    report = train(base, data, data, tmp_path / "alone", CONFIG, QUICK, head=HeadSettings(alone=True))
    assert report["evaluation"]["accuracy"] > report["evaluation"]["majority_accuracy"] + 0.15
    adapter = read_adapter(tmp_path / "alone")
    assert sorted(adapter.weights) == ["head.bias", "head.weight"]
    assert report["method"]["rank"] == 0


def test_command_line_from_rows_to_labels(base: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "train.jsonl", rows_of(SINGLE_LABEL, 0, 60))
    out = base.parent / "out"

    def call(*arguments: Any) -> Any:
        result = CliRunner().invoke(main, [*map(str, arguments)])
        assert result.exit_code == 0, result.output
        return result

    options = ("--max-steps", 60, "--max-length", 20, "--rank", 4, "--device", "cpu", "--pooling", "mean")
    trained = call("train", "--base", base, "--data", data, "--eval", data, "--out", tmp_path / "crops", *options)
    assert "accuracy" in trained.stdout
    assert "majority accuracy" in trained.stdout
    call("export", "adapter", tmp_path / "crops", "--out", out, "--name", "crops", "--replace")
    shown = call("classify", out, "oil and gold", "--task", "crops").stdout.splitlines()
    assert len(shown) == 2
    assert shown[0].split()[1] in ("oil", "other")
    rows = write(tmp_path / "rows.jsonl", [{"text": "oil and gold", "label": "extra"}, {"text": "corn " * 30}])
    result = call("classify", out, "--jsonl", rows, "--task", "crops")
    entries = [json.loads(line) for line in result.stdout.splitlines()]
    with Deployment.open(out) as deployment:
        said = deployment.classify(["oil and gold", "corn " * 30], "crops")
    assert [entry["label"] for entry in entries] == [one.label for one in said]
    assert entries[0]["probabilities"] == said[0].probabilities
    assert [entry["truncated"] for entry in entries] == [False, True]
    assert "1 of 2 texts were longer" in result.stderr


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"text": "a"}', "columns are text, expected text and label"),
        ('{"text": " ", "label": "x"}', "the text is empty"),
        ('{"text": "a", "label": "x", "labels": ["y"]}', "expected text and label"),
        ('{"text": "a", "labels": ["x", "x"]}', "expected different names"),
        ('{"text": "a", "label": 1.5}\n{"text": "a", "label": "x"}', "jsonl:2: label is 'x', expected a number"),
        ('{"text": "a", "spans": [{"start": 0, "end": 2, "label": "x"}]}', "within the 1 characters"),
        (
            '{"text": "abc", "spans": [{"start": 0, "end": 2, "label": "x"}, {"start": 1, "end": 3, "label": "x"}]}',
            "beside the others",
        ),
        ('{"tokens": ["a"], "tags": []}', "1 tokens and 0 tags"),
        ('{"tokens": ["a"], "tags": ["PER"]}', "tag 'PER', expected 'O'"),
        (
            '{"text": "a", "label": "x", "text_pairs": 1}',
            "did you mean 'text_pair'",
        ),
        ('{"text": "a", "label": "x"}', "1 labels, expected at least 2"),
        ('{"tokens": ["a"], "tags": ["O"]}', "no row has a span"),
        ("\n".join(json.dumps({"text": "a", "label": f"text {n}"}) for n in range(12)), "12 labels in 12 rows"),
        ('{"text": "a", "label": 2.5}\n{"text": "b", "label": 2.5}', "all rows have the number 2.5"),
    ],
)
def test_wrong_rows(base: Path, tmp_path: Path, row: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(row)
    with pytest.raises(DataError, match=re.escape(message)):
        train(base, path, path, tmp_path / "out", CONFIG, QUICK)
    assert sorted(tmp_path.iterdir()) == [path]


def test_labels_of_eval_rows_must_be_known(base: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "train.jsonl", rows_of(SINGLE_LABEL, 0, 30))
    other = write(tmp_path / "eval.jsonl", [{"text": "a", "label": "oil"}, {"text": "a", "label": "coal"}])
    with pytest.raises(DataError, match="jsonl:2: label 'coal' is in no row of the training"):
        train(base, data, other, tmp_path / "out", CONFIG, QUICK)


def test_decoders_and_searches_are_refused(base: Path, tmp_path: Path) -> None:
    from adalink.training.settings import SearchSettings

    data = write(tmp_path / "train.jsonl", rows_of(SINGLE_LABEL, 0, 30))
    decoder = make_model_folder(tmp_path / "llama", "llama")
    with pytest.raises(ModelError, match="a decoder: rows with labels are for encoders"):
        train(decoder, data, data, tmp_path / "out", CONFIG, QUICK)
    with pytest.raises(ConfigError, match=r"search of 1 minutes .* Leave --search out"):
        train(base, data, data, tmp_path / "out", CONFIG, QUICK, space=SearchSettings(minutes=1))
    with pytest.raises(ConfigError, match="leave --assume-pretokenizer out"):
        train(base, data, data, tmp_path / "out", CONFIG, QUICK, assume_pretokenizer="gpt-2")
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(ModelError, match="an encoder takes rows with labels"):
        train(base, prompts, prompts, tmp_path / "out", CONFIG, QUICK)


def test_forms_of_rows(tmp_path: Path) -> None:
    def read(*rows: dict[str, Any], kind: str | None = None) -> tuple[str, list[LabelledRow]]:
        return read_labelled_rows(write(tmp_path / "rows.jsonl", rows), kind)

    kind, rows = read({"text": "a", "label": True}, {"text": "b", "label": 3}, {"text": "c", "label": " tin "})
    assert (kind, [row.labels for row in rows]) == (SINGLE_LABEL, [("true",), ("3",), ("tin",)])
    trained, evaluated = rows_with_labels(rows, kind), read_eval_rows(tmp_path / "rows.jsonl", kind)
    assert [row.expected for row in trained] == [row.expected for row in evaluated]
    kind, rows = read({"text": "a", "label": 1}, {"text": "b", "label": 0.5})
    assert (kind, [row.value for row in rows]) == (REGRESSION, [1.0, 0.5])
    assert read({"text": "a", "label": 1}, kind=REGRESSION)[1][0].value == 1.0
    kind, rows = read({"tokens": ["New", "York", "is", "big"], "tags": ["B-LOC", "I-LOC", "O", "I-SIZE"]})
    assert kind == TOKENS
    assert rows[0].text == "New York is big"
    assert rows[0].spans == (LabelledSpan(0, 8, "LOC"), LabelledSpan(12, 15, "SIZE"))


def said_of(head: Head, scores: Sequence[Any]) -> list[Classification]:
    return [read_scores(head, np.asarray(one, np.float64), "a", [], []) for one in scores]


def test_metrics() -> None:
    head = make_head(SINGLE_LABEL)
    rows = [LabelledRow(text="a", labels=(label,), line=1) for label in ("oil", "oil", "grain", "trade")]
    got = measure(head, rows, said_of(head, [np.eye(3)[number] for number in (0, 1, 1, 2)]))
    assert got == pytest.approx({"accuracy": 0.75, "macro_f1": (2 / 3 + 2 / 3 + 1) / 3, "majority_accuracy": 0.5})
    head = make_head(MULTI_LABEL)
    rows = [LabelledRow(text="a", labels=labels, line=1) for labels in (("red", "blue"), (), ("red",))]
    got = measure(head, rows, said_of(head, [[1, -1, -1, 1, -1], [-1] * 5, [1, -1, -1, -1, -1]]))
    assert got == pytest.approx({"micro_f1": 2 * 2 / 6, "macro_f1": (1 + 0 + 0) / 3, "exact_match": 2 / 3})
    head = make_head(REGRESSION)
    rows = [LabelledRow(text="a", value=value, line=1) for value in (1.0, 2.0, 6.0)]
    got = measure(head, rows, said_of(head, [[1.0], [3.0], [6.0]]))
    assert got["mean_squared_error"] == pytest.approx(1 / 3)
    assert got["mean_absolute_error"] == pytest.approx(1 / 3)
    assert got["pearson"] == pytest.approx(np.corrcoef([1, 2, 6], [1, 3, 6])[0, 1])
    assert got["mean_squared_error_of_the_mean"] == pytest.approx(14 / 3)


def test_white_space_tokens_have_no_tag() -> None:
    """As in SentencePiece, where a space may be a token of its own, or belong to the word behind it."""
    row = LabelledRow(text="in New York", spans=(LabelledSpan(3, 11, "LOC"),), line=1)
    offsets = [(0, 0), (0, 2), (2, 3), (3, 6), (6, 11), (0, 0)]
    index = {label: number for number, label in enumerate(LABELS[TOKENS])}
    target = _target(row, make_head(TOKENS), index, offsets, [None, 0, 1, 1, 2, None])
    assert target == [-100, 0, -100, index["B-LOC"], index["I-LOC"], -100]
