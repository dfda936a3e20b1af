"""Attaching to every family: where the adapter acts, what it leaves alone, and that it goes without a trace."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_models import DECODERS, FAMILIES, token_ids

from adalink.runtime.errors import ConfigError, ModelError
from adalink.training.method.attach import attach
from adalink.training.method.config import AdaLinkConfig
from adalink.training.models.loading import input_embedding

CONFIG = AdaLinkConfig(rank=4, activation="gelu", bias=True)


def run(model, ids, **kwargs):
    """Logits, or the last hidden state, of shape ``(batch, seq, ...)``."""
    if model.config.is_encoder_decoder:
        kwargs.setdefault("decoder_input_ids", token_ids(seed=77, rows=len(ids)))
    with torch.no_grad():
        output = model(input_ids=ids, **kwargs)
    return output.logits if "logits" in output else output.last_hidden_state


def disturb(attached, seed=5):
    """Give every weight of the adapters a seeded value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in attached.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def by_embeddings(model, ids, adapter):
    """The same computation another way: embed, adapt, and give the model ``inputs_embeds``."""
    source = model.get_encoder() if model.config.is_encoder_decoder else model
    with torch.no_grad():
        adapted = adapter(input_embedding(source)(ids))
        kwargs = {"decoder_input_ids": token_ids(77, len(ids))} if model.config.is_encoder_decoder else {}
        output = model(inputs_embeds=adapted, **kwargs)
    return output.logits if "logits" in output else output.last_hidden_state


@pytest.fixture(params=FAMILIES)
def model(request):
    return FAMILIES[request.param]()


def test_fresh_adapter_changes_no_bit(model):
    ids = token_ids(seed=1)
    plain = run(model, ids)
    with attach(model, CONFIG):
        assert torch.equal(run(model, ids), plain)


def test_acts_on_the_embeddings_and_nowhere_else(model):
    ids = token_ids(seed=1)
    plain = run(model, ids)
    with attach(model, CONFIG) as attached:
        disturb(attached)
        adapted = run(model, ids)
    expected = by_embeddings(model, ids, attached.adapters["text"])
    torch.testing.assert_close(adapted, expected, rtol=0, atol=1e-5)
    assert (adapted - plain).abs().max() > 0.05


def test_detach_leaves_no_trace(model):
    ids = token_ids(seed=1)
    next(iter(model.parameters())).requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    plain = run(model, ids)
    attached = attach(model, CONFIG)
    disturb(attached)
    assert not torch.equal(run(model, ids), plain)
    attached.detach()
    attached.detach()
    assert torch.equal(run(model, ids), plain)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_only_the_adapter_learns(model):
    ids = token_ids(seed=1)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    kwargs = {"decoder_input_ids": token_ids(77)} if model.config.is_encoder_decoder else {}
    with attach(model, CONFIG) as attached:
        disturb(attached)
        output = model(input_ids=ids, **kwargs)
        (output.logits if "logits" in output else output.last_hidden_state).square().mean().backward()
        assert all(parameter.grad is None for parameter in model.parameters())
        assert all(parameter.grad.abs().max() > 0 for parameter in attached.parameters())
        torch.optim.SGD(attached.parameters(), lr=0.1).step()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_tied_head_reads_the_unadapted_matrix(family):
    model = DECODERS[family]()
    ids = token_ids(seed=1)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    with attach(model, CONFIG) as attached:
        disturb(attached)
        with torch.no_grad():
            output = model(input_ids=ids, output_hidden_states=True)
            table = model.get_input_embeddings().weight
            moved = attached.adapters["text"](table)
    last = output.hidden_states[-1]
    torch.testing.assert_close(output.logits, last @ table.T, rtol=0, atol=1e-4)
    assert (last @ moved.T - output.logits).abs().max() > 0.05  # what an adapted head would have given


def test_t5_decoder_is_left_alone():
    model = FAMILIES["t5"]()
    ids, decoder_ids = token_ids(seed=1), token_ids(seed=77)
    with attach(model, CONFIG) as attached:
        disturb(attached)
        adapted = run(model, ids)
        encoded = model.get_encoder()(input_ids=ids)
        decoded = run(model, ids, encoder_outputs=encoded)
    assert torch.equal(adapted, decoded)
    with torch.no_grad():
        shared = model.get_input_embeddings()
        wrong = model(encoder_outputs=encoded, decoder_inputs_embeds=attached.adapters["text"](shared(decoder_ids)))
    assert (wrong.logits - adapted).abs().max() > 0.05


def test_t5_with_one_module_for_both_sides():
    model = FAMILIES["t5"]()
    model.encoder.embed_tokens = model.decoder.embed_tokens = model.shared
    ids = token_ids(seed=1)
    with attach(model, CONFIG) as attached:
        disturb(attached)
        adapted = run(model, ids)
    torch.testing.assert_close(adapted, by_embeddings(model, ids, attached.adapters["text"]), rtol=0, atol=1e-5)


def test_t5_encoder_that_fails_does_not_open_the_decoder():
    model = FAMILIES["t5"]()
    model.encoder.embed_tokens = model.decoder.embed_tokens = model.shared
    with attach(model, CONFIG) as attached:
        disturb(attached)
        with pytest.raises(IndexError):
            model.get_encoder()(input_ids=torch.tensor([[10_000]]))
        with torch.no_grad():
            ids = token_ids(seed=1)
            inside = model.decoder(input_ids=ids).last_hidden_state
    with torch.no_grad():
        assert torch.equal(inside, model.decoder(input_ids=ids).last_hidden_state)


def test_attaching_twice_is_refused():
    model = FAMILIES["llama"]()
    with attach(model, CONFIG):
        with pytest.raises(ModelError, match="already has an adapter attached: detach it first"):
            attach(model, CONFIG)
        with attach(FAMILIES["llama"](), CONFIG):
            pass
    attach(model, CONFIG).detach()


def test_rank_above_the_width_is_refused():
    model = FAMILIES["llama"]()
    with pytest.raises(ConfigError, match=r"rank is 49 and the embeddings of LlamaForCausalLM are 48 wide"):
        attach(model, AdaLinkConfig(rank=49))
    attach(model, CONFIG).detach()


def test_half_precision_base_gets_its_own_dtype_back():
    model = FAMILIES["llama"]().to(torch.bfloat16)
    with attach(model, CONFIG) as attached:
        disturb(attached)
        assert run(model, token_ids(seed=1)).dtype == torch.bfloat16
        assert all(parameter.dtype == torch.float32 for parameter in attached.parameters())


def test_weights_are_a_copy():
    with attach(FAMILIES["llama"](), CONFIG) as attached:
        disturb(attached)
        before = attached.weights()
        kept = {name: weight.copy() for name, weight in before.items()}
        disturb(attached, seed=6)
    for name, weight in before.items():
        assert (weight == kept[name]).all()


def test_a_call_that_fails_leaves_nothing_of_itself():
    """Before a cache everything given is generated: that is over with the call, also where it fails."""
    model, ids = FAMILIES["llama"](), token_ids(seed=1)

    def fail(module, args):
        raise RuntimeError("out of memory")

    with attach(model, AdaLinkConfig(rank=4, scope="prompt")) as attached, torch.no_grad():
        disturb(attached)
        cache = model(input_ids=ids, use_cache=True).past_key_values
        wanted = input_embedding(model)(ids)
        handle = model.base_model.layers[0].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            model(input_ids=ids[:, :1], past_key_values=cache)
        handle.remove()
        assert torch.equal(input_embedding(model)(ids), wanted)
    assert not torch.equal(input_embedding(model)(ids), wanted)
