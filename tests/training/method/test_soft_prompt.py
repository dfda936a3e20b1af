"""Soft prompts in front of models, against embeddings put together by hand, and against PEFT's prompt tuning."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.studies import write_letter_task
from helpers.tiny_models import DECODERS, FAMILIES, HIDDEN_SIZE, IMAGE_TOKEN, IMAGE_TOKENS, VOCAB_SIZE, llava, token_ids
from helpers.tiny_tokenizer import make_tokenizer
from transformers import TrainerCallback

from adalink.runtime.errors import AdapterError, ConfigError, ModelError, RequestError
from adalink.runtime.storage.adapter import AdapterConfig, make_adapter, read_adapter
from adalink.training.adapter_io import load_adapter, save_adapter, to_adapter
from adalink.training.data.batches import pad_decoder
from adalink.training.data.rows import TrainingRow, encode_rows
from adalink.training.loop.options import LoopOptions
from adalink.training.loop.trainer import TrainableAdapters
from adalink.training.method.attach import attach
from adalink.training.method.config import AdaLinkConfig
from adalink.training.models.loading import base_fingerprint, input_embedding
from adalink.training.run import train
from adalink.training.settings import TrainSettings

N = 5
SOFT = AdaLinkConfig(rank=0, activation="identity", soft_tokens=N)
BOTH = AdaLinkConfig(rank=4, activation="gelu", bias=True, soft_tokens=N)
ASKED = AdaLinkConfig(rank=4, activation="gelu", scope="prompt", soft_tokens=N)
CONFIGS = {"soft": SOFT, "both": BOTH, "asked": ASKED}
PROMPTS = [list(range(5, 17)), [9], [10, 11, 40], [12, 13, 14, 15, 16, 17, 18]]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_letter_task(tmp_path_factory.mktemp("work"), "ab", range(2, 9))


def disturb(attached):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in attached.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def by_hand(model, config, weights, ids, generated=0):
    """Embeddings of one row, ``(1, n + seq, d)``, from weights by name; the last ``generated`` tokens are no prompt."""
    x = input_embedding(model)(torch.tensor([ids])).detach()
    adapted = x
    if config.rank:
        w = {name.removeprefix("text."): torch.from_numpy(value) for name, value in weights.items()}
        hidden = torch.nn.functional.gelu(x @ w["down.weight"].T + w.get("down.bias", torch.zeros(())))
        adapted = x + hidden @ w["up.weight"].T + w.get("up.bias", torch.zeros(()))
    if config.scope == "prompt" and generated:
        adapted = torch.cat([adapted[:, :-generated], x[:, -generated:]], dim=1)
    return torch.cat([torch.from_numpy(weights["soft_prompt"])[None], adapted], dim=1)


@torch.no_grad()
def logits_by_hand(model, config, weights, ids, generated=0):
    """Of the caller's positions, one unpadded row alone: ``(seq, V)``, or the hidden states of an encoder."""
    out = model(inputs_embeds=by_hand(model, config, weights, ids, generated))
    return (out.logits if "logits" in out else out.last_hidden_state)[0, N:]


def padded(prompts, *, left):
    length = max(map(len, prompts))
    blank = [[0] * (length - len(prompt)) for prompt in prompts]
    ids = [b + p if left else p + b for p, b in zip(prompts, blank, strict=True)]
    mask = [b + [1] * len(p) if left else [1] * len(p) + b for p, b in zip(prompts, blank, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("family", DECODERS)
def test_a_padded_batch_is_each_row_by_hand(family, left):
    model, plain = FAMILIES[family](), FAMILIES[family]()
    ids, mask = padded(PROMPTS, left=left)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    with attach(model, BOTH) as attached, torch.no_grad():
        disturb(attached)
        weights = attached.weights()
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, output_hidden_states=True)
    assert out.logits.shape == (*ids.shape, VOCAB_SIZE)
    assert {tuple(states.shape) for states in out.hidden_states} == {(*ids.shape, HIDDEN_SIZE)}
    with torch.no_grad():
        unadapted = plain(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    for row, prompt in enumerate(PROMPTS):
        wanted = logits_by_hand(plain, BOTH, weights, prompt)
        torch.testing.assert_close(out.logits[row][mask[row] == 1], wanted, atol=2e-4, rtol=1e-4)
        assert (unadapted[row][mask[row] == 1] - wanted).abs().max() > 0.1


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_every_generated_step_is_by_hand(family, name):
    """Mixed lengths, padded on the left, with a cache; gemma3's window of 8 is shorter than the padding."""
    model, plain, config = FAMILIES[family](), FAMILIES[family](), CONFIGS[name]
    ids, mask = padded(PROMPTS, left=True)
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with attach(model, config) as attached:
        disturb(attached)
        weights = attached.weights()
        found = model.generate(
            input_ids=ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **options
        )
    assert found.sequences[:, : ids.shape[1]].tolist() == ids.tolist()
    replies = found.sequences[:, ids.shape[1] :].tolist()
    for row, (prompt, reply) in enumerate(zip(PROMPTS, replies, strict=True)):
        for step in range(9):
            wanted = logits_by_hand(plain, config, weights, prompt + reply[:step], step)[-1]
            torch.testing.assert_close(found.logits[step][row], wanted, atol=3e-4, rtol=1e-4)
            assert reply[step] == int(wanted.argmax())
        with torch.no_grad():
            assert (plain(torch.tensor([prompt])).logits[0, -1] - found.logits[0][row]).abs().max() > 0.1


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"use_cache": False}, {"prefill_chunk_size": 2}, {"prompt_lookup_num_tokens": 2}]
)
def test_other_ways_to_generate(options):
    model, plain = FAMILIES["llama"](), FAMILIES["llama"]()
    common = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with attach(model, SOFT) as attached:
        disturb(attached)
        weights = attached.weights()
        ids = torch.tensor(PROMPTS[:1])
        ours = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **common, **options)
    embeds = by_hand(plain, SOFT, weights, PROMPTS[0])
    beams = {"num_beams": options.get("num_beams", 1)}
    theirs = plain.generate(inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2]), **common, **beams)
    assert ours[0, ids.shape[1] :].tolist() == theirs[0, -6:].tolist()


