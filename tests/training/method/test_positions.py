"""Which positions are adapted: the scope in training and in generation, and the map of modalities."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_models import DECODERS, FAMILIES, token_ids

from adalink.runtime.errors import RequestError
from adalink.training.method.attach import attach
from adalink.training.method.config import AdaLinkConfig
from adalink.training.models.loading import input_embedding

PROMPT = AdaLinkConfig(rank=4, bias=True, scope="prompt")
EVERYWHERE = AdaLinkConfig(rank=4, bias=True, scope="all")
TWO = AdaLinkConfig(rank=4, bias=True, modalities=("text", "vision"))


def disturb(attached, seed=5):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in attached.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def embeddings_seen(attached, call):
    """What the model gets for embeddings in ``call``: one tensor a forward pass."""
    seen = []
    handle = input_embedding(attached.model).register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        call()
    handle.remove()
    return seen


def logits_of(model, embeds):
    with torch.no_grad():
        return model(inputs_embeds=embeds).logits


def table_rows(attached, ids):
    """Plain and adapted embeddings of ``ids``, computed outside the model's forward pass."""
    embedding = input_embedding(attached.model)
    with torch.no_grad():
        attached.detach()
        plain = embedding(ids)
        return plain, attached.adapters["text"](plain)


def greedy_by_hand(model, prompt, adapter, scope, steps=8, end=2):
    """Greedy tokens, never the end token, by whole-sequence passes over embeddings: no cache, no hooks."""
    ids = prompt.clone()
    embedding = input_embedding(model)
    for _ in range(steps):
        with torch.no_grad():
            plain = embedding(ids)
            adapted = adapter(plain)
            if scope == "prompt":
                adapted[:, prompt.shape[1] :] = plain[:, prompt.shape[1] :]
            scores = model(inputs_embeds=adapted).logits[:, -1]
            scores[:, end] = -torch.inf
        ids = torch.cat([ids, scores.argmax(dim=-1, keepdim=True)], dim=1)
    return ids


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("config", [PROMPT, EVERYWHERE], ids=lambda config: config.scope)
def test_generation_adapts_what_the_scope_says(family, config):
    model = DECODERS[family]()
    prompt = token_ids(seed=2)
    with attach(model, config) as attached:
        disturb(attached)
        got = model.generate(prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False)
        adapter = attached.adapters["text"]
    wanted = greedy_by_hand(model, prompt, adapter, config.scope)
    assert torch.equal(got, wanted)


def test_scopes_give_different_generations():
    model = DECODERS["llama"]()
    prompt = token_ids(seed=2)
    with attach(model, PROMPT) as attached:
        disturb(attached)
        adapter = attached.adapters["text"]
    one = greedy_by_hand(model, prompt, adapter, "prompt")
    other = greedy_by_hand(model, prompt, adapter, "all")
    assert not torch.equal(one, other)


def test_generation_without_cache_needs_and_heeds_the_prompt_mask():
    model = DECODERS["llama"]()
    prompt = token_ids(seed=2)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "use_cache": False}
    with attach(model, PROMPT) as attached:
        disturb(attached)
        with attached.positions(prompt_mask=torch.ones_like(prompt, dtype=torch.bool)):
            got = model.generate(prompt, **options)
        adapter = attached.adapters["text"]
    assert torch.equal(got, greedy_by_hand(model, prompt, adapter, "prompt"))


@pytest.mark.parametrize("family", DECODERS)
def test_labels_end_the_prompt_at_the_first_target(family):
    model = DECODERS[family]()
    ids = token_ids(seed=2)
    labels = ids.clone()
    labels[0, :4], labels[1, :2], labels[2, :] = -100, -100, -100
    labels[1, 4] = -100  # a gap within the target is target all the same
    with attach(model, PROMPT) as attached:
        disturb(attached)
        with torch.no_grad():
            got = model(input_ids=ids, labels=labels).logits
            without = model(input_ids=ids).logits
    plain, adapted = table_rows(attached, ids)
    wanted = adapted.clone()
    wanted[0, 4:], wanted[1, 2:] = plain[0, 4:], plain[1, 2:]
    torch.testing.assert_close(got, logits_of(model, wanted), rtol=0, atol=1e-5)
    torch.testing.assert_close(without, logits_of(model, adapted), rtol=0, atol=1e-5)
    assert (got - without).abs().max() > 0.05


def test_scope_all_heeds_no_labels():
    model = DECODERS["llama"]()
    ids = token_ids(seed=2)
    with attach(model, EVERYWHERE) as attached, torch.no_grad():
        disturb(attached)
        assert torch.equal(model(input_ids=ids, labels=ids).logits, model(input_ids=ids).logits)


