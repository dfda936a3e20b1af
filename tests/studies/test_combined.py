"""Several data sets as one: rows keep their wording and labels, and are scored among their own."""

from __future__ import annotations

import pytest
import torch
from helpers.studies import write_base, write_data
from helpers.tiny_models import FAMILIES
from helpers.tiny_tokenizer import make_tokenizer

from adalink.runtime.errors import DataError
from studies.experiment.combined import combine
from studies.experiment.data import DataSet, Labelled, digest_rows, load_data
from studies.experiment.methods import tune
from studies.experiment.run import choose_scored, measure, open_base, open_data, perform
from studies.experiment.run_settings import Run
from studies.experiment.scoring import embed_labels, make_task
from studies.experiment.settings import AdaLinkMethod, Data

# In the second data set the letters say other things, one of them the same as in the first.
OTHER = {"x": "ant", "y": "yes", "z": "no"}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return write_data(folder / "letters"), write_data(folder / "ends", seed=6, labels=OTHER)


@pytest.fixture(scope="module")
def parts(places):
    return [
        load_data(name, 32, str(place), template)
        for name, place, template in zip(("letters", "ends"), places, ("{text} is", "{text}?"), strict=True)
    ]


def test_rows_keep_their_wording_and_labels(parts):
    both = combine("both", parts)
    assert both.labels == (*parts[0].labels, *parts[1].labels)
    assert both.part_of == (0, 0, 0, 1, 1, 1)
    for split in ("train", "validation", "test"):
        found = {(both.prompt(row), both.labels[row.label], both.part_of[row.label]) for row in getattr(both, split)}
        wanted = {
            (part.prompt(row), part.labels[row.label], number)
            for number, part in enumerate(parts) for row in getattr(part, split)
        }  # fmt: skip
        assert found == wanted
    assert [both.part_of[row.label] for row in both.test[:6]] == [0, 1] * 3  # the first rows are a fair share


def test_a_text_learned_in_one_and_tested_in_the_other_is_caught(parts):
    row = Labelled(parts[0].test[3].text, 0)
    leaking = DataSet("ends", "{text}", OTHER, [row], [Labelled("v", 0)], [Labelled("w", 1)])
    with pytest.raises(DataError, match="both: 1 texts are in both train and test"):
        combine("both", [parts[0], leaking])


def test_shorter_data_sets_are_seen_as_often(parts):
    short = DataSet("ends", "{text}", OTHER, parts[1].train[:7], parts[1].validation, parts[1].test)
    both = combine("both", [parts[0], short])
    rows = both.subset(None, 3)
    assert sum(row.label < 3 for row in rows) == sum(row.label >= 3 for row in rows) == len(parts[0].train)
    assert {row.text for row in rows if row.label >= 3} == {row.text for row in short.train}
    assert rows == both.subset(None, 3) != both.subset(None, 4)
    some = combine("both", parts).subset(20, 3)
    assert {row.text for row in some} == {row.text for part in parts for row in part.subset(20, 3)}
    with pytest.raises(DataError, match="ends has 7 training rows"):
        combine("both", [parts[0], short]).subset(20, 3)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_scores_are_those_of_each_data_set_alone(family, parts):
    both, tokenizer = combine("both", parts), make_tokenizer()
    base = FAMILIES[family]()

    def task(data):
        vectors = embed_labels(base, tokenizer, data) if family == "bert" else None
        torch.manual_seed(4)
        tuned = tune(FAMILIES[family](), AdaLinkMethod(name="m", lr=(1e-2,), rank=4))
        for weight in tuned.added.parameters():
            torch.nn.init.normal_(weight, std=0.2)
        return make_task(tuned, tokenizer, data, vectors)

    together = task(both)
    for number, part in enumerate(parts):
        start = 3 * number
        alone = task(part)
        found = together.scores([Labelled(row.text, row.label + start) for row in part.test])
        torch.testing.assert_close(found[:, start : start + 3], alone.scores(part.test), atol=1e-4, rtol=0)
        assert torch.isinf(found[:, [index for index in range(6) if not start <= index < start + 3]]).all()
    assert not torch.isinf(together(**together.collate(both.train[:8]))["loss"])


def test_accuracy_of_the_parts_by_hand(parts):
    both = combine("both", parts)
    rows = [Labelled("a", 0), Labelled("b", 1), Labelled("x", 3), Labelled("xx", 3), Labelled("y", 4)]
    table = {"a": 0, "b": 2, "x": 3, "xx": 3, "y": 5}

    class Fixed:
        def scores(self, rows):
            part = both.part_of[rows[0].label]
            assert {both.part_of[row.label] for row in rows} == {part}
            scores = torch.full((len(rows), 6), float("-inf"))
            scores[:, 3 * part : 3 * part + 3] = 0.0
            for place, row in enumerate(rows):
                scores[place, table[row.text]] = 1.0
            return scores

    result = measure(Fixed(), rows, both)
    assert result["accuracy"] == 3 / 5
    assert result["part_accuracy"] == {"letters": 0.5, "ends": pytest.approx(2 / 3)}
    assert result["class_accuracy"] == [1.0, 0.0, None, 1.0, 0.0, None]


def test_a_run_learns_both(places, tmp_path):
    entries = [
        Data(name="letters", folder=str(places[0]), template="{text} is", test_rows=20),
        Data(name="ends", folder=str(places[1]), template="{text}?", test_rows=10),
    ]
    entry = Data(name="both", combine=("letters", "ends"))
    spec = str(write_base(tmp_path / "tiny"))
    data = open_data(entry, entries)
    scored = choose_scored(data, "final", None)
    assert len(scored) == 30
    run = Run(
        purpose="final", base="tiny", base_digest=open_base(spec).digest, data="both", words=32,
        train_digest=digest_rows(data, data.subset(None, 1)), scored_digest=digest_rows(data, scored), scored_rows=30,
        method={"kind": "adalink", "rank": 16}, size=None, lr=1e-2, max_steps=40, batch_size=8, seed=1, device="cpu",
    )  # fmt: skip
    result = perform(run, spec, entry, AdaLinkMethod(name="m", lr=(1e-2,), rank=16), entries)["result"]
    by_part = result["part_accuracy"]
    assert result["accuracy"] == pytest.approx((20 * by_part["letters"] + 10 * by_part["ends"]) / 30)
    assert min(by_part.values()) > 0.6  # a third by guessing
