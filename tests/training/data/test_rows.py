"""Rows and batches: refusals by line, and masks against a computation by hand."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.tiny_models import FAMILIES
from helpers.tiny_tokenizer import make_tokenizer

from adalink.runtime.errors import DataError, ModelError
from adalink.training.data.batches import pad_decoder, pad_encoder_decoder
from adalink.training.data.rows import Example, TrainingRow, check_positions, encode_rows, read_rows

GOOD = json.dumps({"prompt": "2+2=", "completion": "4"})


def write(tmp_path, *lines):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_reads_rows(tmp_path):
    line = json.dumps({"prompt": "é\u2028x", "completion": "日本"}, ensure_ascii=False)
    path = write(tmp_path, GOOD, "", line)
    assert [row.line for row in read_rows(path)] == [1, 3]
    assert read_rows(path) == [TrainingRow("2+2=", "4"), TrainingRow("é\u2028x", "日本")]


def test_a_byte_order_mark_is_left_out(tmp_path):
    (tmp_path / "rows.jsonl").write_text(GOOD, encoding="utf-8-sig")
    assert read_rows(tmp_path / "rows.jsonl") == [TrainingRow("2+2=", "4")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"rows.jsonl:2: .*truncated.*expected \{\"prompt\""),
        ('{"prompt": "a"}', r"rows.jsonl:2: .*there is no column 'completion'; there are prompt: .*--map completion="),
        ('{"prompt": 1, "completion": "b"}', r"rows.jsonl:2: prompt is 1, expected a text"),
        (
            '{"prompt": "a", "completion": "b", "image": ["a.png"]}',
            r"rows.jsonl:2: field 'image' .*mean 'images'",
        ),
        ('{"prompt": "a", "Completion": "b"}', r"rows.jsonl:2: field 'Completion' .*did you mean 'completion'"),
        ('{"text": "a", "label": "b"}', r"rows.jsonl:2: text and label, .*--template 'Text: \{text\} Topic:'"),
        (
            '{"messages": [{"role": "user", "content": "b"}]}',
            r"rows.jsonl:2: the last message is user's, expected",
        ),
        ('{"prompt": "", "completion": "b"}', r"rows.jsonl:2: an empty prompt"),
        ('{"prompt": "a", "completion": ""}', r"rows.jsonl:2: an empty prompt or completion"),
        ("[1]", r"rows.jsonl:2: expected \{.*, received \[1\]"),
    ],
)
def test_wrong_line_is_named(tmp_path, line, message):
    with pytest.raises(DataError, match=message):
        read_rows(write(tmp_path, GOOD, line, GOOD))


def test_wrong_files(tmp_path):
    with pytest.raises(DataError, match="holds no row"):
        read_rows(write(tmp_path, "", ""))
    with pytest.raises(DataError, match="No such file"):
        read_rows(tmp_path / "none.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9", "completion": "b"}')
    with pytest.raises(DataError, match="byte 15 is not UTF-8"):
        read_rows(tmp_path / "latin.jsonl")


def test_rows_end_with_the_end_token():
    tokenizer = make_tokenizer()
    (example,) = encode_rows([TrainingRow("ab", "c")], tokenizer, max_length=4, origin="x")
    assert example.prompt == [tokenizer.convert_tokens_to_ids(c) for c in "ab"]
    assert example.target == [tokenizer.convert_tokens_to_ids("c"), tokenizer.eos_token_id]


def test_long_row_is_refused_not_cut():
    with pytest.raises(DataError, match=r"x: row 2 has 5 tokens, expected at most 4"):
        encode_rows([TrainingRow("ab", "c"), TrainingRow("abc", "d")], make_tokenizer(), max_length=4, origin="x")


@pytest.mark.parametrize(
    ("family", "prompt", "target", "soft"),
    [("gpt2", 60, 4, 0), ("gpt2", 50, 4, 10), ("llama", 60, 4, 0), ("bart", 64, 64, 0), ("t5", 500, 500, 0)],
)
def test_rows_longer_than_the_base_has_positions_are_refused(family, prompt, target, soft):
    from transformers import BartConfig, BartForConditionalGeneration

    if family == "bart":
        model = BartForConditionalGeneration(
            BartConfig(vocab_size=96, d_model=16, encoder_layers=1, decoder_layers=1, max_position_embeddings=64)
        )
    else:
        model = FAMILIES[family]()
    short, full = Example([5] * 3, [2]), Example([5] * prompt, [6] * target)
    check_positions([short, full], model, soft, "x")
    for longer in (Example([5, *full.prompt], full.target), Example(full.prompt, [6, *full.target])):
        if family == "t5":
            check_positions([short, longer], model, soft, "x")
            continue
        with pytest.raises(DataError, match=r"x: row 2 takes 65 positions.*, and .* has 64: shorten its prompt"):
            check_positions([short, longer], model, soft, "x")


def test_tokenizer_without_an_end():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        encode_rows([TrainingRow("ab", "c")], tokenizer, max_length=4, origin="x")


def test_decoder_batch():
    batch = pad_decoder([Example([5, 6, 7], [8, 2]), Example([9], [3, 4, 2])], pad=2)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 2], [2, 9, 3, 4, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4], [0, 0, 1, 2, 3]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 8, 2], [-100, -100, 3, 4, 2]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_encoder_decoder_batch():
    batch = pad_encoder_decoder([Example([5, 6, 7], [8, 2]), Example([9], [3, 4, 2])], pad=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [9, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[8, 2, -100], [3, 4, 2]]