@pytest.mark.parametrize("prompt", [2, 5, 9])
def test_a_map_of_positions_counts_the_callers_in_a_cache(prompt):
    """Twelve tokens in two calls: the map's columns are those of the tokens, whatever stands before them."""
    model, ids = FAMILIES["llama"](), PROMPTS[0]
    with attach(model, ASKED) as attached:
        disturb(attached)
        mask = torch.arange(len(ids))[None] < prompt
        with torch.no_grad(), attached.positions(prompt_mask=mask):
            first = model(input_ids=torch.tensor([ids[:4]]), use_cache=True)
            second = model(input_ids=torch.tensor([ids[4:]]), past_key_values=first.past_key_values)
        weights = attached.weights()
    wanted = logits_by_hand(model, ASKED, weights, ids, generated=len(ids) - prompt)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], dim=1)[0], wanted, atol=2e-4, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_peft_gives_the_same(family):
    from peft import PromptTuningConfig, get_peft_model

    model, base = FAMILIES[family](), FAMILIES[family]()
    peft_model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N)).eval()
    ids = token_ids(4)
    mask = torch.ones_like(ids)
    with attach(model, SOFT) as attached, torch.no_grad():
        disturb(attached)
        peft_model.prompt_encoder["default"].embedding.weight.copy_(attached.adapters.soft_prompt)
        ours = model(input_ids=ids, attention_mask=mask).logits
        theirs = peft_model(input_ids=ids, attention_mask=mask).logits[:, N:]
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": 2, "pad_token_id": 2}
        generated = model.generate(input_ids=ids, attention_mask=mask, **options)
        assert generated.tolist() == peft_model.generate(input_ids=ids, attention_mask=mask, **options).tolist()


