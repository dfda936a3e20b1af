"""Greedy replies, and which of them count: against single rows, and tokens chosen one by one."""

from __future__ import annotations

import random

import pytest
import torch
from helpers.tiny_models import FAMILIES, MAX_POSITIONS
from helpers.tiny_tokenizer import make_tokenizer
from helpers.vision_families import disturb

from adalink.training.data.rows import Example
from adalink.training.evaluation import exact_match, greedy_tokens
from adalink.training.method.attach import attach
from adalink.training.method.config import AdaLinkConfig


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_batched_replies_are_those_of_single_rows(family):
    model = FAMILIES[family]()
    prompts = [[5, 6, 7, 8], [9], [10, 11], [12, 13, 14]]
    batched = greedy_tokens(model, prompts, end=2, max_new_tokens=6, batch_size=3)
    assert batched == [greedy_tokens(model, [prompt], 2, 6, 1)[0] for prompt in prompts]
    assert all(0 < len(reply) <= 6 for reply in batched)


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize(
    "setting",
    [
        {"repetition_penalty": 1.5},
        {"num_beams": 4},
        {"no_repeat_ngram_size": 1},
        {"min_new_tokens": 6},
        {"suppress_tokens": list(range(3, 50))},
        {"use_cache": False},
    ],
)
def test_replies_are_greedy_whatever_the_checkpoint_says(family, setting):
    model = FAMILIES[family]()
    prompts = [[5, 6, 7, 8], [9], [10, 11], [12, 13, 14]]
    with attach(model, AdaLinkConfig(rank=4, scope="prompt")) as attached:
        disturb(attached)
        attached.adapters.eval()
        plain = greedy_tokens(model, prompts, 2, 8, 2)
        for prompt, reply in zip(prompts, plain, strict=True):  # the highest logit each time, with no generate
            assert reply == by_hand(model, prompt, len(reply))
        own = model.generation_config
        own.update(**setting)
        before = own.to_dict()
        assert greedy_tokens(model, prompts, 2, 8, 2) == plain
    assert model.generation_config is own
    assert own.to_dict() == before


def by_hand(model, prompt, count):
    """The tokens with the highest logit, one after the other; only the prompt is adapted."""
    ids, made = torch.tensor([prompt]), []
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            encoded = model.get_encoder()(input_ids=ids)
            for _ in range(count):
                logits = model(encoder_outputs=encoded, decoder_input_ids=torch.tensor([[0, *made]])).logits
                made.append(int(logits[0, -1].argmax()))
            return made
        output = model(input_ids=ids, use_cache=True)
        while True:
            made.append(int(output.logits[0, -1].argmax()))
            if len(made) == count:
                return made
            output = model(input_ids=torch.tensor([made[-1:]]), past_key_values=output.past_key_values, use_cache=True)


def test_exact_match_wants_the_text_and_then_the_end():
    model, tokenizer = FAMILIES["llama"](), make_tokenizer()
    end = tokenizer.eos_token_id
    prompts = [[token, 96 - token] for token in range(4, 92)]
    replies = greedy_tokens(model, prompts, end, 12, 16)
    ended = [Example(p, r) for p, r in zip(prompts, replies, strict=True) if r[-1] == end and len(r) > 1]
    endless = [Example(p, [*r, end]) for p, r in zip(prompts, replies, strict=True) if end not in r]
    assert len(ended) > 1
    assert len(endless) > 1
    assert exact_match(model, tokenizer, ended, 8) == 1.0
    assert exact_match(model, tokenizer, [Example(e.prompt, [*e.target[:-1], 40, end]) for e in ended], 8) == 0.0
    cut = [Example(e.prompt, [*e.target[:-2], end]) for e in endless]
    assert exact_match(model, tokenizer, cut, 8) == 0.0  # the right beginning, but the model goes on


def test_replies_of_rows_that_nearly_fill_the_positions_are_those_of_single_rows():
    model, tokenizer = FAMILIES["gpt2"](), make_tokenizer()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(63)  # one that this model often says
    end, draw = tokenizer.eos_token_id, random.Random(3)
    prompts = [[draw.randrange(4, 96) for _ in range(length)] for length in (3, 40, 55, 58) for _ in range(20)]
    replies = [greedy_tokens(model, [prompt], end, MAX_POSITIONS - len(prompt), 1)[0] for prompt in prompts]
    ended = [Example(p, r) for p, r in zip(prompts, replies, strict=True) if r[-1] == end and len(r) > 1]
    assert {len(example.prompt) for example in ended} == {3, 40, 55, 58}
    assert max(len(example.target) for example in ended) > 40
    assert exact_match(model, tokenizer, ended, 8) == 1.0


@pytest.mark.parametrize("room", [9, 8, 7])
def test_a_row_with_just_the_room_for_the_longest_target_is_answered(room):
    """The longest target has eight tokens; what leaves less room is gone on with as far as it can be."""
    model, tokenizer, draw = FAMILIES["gpt2"](), make_tokenizer(), random.Random(room)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(63)  # one that this model often says
    end, reply = tokenizer.eos_token_id, [0]
    while reply[-1] != end or len(reply) < 2:
        prompt = [draw.randrange(4, 96) for _ in range(MAX_POSITIONS - room)]
        (reply,) = greedy_tokens(model, [prompt], end, min(room, 8), 1)
    wrong = Example([9, 10, 11], [40] * 7 + [end])
    assert exact_match(model, tokenizer, [wrong, Example(prompt, reply)], 2) == 0.5
