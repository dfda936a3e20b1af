"""Each method: counted right, the rest of the base untouched, scores as by hand, and it learns."""

from __future__ import annotations

import pytest
import torch
from helpers.studies import write_data
from helpers.tiny_models import FAMILIES, HIDDEN_SIZE, LAYERS, MAX_POSITIONS, VOCAB_SIZE, token_ids
from helpers.tiny_tokenizer import make_tokenizer
from transformers import set_seed

from adalink.runtime.errors import ConfigError, DataError, ModelError
from studies.experiment import scoring
from studies.experiment.combined import combine
from studies.experiment.data import DataSet, Labelled, load_data
from studies.experiment.methods import tune
from studies.experiment.scoring import NearestLabel, TextToText, check_positions, embed_labels
from studies.experiment.settings import (
    AdaLinkMethod,
    FullMethod,
    LoraMethod,
    PromptTuningMethod,
    PTuningMethod,
    ZeroShotMethod,
)

D, V, KV, HEADS, FF = HIDDEN_SIZE, VOCAB_SIZE, 32, 64, 80
LR = (1e-2,)
# On the tiny llama: queries D -> 64, keys and values D -> 32, output 64 -> D, three matrices D <-> 80.
LINEAR = (D + HEADS) + 2 * (D + KV) + (HEADS + D) + 3 * (D + FF)
METHODS = {
    "identity": (AdaLinkMethod(name="m", lr=LR, rank=5, activation="identity"), 2 * 5 * D),
    "gelu": (AdaLinkMethod(name="m", lr=LR, rank=16, activation="gelu"), 2 * 16 * D),
    "both": (AdaLinkMethod(name="m", lr=LR, rank=5, activation="identity", tokens=3), (2 * 5 + 3) * D),
    "prompt": (PromptTuningMethod(name="m", lr=LR, tokens=6), 6 * D),
    "p-tuning": (PTuningMethod(name="m", lr=LR, tokens=4, hidden=20), 4 * D + (D + 1) * 20 + 21 * 20 + 21 * D),
    "attention": (LoraMethod(name="m", lr=LR, rank=3, targets="attention"), LAYERS * 3 * ((D + HEADS) + (D + KV))),
    "all-linear": (LoraMethod(name="m", lr=LR, rank=2, targets="all-linear"), LAYERS * 2 * LINEAR),
    "embeddings": (LoraMethod(name="m", lr=LR, rank=7, targets="embeddings"), 7 * (V + D)),
    "zero-shot": (ZeroShotMethod(name="m"), 0),
}
BERT_LINEAR = 4 * (D + D) + 2 * (D + FF)
BERT = {
    "gelu": METHODS["gelu"],
    "both": METHODS["both"],
    "prompt": METHODS["prompt"],
    "p-tuning": METHODS["p-tuning"],
    "attention": (LoraMethod(name="m", lr=LR, rank=3, targets="attention"), LAYERS * 3 * 2 * (D + D)),
    "all-linear": (LoraMethod(name="m", lr=LR, rank=2, targets="all-linear"), LAYERS * 2 * BERT_LINEAR),
    "embeddings": METHODS["embeddings"],
}
CASES = [("llama", name) for name in METHODS] + [("bert", name) for name in BERT]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return load_data("letters", 32, str(write_data(tmp_path_factory.mktemp("data"))), "{text} is")


def make(family, method, data):
    """A tuned tiny base and its task."""
    base = FAMILIES[family]()
    vectors = embed_labels(base, make_tokenizer(), data) if family == "bert" else None
    set_seed(3)
    tuned = tune(base, method)
    if vectors is None:
        return TextToText(tuned, make_tokenizer(), data)
    return NearestLabel(tuned, make_tokenizer(), vectors, data.part_of)


def method_of(family, name):
    return (BERT if family == "bert" else METHODS)[name]