def test_an_encoder_gives_the_callers_positions():
    model, plain = FAMILIES["bert"](), FAMILIES["bert"]()
    ids, mask = padded(PROMPTS, left=False)
    with attach(model, BOTH) as attached, torch.no_grad():
        disturb(attached)
        weights = attached.weights()
        out = model(ids, mask, torch.zeros_like(ids))  # token types, by position
        hidden, pooled = model(input_ids=ids, attention_mask=mask, return_dict=False)
    assert out.last_hidden_state.shape == (*ids.shape, HIDDEN_SIZE)
    torch.testing.assert_close(hidden, out.last_hidden_state)
    torch.testing.assert_close(pooled, out.pooler_output)
    for row, prompt in enumerate(PROMPTS):
        wanted = logits_by_hand(plain, BOTH, weights, prompt)
        torch.testing.assert_close(out.last_hidden_state[row][mask[row] == 1], wanted, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(out.pooler_output[row], torch.tanh(plain.pooler.dense(wanted[0])).detach())


def test_a_soft_prompt_is_of_the_first_text():
    """Token types of the caller's columns, and 0 for the soft prompt before them."""
    model, plain = FAMILIES["bert"](), FAMILIES["bert"]()
    ids, types = torch.tensor([[5, 9, 33, 41, 7]]), torch.tensor([[0, 0, 1, 1, 1]])
    with attach(model, SOFT) as attached, torch.no_grad():
        disturb(attached)
        out = model(input_ids=ids, token_type_ids=types).last_hidden_state
        soft = torch.tensor(attached.weights()["soft_prompt"])[None]
        embeds = torch.cat([soft, plain.get_input_embeddings()(ids)], dim=1)
        count = soft.shape[1]
        for first, is_right in ((0, True), (1, False)):
            every = torch.cat([torch.full((1, count), first), types], dim=1)
            expected = plain(inputs_embeds=embeds, token_type_ids=every).last_hidden_state[:, count:]
            assert torch.allclose(out, expected, atol=1e-5, rtol=1e-5) == is_right


@pytest.mark.parametrize("config", [SOFT, ASKED])
def test_the_loss_and_its_gradient_are_those_by_hand(config):
    model, plain, tokenizer = FAMILIES["llama"](), FAMILIES["llama"](), make_tokenizer()
    examples = encode_rows(
        [TrainingRow("abcab", "x"), TrainingRow("bb", "yzz"), TrainingRow("c", "y")], tokenizer, 24, "rows"
    )
    with attach(model, config) as attached:
        disturb(attached)
        weights = attached.weights()
        loss = TrainableAdapters(attached)(**pad_decoder(examples, pad=2))["loss"]
        loss.backward()
        gradient = attached.adapters.soft_prompt.grad
        assert not [name for name, parameter in model.named_parameters() if parameter.grad is not None]
        batch = pad_decoder(examples, pad=2)
        batch["labels"][:, 0] = -100
        of_model = model(**batch).loss.detach()  # the caller's labels, as transformers counts them
    soft = torch.from_numpy(weights["soft_prompt"]).requires_grad_()
    total, count = torch.zeros(()), 0
    for example in examples:
        ids, target = example.prompt + example.target, example.target
        adapted = by_hand(plain, config, weights, ids, len(target))[:, N:]
        likely = plain(inputs_embeds=torch.cat([soft[None], adapted], dim=1)).logits[0, N:].log_softmax(dim=-1)
        for place, token in enumerate(target):
            total = total - likely[len(example.prompt) - 1 + place, token]
            count += 1
    (total / count).backward()
    assert float(loss.detach()) == pytest.approx(float(total.detach()) / count, abs=1e-4)
    assert float(of_model) == pytest.approx(float(loss.detach()), abs=1e-4)
    torch.testing.assert_close(gradient, soft.grad, atol=1e-4, rtol=1e-3)


def test_before_images_too():
    model, plain = llava(), llava()
    prompt = [7, *[IMAGE_TOKEN] * IMAGE_TOKENS, 8, 9]
    pixels = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(3))
    config = AdaLinkConfig(rank=4, modalities=("text", "image"), soft_tokens=N)
    with attach(model, config) as attached, torch.no_grad():
        disturb(attached)
        found = model(input_ids=torch.tensor([prompt]), pixel_values=pixels, attention_mask=torch.ones(1, 12)).logits
        text, image = attached.adapters["text"], attached.adapters["image"]
        soft = attached.adapters.soft_prompt
        states = plain.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        seen = image(plain.model.multi_modal_projector(states[plain.config.vision_feature_layer][:, 1:]))
        embeds = text(plain.get_input_embeddings()(torch.tensor([prompt])))
        embeds[0, 1 : 1 + IMAGE_TOKENS] = seen[0]
        hidden = plain.model.language_model(inputs_embeds=torch.cat([soft[None], embeds], dim=1)).last_hidden_state
        torch.testing.assert_close(found, plain.lm_head(hidden)[:, N:], atol=1e-4, rtol=1e-4)


