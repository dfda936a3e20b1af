"""`train` on rows of every form: CSV and Parquet give the adapter of JSONL, and the split is recorded and repeats."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from helpers.sentences import save_encoder
from helpers.tiny_models import FAMILIES
from helpers.tiny_tokenizer import make_tokenizer

from adalink.runtime import DataError, ModelError
from adalink.runtime.rows.source import RowSource
from adalink.training import AdaLinkConfig, TrainSettings, train
from adalink.training.data.rows import encode_rows, read_rows
from adalink.training.loop.options import LoopOptions

SETTINGS = TrainSettings(max_steps=1, batch_size=4, max_length=40, device="cpu", seed=5)
CONFIG = AdaLinkConfig(rank=2)
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
WORDS = ("oil", "corn", "gold")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decoder") / "tiny"
    FAMILIES["llama"]().save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder") / "tiny")


def news(count: int = 15) -> list[dict[str, Any]]:
    return [
        {"id": str(number), "body": f'{WORDS[number % 3]}, "no. {number}"', "topic": WORDS[number % 3]}
        for number in range(count)
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), dialect="excel" if path.suffix == ".csv" else "excel-tab")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_every_form_gives_the_same_adapter(decoder: Path, tmp_path: Path) -> None:
    prompts = [{"prompt": f"Text: {row['body']} Topic:", "completion": f" {row['topic']}"} for row in news()]
    expected = train(decoder, write(tmp_path / "rows.jsonl", prompts), None, tmp_path / "out", CONFIG, SETTINGS)
    for form in ("tsv", "json", "csv", "parquet"):
        path = write(tmp_path / f"news.{form}", news())
        source = RowSource(path, {"text": "body", "label": "topic"}, "Text: {text} Topic:")
        assert read_rows(source) == read_rows(tmp_path / "rows.jsonl")
        if form != "parquet":
            continue
        report = train(decoder, source, None, tmp_path / form, CONFIG, SETTINGS)
        assert report["adapter_digest"] == expected["adapter_digest"]
        assert report["data"]["split"] == expected["data"]["split"]
        assert report["data"]["train"]["columns"] == {"text": "body", "label": "topic"}
        assert report["data"]["train"]["template"] == "Text: {text} Topic:"


def test_classifiers_take_every_form(encoder: Path, tmp_path: Path) -> None:
    rows = [{"text": row["body"], "label": row["topic"]} for row in news()]
    reports = [
        train(encoder, write(tmp_path / f"rows.{form}", rows), None, tmp_path / form, CONFIG, SETTINGS)
        for form in ("jsonl", "csv")
    ]
    assert len({report["adapter_digest"] for report in reports}) == 1
    assert len({json.dumps(report["evaluation"]) for report in reports}) == 1


def test_the_split_is_said_and_recorded(encoder: Path, tmp_path: Path) -> None:
    rows = [{"text": row["body"], "label": row["topic"]} for row in news()]
    said: list[str] = []
    loop = LoopOptions(progress=said.append)
    report = train(encoder, write(tmp_path / "rows.csv", rows), None, tmp_path / "out", CONFIG, SETTINGS, loop=loop)
    line = "no --eval: 12 rows to learn from, 3 held out to measure on (seed 5, every label's share: 3 labels)"
    assert line in said
    data = json.loads((tmp_path / "out" / "training.json").read_text())["data"]
    assert data == report["data"]
    assert (data["train"]["rows"], data["eval"]["rows"]) == (12, 3)
    assert data["train"]["sha256"] == data["eval"]["sha256"]
    assert (data["split"]["seed"], data["split"]["share"], data["split"]["stratified"]) == (5, 0.2, True)


def test_numbers_of_csv_are_classes_or_a_regression(encoder: Path, tmp_path: Path) -> None:
    for labels, measure in ((["1", "2"], "accuracy"), (["1", "2.5"], "pearson"), (["1.5", "high"], "accuracy")):
        rows = [{"text": row["body"], "label": labels[number % 2]} for number, row in enumerate(news())]
        path = write(tmp_path / "rows.csv", rows)
        assert measure in train(encoder, path, None, tmp_path / "out", CONFIG, SETTINGS)["evaluation"]


def test_conversations_are_encoded_as_by_transformers(decoder: Path, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    path = write(tmp_path / "rows.jsonl", [{"messages": messages, "id": 7}] * 2)
    (example, _) = encode_rows(read_rows(path), tokenizer, 40, path)
    expected = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=True)["input_ids"]
    assert example.prompt == list(expected)
    assert example.target == [*tokenizer("yo", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert train(decoder, path, path, tmp_path / "out", CONFIG, SETTINGS)["data"]["train"]["rows"] == 2
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"rows\.jsonl:1 has messages, and the base has no chat template"):
        encode_rows(read_rows(path), tokenizer, 40, path)


def test_wrong_use(decoder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", [{"text": row["body"], "label": row["topic"]} for row in news()])
    with pytest.raises(ModelError, match=r"a decoder: .*--template"):
        train(decoder, path, None, tmp_path / "out", CONFIG, SETTINGS)
    with pytest.raises(DataError, match="save standard input as a file"):
        train(decoder, "-", None, tmp_path / "out", CONFIG, SETTINGS)
    long = write(tmp_path / "long.csv", [{"prompt": "a", "completion": "b"}, {"prompt": "a\n" * 60, "completion": "b"}])
    with pytest.raises(DataError, match=r"long\.csv:3 has \d+ tokens, expected at most 40"):
        train(decoder, long, long, tmp_path / "out", CONFIG, SETTINGS)