def test_unadapted_positions_pass_through_bit_for_bit():
    model = DECODERS["gemma3"]()
    ids = token_ids(seed=2)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[0, 1:3] = True
    with attach(model, PROMPT) as attached:
        disturb(attached)
        with attached.positions(prompt_mask=mask):
            (seen,) = embeddings_seen(attached, lambda: model(input_ids=ids))
    plain, adapted = table_rows(attached, ids)
    assert torch.equal(seen[~mask], plain[~mask])
    assert torch.equal(seen[mask], adapted[mask])
    assert (plain - adapted)[mask].abs().min() > 0


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_modality_map_picks_the_weights(family):
    model = FAMILIES[family]()
    ids = token_ids(seed=2)
    which = torch.randint(-1, 2, ids.shape, generator=torch.Generator().manual_seed(4))
    assert set(which.unique().tolist()) == {-1, 0, 1}
    with attach(model, TWO) as attached:
        disturb(attached)
        with attached.positions(modality=which):
            (seen,) = embeddings_seen(attached, lambda: model(input_ids=ids))
    plain = input_embedding(model)(ids)
    for index, name in enumerate(TWO.modalities):
        assert torch.equal(seen[which == index], attached.adapters[name](plain)[which == index])
    assert torch.equal(seen[which == -1], plain[which == -1])
    assert (attached.adapters["text"](plain) - attached.adapters["vision"](plain)).abs().min() > 0


def test_one_modality_with_a_map():
    model = DECODERS["llama"]()
    ids = token_ids(seed=2)
    which = torch.full_like(ids, -1)
    which[:, 2] = 0
    with attach(model, EVERYWHERE) as attached:
        disturb(attached)
        with attached.positions(modality=which):
            (seen,) = embeddings_seen(attached, lambda: model(input_ids=ids))
    plain, adapted = table_rows(attached, ids)
    assert torch.equal(seen, torch.where((which == 0).unsqueeze(-1), adapted, plain))


def test_generated_tokens_are_text():
    model = DECODERS["llama"]()
    prompt = token_ids(seed=2)
    with attach(model, TWO) as attached:
        disturb(attached)
        with attached.positions(modality=torch.ones_like(prompt)):
            seen = embeddings_seen(attached, lambda: model.generate(prompt, max_new_tokens=4, min_new_tokens=4))
            generated = model.generate(prompt, max_new_tokens=4, min_new_tokens=4)[:, prompt.shape[1] :]
    embedding = input_embedding(model)
    assert len(seen) == 4
    assert torch.equal(seen[0], attached.adapters["vision"](embedding(prompt)))
    for step, embeds in enumerate(seen[1:]):
        wanted = attached.adapters["text"](embedding(generated[:, step : step + 1]))
        torch.testing.assert_close(embeds, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"modality": torch.zeros(3, 7)}, r"dtype torch.float32, expected torch.int64"),
        ({"modality": torch.full((3, 7), 2)}, r"holds 2 to 2, expected -1 to 1"),
        ({"modality": torch.full((3, 7), -2)}, r"holds -2 to -2"),
        ({"modality": torch.zeros(2, 7, dtype=torch.int64)}, r"has 2 rows and the batch 3"),
        ({"prompt_mask": torch.ones(3, 7)}, r"expected torch.bool"),
        ({}, r"no map says which position is which"),
    ],
)
def test_wrong_maps_are_refused(arguments, message):
    model = DECODERS["llama"]()
    with attach(model, TWO) as attached:

        def call():
            with attached.positions(**arguments):
                model(input_ids=token_ids(seed=2))

        with pytest.raises(RequestError, match=message):
            call()


def test_a_map_holds_within_its_block_and_the_one_around_it_after():
    model, prompt = DECODERS["llama"](), token_ids(seed=4)
    outer = torch.arange(prompt.shape[1]).expand(len(prompt), -1) < 3
    with attach(model, AdaLinkConfig(rank=4, scope="prompt")) as attached, torch.no_grad():
        disturb(attached)
        whole = model(prompt).logits
        with attached.positions(prompt_mask=outer):
            part = model(prompt).logits
            with attached.positions(prompt_mask=torch.zeros_like(outer)):
                assert not torch.equal(model(prompt).logits, part)
            assert torch.equal(model(prompt).logits, part)
        assert torch.equal(model(prompt).logits, whole)
        assert not torch.equal(part, whole)
