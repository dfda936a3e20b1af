"""`Deployment.classify` against heads in PyTorch, with the adapter attached by `adalink.training`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.heads import LABELS, TASKS, make_head_deployment
from helpers.runtime import random_adapter, write_adapter
from helpers.tiny_models import FAMILIES

from adalink.export.adapter.export import export_adapter
from adalink.export.base.export import export_base
from adalink.runtime import AdapterError, ConfigError, ContractError, Deployment, RequestError, Span
from adalink.runtime.storage.adapter import Adapter
from adalink.runtime.storage.head_spec import MULTI_LABEL, REGRESSION, SINGLE_LABEL, TOKENS, Head
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.runtime.text.spans import read_spans
from adalink.training.adapter_io import load_adapter
from adalink.training.heads.classifier import LabelCollator, LabelledExample, TrainableClassifier
from adalink.training.models.loading import load_base, load_tokenizer

HEADS = [name for name, settings in TASKS.items() if "head" in settings]
TEXTS = ["oil", "the price of corn fell in 3 months", "two words", "a very long text with more words " * 3]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Adapter]]:
    return make_head_deployment(tmp_path_factory.mktemp("heads"))


@pytest.fixture(scope="module")
def opened(made: tuple[Path, Path, dict[str, Adapter]]) -> Iterator[Deployment]:
    with Deployment.open(made[1], threads=1) as deployment:
        yield deployment


def in_pytorch(made: tuple[Path, Path, dict[str, Adapter]], task: str, texts: list[Any]) -> list[np.ndarray]:
    """Scores of texts or pairs, each in a row of its own."""
    model, tokenizer = load_base(made[0]), load_tokenizer(made[0])
    head = TASKS[task]["head"]
    scores = []
    with load_adapter(made[0].parent / task, model) as attached, torch.no_grad():
        module = TrainableClassifier(attached).eval()
        for text in texts:
            pair = (text, None) if isinstance(text, str) else text
            encoded = tokenizer(*pair, truncation=True, max_length=head.max_tokens, return_tensors="pt")
            scores.append(module.scores(**encoded)[0].numpy())
    return scores


@pytest.mark.parametrize("task", HEADS)
def test_scores_are_those_of_pytorch(
    opened: Deployment, made: tuple[Path, Path, dict[str, Adapter]], task: str
) -> None:
    texts: list[Any] = [*TEXTS]
    if task != "names":
        texts += [("oil", "corn"), ("a text that is longer than the other one, by far", "corn"), (TEXTS[-1], TEXTS[-1])]
    classifier = opened.text_classifier
    got = classifier.scores(classifier.prepare(texts, task))
    for ours, theirs in zip(got, in_pytorch(made, task, texts), strict=True):
        assert ours == pytest.approx(theirs, abs=3e-5)


def test_heads_of_all_kinds_share_a_batch(opened: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = opened.text_encoder._runner
    batches: list[int] = []
    true = runner.run
    monkeypatch.setattr(runner, "run", lambda inputs, *more: batches.append(len(inputs.ids)) or true(inputs, *more))
    tasks = HEADS * 2
    texts = [TEXTS[index % 4] for index in range(len(tasks))]
    got = opened.classify(texts, tasks)
    assert batches == [len(tasks)]
    for text, task, one in zip(texts, tasks, got, strict=True):
        (alone,) = opened.classify([text], task)
        assert (one.label, one.labels, one.tokens, one.truncated) == (
            alone.label,
            alone.labels,
            alone.tokens,
            alone.truncated,
        )
        assert one.probabilities == pytest.approx(alone.probabilities, abs=1e-5)
        assert [span.label for span in one.spans] == [span.label for span in alone.spans]


def test_what_each_kind_of_head_says(opened: Deployment, made: tuple[Path, Path, dict[str, Adapter]]) -> None:
    text = "the price of corn fell"
    topics, colours, rating, names = opened.classify([text] * 4, ["topics", "colours", "rating", "names"])
    scores = {task: in_pytorch(made, task, [text])[0].astype(np.float64) for task in HEADS}
    shares = np.exp(scores["topics"]) / np.exp(scores["topics"]).sum()
    assert topics.label == LABELS[SINGLE_LABEL][int(shares.argmax())]
    assert list(topics.probabilities) == list(LABELS[SINGLE_LABEL])
    assert list(topics.probabilities.values()) == pytest.approx(shares, abs=1e-5)
    several = 1 / (1 + np.exp(-scores["colours"]))
    assert list(colours.probabilities.values()) == pytest.approx(several, abs=1e-5)
    assert colours.labels == tuple(np.array(LABELS[MULTI_LABEL])[several >= 0.5])
    assert (colours.label, topics.value, rating.probabilities) == (None, None, {})
    assert rating.value == pytest.approx(scores["rating"][0], abs=1e-5)
    assert all(text[span.start : span.end] == span.text for span in names.spans)
    assert colours.truncated
    assert not topics.truncated
    assert (topics.tokens, colours.tokens) == (len(opened.tokenizer.encode(text)), 9)


def test_spans_follow_the_tags_of_words() -> None:
    text = "Anna Lee met Bob in New York City today"
    starts = [0, 5, 9, 13, 17, 20, 24, 29, 34]
    words = text.split()
    offsets = [(0, 0)]
    numbers: list[int | None] = [None]
    for word, (start, chars) in enumerate(zip(starts, words, strict=True)):
        cut = 2 if len(chars) > 3 else len(chars)
        offsets += [(start, start + cut)] + ([(start + cut, start + len(chars))] if cut < len(chars) else [])
        numbers += [word] * (1 if cut == len(chars) else 2)
    tags = ["B-PER", "I-PER", "O", "B-PER", "O", "I-LOC", "I-LOC", "B-LOC", "O"]  # an I without its B begins a span
    labels = LABELS[TOKENS]
    scores = np.zeros((len(offsets), len(labels)))
    for position, number in enumerate(numbers):
        is_first = number is not None and number != numbers[position - 1]
        scores[position, labels.index(tags[number]) if is_first and number is not None else 1] = 0.75
    spans = read_spans(text, offsets, numbers, labels, scores)
    assert [(span.label, span.text, span.probability) for span in spans] == [
        ("PER", "Anna Lee", 0.75),
        ("PER", "Bob", 0.75),
        ("LOC", "New York", 0.75),
        ("LOC", "City", 0.75),
    ]
    assert spans[0] == Span("PER", 0, 8, "Anna Lee", 0.75)
    assert read_spans(" a", [(0, 2)], [0], labels, np.array([[0, 1, 0, 0, 0]])) == (Span("LOC", 1, 2, "a", 1.0),)
    # A space that is a token of its own begins no word.
    scores = np.array([[1, 0, 0, 0, 0], [0, 1, 0, 0, 0]])
    assert read_spans(" a", [(0, 1), (1, 2)], [0, 0], labels, scores) == (Span("LOC", 1, 2, "a", 1.0),)


def test_spans_in_scripts_without_spaces() -> None:
    """A tokenizer takes the whole sentence for one word."""
    text, labels = "安倍は東京に住む", LABELS[TOKENS]
    offsets, tags = [(0, 2), (2, 3), (3, 4), (4, 5), (5, 8)], ["B-PER", "O", "B-LOC", "I-LOC", "O"]
    scores = np.array([np.eye(5)[labels.index(tag)] for tag in tags])
    spans = read_spans(text, offsets, [0] * 5, labels, scores)
    assert [(span.label, span.text) for span in spans] == [("PER", "安倍"), ("LOC", "東京")]


@pytest.mark.parametrize(
    ("texts", "tasks", "message"),
    [
        (["a"], None, "text 0: the base model has no labels"),
        (["a", "b"], ["topics", "plain"], "text 1: task 'plain' has no labels"),
        (["a"], "nobody", "not deployed"),
        ("a", "topics", "texts is 'a'"),
        ([3], "topics", "text 0 is 3"),
        ([("a", "b", "c")], "topics", "text 0 is"),
        ([("a", "b")], "names", "is a pair, and task 'names' labels the parts"),
        (["\ud800"], "topics", "text 0 holds"),
        (["a"], ["topics", "names"], "2 entries for 1 rows"),
    ],
)
def test_wrong_arguments(opened: Deployment, texts: Any, tasks: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        opened.classify(texts, tasks)
    assert opened.classify([], "topics") == []


def test_replaced_task_has_the_new_head(made: tuple[Path, Path, dict[str, Adapter]], tmp_path: Path) -> None:
    other = random_adapter(made[2]["topics"].config.base_fingerprint, 48, 99, **TASKS["frozen"])
    with Deployment.open(made[1], threads=1) as deployment:
        deployment.add_task(write_adapter(tmp_path / "new", other), "topics", replace=True)
        classifier = deployment.text_classifier
        (got,) = classifier.scores(classifier.prepare(["oil"], "topics"))
        states = deployment.run(input_ids=[deployment.tokenizer.encode("oil")])["last_hidden_state"][0, -1]
    assert got == pytest.approx(other.weights["head.weight"] @ states + other.weights["head.bias"], abs=1e-4)


def test_old_adapters_keep_their_digests() -> None:
    """What an adapter without a head is made of has not changed."""
    adapter = random_adapter("sha256:" + "0" * 64, 48, 0, rank=3, activation="gelu", bias=True, scope="all")
    assert adapter.digest == "sha256:60abece1a30824e19a611b3fa524eb8469cff5540ee8b51f2bc58e0dafcd788b"


def test_a_head_on_a_decoder_is_refused(tmp_path: Path) -> None:
    base = export_base(FAMILIES["llama"](), tmp_path / "out").base
    adapter = random_adapter(base.fingerprint, base.hidden_size, 1, **TASKS["topics"])
    with pytest.raises(ContractError, match=r"has a head.*is a decoder"):
        export_adapter(write_adapter(tmp_path / "topics", adapter), tmp_path / "out")
    with Deployment.open(tmp_path / "out", threads=1) as deployment, pytest.raises(RequestError, match="not deployed"):
        deployment.classify(["a"], "topics")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"problem_type": "ranking"}, "problem_type is 'ranking'"),
        ({"labels": ("one",)}, "expected 2 to"),
        ({"labels": ("one", "one")}, "different names"),
        ({"labels": ("one", "")}, "different names"),
        ({"pooling": "median"}, "pooling is 'median'"),
        ({"pooling": ""}, "pooling is ''"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"problem_type": REGRESSION, "labels": ("a", "b")}, "expected 1 to 1"),
        ({"problem_type": TOKENS, "pooling": "", "labels": ("O", "B-X")}, "'B-NAME' and 'I-NAME'"),
        ({"problem_type": TOKENS, "pooling": "", "labels": ("B-X", "I-X", "O")}, "expected 'O'"),
    ],
)
def test_heads_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    fields = {"problem_type": SINGLE_LABEL, "labels": ("a", "b"), "pooling": "mean", "max_tokens": 8, **changes}
    with pytest.raises(ConfigError, match=message):
        random_adapter(
            "sha256:" + "0" * 64, 48, 0, rank=2, activation="gelu", bias=False, scope="all", head=Head(**fields)
        )


def test_weights_that_do_not_fit_the_labels(made: tuple[Path, Path, dict[str, Adapter]], tmp_path: Path) -> None:
    adapter = made[2]["topics"]
    folder = write_adapter(tmp_path / "topics", adapter)
    path = folder / "adapter_config.json"
    path.write_text(path.read_text().replace('"oil",', ""))
    with pytest.raises(AdapterError, match=r"'head.weight' has shape \(3, 48\), expected \(2, 48\)"):
        export_adapter(folder, made[1], name="other")


def test_manifest_says_the_labels(made: tuple[Path, Path, dict[str, Adapter]]) -> None:
    head = read_manifest(made[1]).tasks["topics"].head
    assert head == TASKS["topics"]["head"]
    assert read_manifest(made[1]).tasks["plain"].head is None


def test_collator_pads_on_the_right() -> None:
    examples = [
        LabelledExample([5, 6, 7], [0, 0, 1], [-100, 2, 1], [(0, 1)] * 3, [0, 1, 2], is_cut=False),
        LabelledExample([8], [0], [3], [(0, 1)], [0], is_cut=False),
    ]
    batch = LabelCollator(TASKS["names"]["head"], 1)(examples)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 1], [0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 1], [3, -100, -100]]