def steps(task, data, count, lr=1e-2):
    """Plain AdamW steps on all rows; the losses."""
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    losses = []
    for step in range(count):
        rows = [data.train[(step * 10 + place) % len(data.train)] for place in range(10)]
        loss = task(**task.collate(rows))["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("name", ["gelu", "both", "prompt"])
@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_rows_without_positions_are_refused_before_they_are_run(family, name, data):
    method = METHODS[name][0]
    soft, tokenizer = getattr(method, "tokens", 0), make_tokenizer()
    task = make(family, method, data)
    full = Labelled("a" * (MAX_POSITIONS - soft - (0 if family == "bert" else len(" is ant"))), 0)
    longer = Labelled(full.text + "a", 0)
    base = FAMILIES[family]()
    check_positions(base, tokenizer, data, [data.test[0], full], soft)
    task(**task.collate([full]))
    task.scores([full])
    with pytest.raises(
        DataError, match=rf"letters: 'a+' takes up to 65 positions, {soft} of them .* has 64: lower words"
    ):
        check_positions(base, tokenizer, data, [data.test[0], longer], soft)
    with pytest.raises((IndexError, RuntimeError)):
        task(**task.collate([longer]))


def test_a_row_is_followed_by_labels_of_its_own_part_alone(data):
    long = DataSet("long", "{text}", ("a" * 30, "b", "c"), data.train, data.validation, data.test)
    short = DataSet("short", "{text} is", ("x", "y"), [Labelled("!", 0)], [Labelled("?", 1)], [Labelled(".", 0)])
    both = combine("both", [long, short])
    text = "a" * (MAX_POSITIONS - len(" is x"))
    check_positions(FAMILIES["gpt2"](), make_tokenizer(), both, [Labelled(text, 3)], 0)
    with pytest.raises(DataError, match="takes up to 90 positions"):
        check_positions(FAMILIES["gpt2"](), make_tokenizer(), both, [Labelled(text, 0)], 0)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_trained_parameters(family, name, data):
    method, count = method_of(family, name)
    assert make(family, method, data).tuned.trained_parameters == count


@pytest.mark.parametrize("name", ["attention", "all-linear", "embeddings"])
def test_lora_adds_twice_its_product(name):
    """Its scale is alpha / rank, and alpha is twice the rank, whatever that is."""
    tuned = tune(FAMILIES["llama"](), METHODS[name][0])
    scales = [scale for module in tuned.modules() if hasattr(module, "lora_A") for scale in module.scaling.values()]
    assert scales
    assert set(scales) == {2.0}


def test_full_fine_tuning_trains_all_that_is_used(data):
    base = FAMILIES["bert"]()
    unused = sum(parameter.numel() for parameter in base.pooler.parameters())
    every = sum(parameter.numel() for parameter in base.parameters())
    task = make("bert", FullMethod(name="m", lr=LR), data)
    assert task.tuned.trained_parameters == every - unused
    llama = make("llama", FullMethod(name="m", lr=LR), data)
    assert llama.tuned.trained_parameters == sum(p.numel() for p in FAMILIES["llama"]().parameters())


@pytest.mark.parametrize(("family", "name"), [case for case in CASES if case[1] != "zero-shot"])
def test_learns_while_the_base_stays_bit_for_bit(family, name, data):
    task = make(family, method_of(family, name)[0], data)
    before = {key: value.clone() for key, value in task.state_dict().items()}
    trained = {key for key, parameter in task.named_parameters() if parameter.requires_grad}
    losses = steps(task, data, 60)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    after = task.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed
    assert changed <= trained
    # The untouched tensors are the base's own, not merely unchanged.
    own = {value.numpy().tobytes() for value in FAMILIES[family]().state_dict().values()}
    frozen = {key for key in before if key.startswith("tuned.base.") and key not in trained}
    assert len(frozen) > 10
    assert all(after[key].numpy().tobytes() in own for key in frozen)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_full_fine_tuning_learns(family, data):
    losses = steps(make(family, FullMethod(name="m", lr=LR), data), data, 30, lr=2e-3)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def shaken(family, name, data):
    """A task whose method has been trained a little, so that it does something."""
    task = make(family, method_of(family, name)[0], data)
    if name != "zero-shot":
        steps(task, data, 5)
    return task.eval()


@pytest.mark.parametrize(
    ("name", "branches"), [*((name, 64) for name in METHODS), ("gelu", 14), ("prompt", 14), ("attention", 1)]
)
def test_label_scores_are_those_of_whole_sequences(name, branches, data, monkeypatch):
    """Whether all labels are gone on with at once, two at a time or each by itself.

    The reference: each row and label alone, unpadded, without a cache, all logits.
    """
    monkeypatch.setattr(scoring, "_BRANCHES", branches)
    task, tokenizer = shaken("llama", name, data), make_tokenizer()
    rows = [*data.test[:5], Labelled("a", 0), Labelled("bb.b", 1)]
    found = task.scores(rows)
    for row, scores in zip(rows, found, strict=True):
        prompt = tokenizer(f"{row.text} is")["input_ids"]
        for label, score in zip(data.labels, scores, strict=True):
            tokens = tokenizer(" " + label, add_special_tokens=False)["input_ids"]
            ids = torch.tensor([prompt + tokens])
            embeds, _ = task.tuned.embed(ids, torch.ones_like(ids))
            with torch.no_grad():
                logits = task.tuned.base(inputs_embeds=embeds, use_cache=False).logits[0].log_softmax(dim=-1)
            start = embeds.shape[1] - len(tokens) - 1
            wanted = sum(float(logits[start + place, token]) for place, token in enumerate(tokens))
            assert float(score) == pytest.approx(wanted, abs=2e-4)


@pytest.mark.parametrize("name", ["prompt", "p-tuning"])
def test_a_soft_prompt_is_where_peft_puts_it(name, data):
    method = METHODS[name][0]
    task = shaken("llama", name, data)
    peft_model = task.tuned._soft_prompt.__self__
    ids = token_ids(4)
    embeds, mask = task.tuned.embed(ids, torch.ones_like(ids))
    assert embeds.shape[1] == method.tokens + ids.shape[1]
    with torch.no_grad():
        ours = task.tuned.base(inputs_embeds=embeds, attention_mask=mask).logits
        theirs = peft_model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(ours, theirs)


def test_the_loss_is_on_the_label_alone(data):
    task = make("llama", ZeroShotMethod(name="m"), data)
    rows = data.train[:6]
    lengths = [len(" " + data.labels[row.label]) for row in rows]  # a token a character
    likelihood = sum(float(scores[row.label]) for row, scores in zip(rows, task.scores(rows), strict=True))
    with torch.no_grad():
        loss = float(task(**task.collate(rows))["loss"])
    assert loss == pytest.approx(-likelihood / sum(lengths), abs=1e-4)


def test_an_encoder_answers_with_the_nearest_label(data):
    task = shaken("bert", "gelu", data)
    base, tokenizer = FAMILIES["bert"](), make_tokenizer()

    def embed(model, text):
        with torch.no_grad():
            hidden = model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0]
        return hidden.mean(dim=0).double()

    found = task.scores(data.test[:4])
    for row, scores in zip(data.test[:4], found, strict=True):
        text = embed(task.tuned.base, row.text)
        for label, score in zip(data.labels, scores, strict=True):
            vector = embed(base, label)
            assert float(score) == pytest.approx(20 * float(text @ vector / (text.norm() * vector.norm())), abs=1e-3)


def test_a_label_that_begins_another_is_refused():
    row = Labelled("t", 0)
    data = DataSet("d", "{text}", ("oil", "oil price"), [row], [Labelled("v", 0)], [Labelled("w", 1)])
    with pytest.raises(DataError, match="'oil' begin those of 'oil price'"):
        TextToText(tune(FAMILIES["llama"](), ZeroShotMethod(name="m")), make_tokenizer(), data)


def test_bases_that_cannot_be_studied_are_refused(monkeypatch):
    with pytest.raises(ModelError, match="encoder-decoder"):
        tune(FAMILIES["t5"](), ZeroShotMethod(name="m"))
    unknown = FAMILIES["llama"]()
    monkeypatch.setattr(type(unknown.config), "model_type", "never-heard-of")
    with pytest.raises(ConfigError, match="method 'm' does not fit LlamaForCausalLM: PEFT says"):
        tune(unknown, METHODS["attention"][0])