def test_starts_from_tokens_embeddings_and_goes_without_a_trace():
    model, plain = FAMILIES["gemma3"](), FAMILIES["gemma3"]()
    every = input_embedding(plain)(torch.arange(VOCAB_SIZE)).detach()  # as the engine takes them: gemma3 scales
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        with attach(model, SOFT) as attached:
            drawn.append(attached.adapters.soft_prompt.detach().clone())
            assert sum(parameter.numel() for parameter in attached.parameters()) == N * HIDDEN_SIZE
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert all(any(torch.equal(vector, row) for row in every) for vector in drawn[0])
    ids = token_ids(4)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_cannot_be_made_right_is_refused():
    with pytest.raises(ModelError, match="encoder-decoder, which takes no soft prompt"):
        attach(FAMILIES["t5"](), SOFT)
    model, plain = FAMILIES["llama"](), FAMILIES["llama"]()
    with attach(model, SOFT):
        ids = token_ids(4, rows=1)
        mask = torch.ones_like(ids)
        options = {"max_new_tokens": 3, "pad_token_id": 0, "do_sample": False, "eos_token_id": None}
        with pytest.raises(RequestError, match="there is such a cache, which knows of no soft prompt"):
            model.generate(input_ids=ids, attention_mask=mask, cache_implementation="static", **options)
        for known in ({"attention_mask": torch.ones(1, 8)}, {"position_ids": torch.tensor([[7]])}):
            cache = model(input_ids=ids, use_cache=True).past_key_values
            model(input_ids=ids[:, :1], past_key_values=cache, **known)
            cache = plain(input_ids=ids, use_cache=True).past_key_values  # seven tokens and no soft prompt
            with pytest.raises(RequestError, match="holds 7 positions and the call brings 1, expected 13 in all"):
                model(input_ids=ids[:, :1], past_key_values=cache, **known)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rank": 0}, "rank is 0, expected a whole number of at least 1, .*; 0 is for adapters with a soft prompt"),
        (
            {"rank": 0, "soft_tokens": 2, "activation": "gelu"},
            "a soft prompt, KV prefix or head alone has activation 'identity' and no bias",
        ),
        ({"rank": 0, "soft_tokens": 2, "activation": "identity", "bias": True}, "no bias"),
        ({"soft_tokens": -1}, "soft_tokens is -1"),
        ({"soft_tokens": 5000}, "soft_tokens is 5000, expected a whole number from 0 to 4096"),
    ],
)
def test_config_refuses(wrong, message):
    with pytest.raises(ConfigError, match=message):
        AdaLinkConfig(**wrong)


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_and_loaded_it_computes_the_same(name, tmp_path):
    model, ids = FAMILIES["llama"](), token_ids(4)
    with attach(model, CONFIGS[name]) as attached, torch.no_grad():
        disturb(attached)
        before = model(input_ids=ids).logits
        adapter = to_adapter(attached, "tiny")
    save_adapter(tmp_path / "adapter", adapter)
    assert read_adapter(tmp_path / "adapter").digest == adapter.digest
    assert adapter.weights["soft_prompt"].shape == (N, HIDDEN_SIZE)
    assert len(adapter.weights) == {"soft": 1, "both": 5, "asked": 3}[name]
    with load_adapter(tmp_path / "adapter", model), torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, before)


def test_a_table_of_ids_is_not_loaded_as_a_bottleneck(tmp_path):
    model = FAMILIES["llama"]()
    config = AdapterConfig(
        base_model_name_or_path="tiny", base_fingerprint=base_fingerprint(model), hidden_size=HIDDEN_SIZE, rank=2,
        activation="identity", bias=False, modalities=("text",), scope="all", input="ids",
    )  # fmt: skip
    weights = {"text.table.weight": torch.ones(VOCAB_SIZE, 2).numpy(), "text.up.weight": torch.ones(48, 2).numpy()}
    save_adapter(tmp_path / "adapter", make_adapter(config, weights))
    with pytest.raises(AdapterError, match="has a table of token ids"):
        load_adapter(tmp_path / "adapter", model)


def test_the_command_trains_one(files, tmp_path):
    from click.testing import CliRunner

    from adalink.tools.cli import main

    base, rows, _ = map(str, files)
    where = ["--base", base, "--data", rows, "--eval", rows, "--out", str(tmp_path / "out")]
    options = ["--rank", "0", "--soft-tokens", "4", "--lr", "0.3", "--max-steps", "60", "--device", "cpu", "--json"]
    done = CliRunner().invoke(main, ["train", *where, *options], catch_exceptions=False)
    assert done.exit_code == 0
    report = json.loads(done.stdout)
    config = read_adapter(tmp_path / "out").config
    assert (config.rank, config.soft_tokens, config.activation) == (0, 4, "identity")
    assert report["loss_curve"][-1]["loss"] < 0.5 * report["loss_curve"][0]["loss"]
    assert report["exact_match"]["adapter"] > report["exact_match"]["base"]


def test_interrupted_and_resumed_is_as_uninterrupted(files, tmp_path):
    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 7:
                raise KeyboardInterrupt

    config = AdaLinkConfig(rank=4, soft_tokens=3)
    settings = TrainSettings(lr=2e-2, max_steps=12, batch_size=4, max_length=24, seed=3, device="cpu", save_steps=5)
    whole = train(*files, tmp_path / "whole", config, settings)
    with pytest.raises(KeyboardInterrupt):
        train(*files, tmp_path / "parts", config, settings, loop=LoopOptions(callbacks=[Interrupt()]))
    parts = train(*files, tmp_path / "parts", config, settings, loop=LoopOptions(resume=True))
    assert parts["adapter_digest"] == whole["adapter_digest"]
