"""Measure the example adapters against the unadapted base and its best zero-shot prompt, on test rows.

    python -m examples.make_data --out build/examples
    python -m examples.evaluate reuters-r8 --base MODEL --data build/examples --out build/examples/reuters-r8.json

The adapter is scored by exact match: greedy generation until the end token must give the label and nothing else. The
base gets every prompt wording below, plain and in its chat template, and easier rules: ``starts`` accepts a reply that
begins with the label or another name for it (case aside), whatever follows; ``likelihood`` picks the most probable
label, so that the base cannot answer outside the labels; ``calibrated`` does so after taking away each label's mean
log-probability over the rows, so that a label it likes everywhere gains nothing.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from adalink.runtime.storage.adapter import read_adapter
from adalink.runtime.storage.digest import digest_file
from adalink.training.adapter_io import load_adapter
from adalink.training.data.rows import TrainingRow, encode_rows, end_token, read_rows
from adalink.training.evaluation import exact_match
from adalink.training.models.loading import load_base, load_tokenizer
from examples.make_data import draw, text_of

BATCH_ROWS = 16
REPLY_TOKENS = 3
MAX_LENGTH = 128

TOPICS = "acquisition, oil, earnings, grain, interest, currency, shipping, trade"
# {prompt} is the adapter's own prompt, {text} the text in it.
WORDINGS: dict[str, list[str]] = {
    "reuters-r8": [
        "{prompt}",
        "Classify the news article into one of these topics: " + TOPICS + ".\n\nArticle: {text}\nTopic:",
        "Question: What is this article about? Choose one: " + TOPICS + ".\n\nArticle: {text}\nAnswer:",
        "{text}\n\nThe topic of this Reuters news story (" + TOPICS + ") is",
    ],
    "tweet-author": [
        "{prompt}",
        "Who wrote this tweet, Clinton or Trump?\n\nTweet: {text}\nAuthor:",
        'The tweet "{text}" was posted in 2016 by one of the candidates Clinton and Trump. The author is',
        "Question: Which candidate posted this tweet in 2016? Choose one: Trump, Clinton.\n\nTweet: {text}\nAnswer:",
    ],
}

# Other words for a label that count as well in a zero-shot answer.
ALIASES = {"Clinton": ["Hillary Clinton"], "Trump": ["Donald Trump"]}


def render(tokenizer: Any, wording: str, row: TrainingRow, chat: bool) -> list[int]:
    """Token ids of one zero-shot question."""
    question = wording.format(prompt=row.prompt, text=text_of(row.prompt))
    if not chat:
        return list(tokenizer(question)["input_ids"])
    message = [{"role": "user", "content": question}]
    rendered = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])


def step(model: Any, tokens: torch.Tensor, mask: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
    """Log-probabilities after ``tokens``, ``(rows, vocab)``, and the cache; ``mask`` covers cache and tokens."""
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
    output = model(
        input_ids=tokens,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1].float().log_softmax(dim=-1), output.past_key_values


@torch.inference_mode()
def answer(
    model: Any, start: list[int], prompts: list[list[int]], labels: list[list[int]], pad: int
) -> tuple[torch.Tensor, list[list[int]]]:
    """Log-probability of each label, ``(prompts, labels)``, and a short greedy reply for each prompt.

    ``start`` begins every prompt and is computed once.
    """
    rests = [prompt[len(start) :] for prompt in prompts]
    length = max(len(rest) for rest in rests)
    ids = torch.tensor([[pad] * (length - len(rest)) + rest for rest in rests])
    mask = torch.tensor([[1] * len(start) + [0] * (length - len(rest)) + [1] * len(rest) for rest in rests])
    more = torch.ones(len(prompts), 1, dtype=mask.dtype)
    cache = None
    if start:
        _, cache = step(model, torch.tensor([start]), torch.ones(1, len(start), dtype=mask.dtype), None)
        cache.batch_repeat_interleave(len(prompts))
    first, cache = step(model, ids, mask, cache)
    scores = []
    for label in labels:
        score = first[:, label[0]].clone()
        branch_mask, branch = mask, copy.deepcopy(cache) if len(label) > 1 else None
        for token, following in itertools.pairwise(label):
            branch_mask = torch.cat([branch_mask, more], dim=1)
            logits, branch = step(model, torch.full((len(prompts), 1), token), branch_mask, branch)
            score += logits[:, following]
        scores.append(score)
    replies = [first.argmax(dim=-1, keepdim=True)]
    for _ in range(REPLY_TOKENS - 1):
        mask = torch.cat([mask, more], dim=1)
        logits, cache = step(model, replies[-1], mask, cache)
        replies.append(logits.argmax(dim=-1, keepdim=True))
    return torch.stack(scores, dim=1), torch.cat(replies, dim=1).tolist()


def zero_shot(
    model: Any, tokenizer: Any, rows: list[TrainingRow], wording: str, chat: bool, names: list[str]
) -> dict[str, Any]:
    """Accuracy of the unadapted base with one wording, by every rule."""
    answers = [(name, word) for name in names for word in [name, *ALIASES.get(name, [])]]
    labels = [tokenizer(word if chat else f" {word}", add_special_tokens=False)["input_ids"] for _, word in answers]
    prompts = [render(tokenizer, wording, row, chat) for row in rows]
    order = sorted(range(len(rows)), key=lambda index: len(prompts[index]))
    expected = [rows[index].completion.strip() for index in order]
    shared = [ids[0] for ids in itertools.takewhile(lambda ids: len(set(ids)) == 1, zip(*prompts, strict=False))]
    scores, replies = [], []
    for start in range(0, len(order), BATCH_ROWS):
        chosen = order[start : start + BATCH_ROWS]
        batch = [prompts[index] for index in chosen]
        batch_scores, batch_replies = answer(model, shared, batch, labels, end_token(tokenizer))
        scores.append(batch_scores)
        replies += [tokenizer.decode(reply, skip_special_tokens=True) for reply in batch_replies]
    table = torch.cat(scores)
    likely = [answers[index][0] for index in table.argmax(dim=1).tolist()]
    calibrated = [answers[index][0] for index in (table - table.mean(dim=0)).argmax(dim=1).tolist()]
    starts = [
        reply.strip(" \n\"'*").lower().startswith(tuple(word.lower() for name, word in answers if name == label))
        for reply, label in zip(replies, expected, strict=True)
    ]
    return {
        "wording": wording,
        "chat": chat,
        "starts": sum(starts) / len(rows),
        "likelihood": sum(map(str.__eq__, likely, expected)) / len(rows),
        "calibrated": sum(map(str.__eq__, calibrated, expected)) / len(rows),
        "reply": replies[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("task", choices=sorted(WORDINGS))
    parser.add_argument("--base", required=True, help="SmolLM2-135M-Instruct: folder, GGUF file or hub id")
    parser.add_argument("--data", type=Path, default=Path("build/examples"), help="folder that make_data.py wrote")
    parser.add_argument("--adapter", type=Path, help="default: examples/adapters/TASK")
    parser.add_argument("--rows", type=int, default=0, help="test rows for the adapter, drawn with a seed; 0 for all")
    parser.add_argument("--zero-shot-rows", type=int, default=500, help="test rows for the zero-shot prompts")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the figures")
    options = parser.parse_args()
    test = read_rows(options.data / options.task / "test.jsonl")
    names = sorted({row.completion.strip() for row in test})
    model, tokenizer = load_base(options.base), load_tokenizer(options.base)
    rows, sample = draw(test, options.rows), draw(test, options.zero_shot_rows)
    folder = options.adapter or Path(__file__).parent / "adapters" / options.task
    with load_adapter(folder, model):
        accuracy = exact_match(model, tokenizer, encode_rows(rows, tokenizer, MAX_LENGTH, "test.jsonl"), BATCH_ROWS)
        same = exact_match(model, tokenizer, encode_rows(sample, tokenizer, MAX_LENGTH, "test.jsonl"), BATCH_ROWS)
    majority = max(sum(row.completion.strip() == name for row in rows) for name in names) / len(rows)
    figures: dict[str, Any] = {
        "task": options.task,
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "test_digest": digest_file(options.data / options.task / "test.jsonl"),
        "adapter": {
            "digest": read_adapter(folder).digest,
            "rows": len(rows),
            "exact_match": accuracy,
            "exact_match_on_zero_shot_rows": same,
        },
        "majority_label": majority,
        "zero_shot": {"rows": len(sample), "prompts": []},
    }
    print(json.dumps(figures), flush=True)
    for chat in (False, True):
        for wording in WORDINGS[options.task]:
            result = zero_shot(model, tokenizer, sample, wording, chat, names)
            figures["zero_shot"]["prompts"].append(result)
            print(json.dumps(result), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
