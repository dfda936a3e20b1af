"""Every tensor of a checkpoint is in the model, named as left out, or refused; the right values are transformers'."""

import json

import pytest
import torch
from helpers.tiny_models import FAMILIES, LAYERS, llava, token_ids
from safetensors.torch import load_file, save_file

from adalink.runtime.errors import ModelError
from adalink.training.models.loading import load_base, load_checkpoint

QUERY = "model.layers.0.self_attn.q_proj"


def save(folder, family="llama"):
    FAMILIES[family]().save_pretrained(folder)
    return folder


def change(folder, edit):
    """Edit the tensors of a checkpoint in place."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    return folder


def config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


REFUSED = {
    f"{QUERY}.lora_A.default.weight": "saved with an adapter that is not merged; merge it",
    f"{QUERY}.base_layer.weight": "saved with an adapter that is not merged; merge it",
    f"{QUERY}.weight_scale_inv": "its weights are quantised; export the original checkpoint",
    f"{QUERY}.weight_scale": "its weights are quantised",
    f"{QUERY}.qzeros": "its weights are quantised",
    f"{QUERY}.bias": "config.json names another class or other settings",
    f"model.layers.{LAYERS}.self_attn.q_proj.weight": "fewer layers; correct num_hidden_layers",
    "model.norm.bias": "config.json names another class or other settings",
    "lm_head.bias": "config.json names another class or other settings",
    "prompt_encoder.embedding.weight": "config.json names another class or other settings",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_tensor_of_a_layer_is_refused(tmp_path, name):
    folder = change(save(tmp_path / "tiny"), lambda tensors: tensors.update({name: torch.randn(4, 4)}))
    with pytest.raises(ModelError, match=REFUSED[name]) as error:
        load_base(folder)
    assert f"1 tensor of the checkpoint, the first {name!r}, would be ignored" in str(error.value)


def test_a_checkpoint_saved_with_its_adapter(tmp_path):
    peft = pytest.importorskip("peft")
    model = FAMILIES["qwen2"]()
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "tiny")
    save_file(model.state_dict(), tmp_path / "tiny" / "model.safetensors")
    with pytest.raises(ModelError, match=r"8 tensors .*q_proj.base_layer.bias', would be ignored.*merge it"):
        load_base(tmp_path / "tiny")


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "v_head.summary.weight"),
        ("llama", "score.weight"),
        ("bert", "classifier.weight"),
        ("bert", "cls.predictions.transform.dense.weight"),
        ("bert", "qa_outputs.bias"),
    ],
)
def test_a_head_is_left_out_and_named(tmp_path, family, name):
    folder = change(save(tmp_path, family), lambda tensors: tensors.update({name: torch.randn(3)}))
    loaded = load_checkpoint(folder)
    poolers = ("pooler.dense.bias", "pooler.dense.weight") if family == "bert" else ()
    assert loaded.unused_tensors == tuple(sorted((name, *poolers)))
    extra = token_ids(1)
    with torch.no_grad():
        assert torch.equal(loaded.model(extra)[0], FAMILIES[family]()(extra)[0])


def test_published_classes_of_encoders(tmp_path):
    from transformers import BertForMaskedLM, BertForSequenceClassification

    settings = FAMILIES["bert"]().config
    for kind, names in (
        (BertForSequenceClassification, {"classifier.bias", "classifier.weight"}),
        (BertForMaskedLM, {"cls.predictions.bias", "cls.predictions.transform.dense.weight"}),
    ):
        kind(settings).save_pretrained(tmp_path / kind.__name__)
        assert names <= set(load_checkpoint(tmp_path / kind.__name__).unused_tensors)


def test_names_of_older_releases(tmp_path):
    def rename(tensors):
        for name in [name for name in tensors if "LayerNorm" in name]:
            tensors[name.replace("weight", "gamma").replace("bias", "beta")] = tensors.pop(name)

    loaded = load_checkpoint(change(save(tmp_path, "bert"), rename))
    with torch.no_grad():
        assert torch.equal(loaded.model(token_ids(1))[0], FAMILIES["bert"]()(token_ids(1))[0])


def test_two_tensors_of_one_parameter(tmp_path):
    def double(tensors):
        tensors["layers.0.mlp.up_proj.weight"] = torch.randn(80, 48)

    with pytest.raises(ModelError, match=r"both the model's 'model.layers.0.mlp.up_proj.weight'"):
        load_base(change(save(tmp_path), double))


def test_a_renamed_tensor_that_another_one_replaced(tmp_path):
    name = "encoder.layer.0.output.LayerNorm"
    folder = change(save(tmp_path, "bert"), lambda tensors: tensors.update({f"{name}.gamma": torch.randn(48)}))
    with pytest.raises(ModelError, match=r"LayerNorm\.\w+', would be ignored|weights are missing"):
        load_base(folder)


def test_llava_of_older_releases_and_its_lora(tmp_path):
    model = llava()
    model.save_pretrained(tmp_path / "tiny")

    def older(tensors):
        for name in list(tensors):
            old = name.replace("model.language_model.", "language_model.model.").replace("model.", "", 1)
            if name.startswith("model.") and not name.startswith("model.language_model"):
                tensors[old] = tensors.pop(name)
        tensors["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(10)[None]

    change(tmp_path / "tiny", older)
    assert load_checkpoint(tmp_path / "tiny").unused_tensors == ("vision_tower.vision_model.embeddings.position_ids",)
    lora = "language_model.model.layers.0.self_attn.q_proj.lora_A.weight"
    change(tmp_path / "tiny", lambda tensors: tensors.update({lora: torch.randn(2, 48)}))
    with pytest.raises(ModelError, match="merge it"):
        load_base(tmp_path / "tiny")


CONSTANTS = {
    "rotary": ("llama", "model.layers.1.self_attn.rotary_emb.inv_freq", "model.layers.*.self_attn.rotary_emb.inv_freq"),
    "positions": ("bert", "embeddings.position_ids", "embeddings.position_ids"),
    "mask": ("gpt2", "h.0.attn.bias", "h.*.attn.bias"),
    "masked": ("gpt2", "transformer.h.1.attn.masked_bias", "transformer.h.*.attn.masked_bias"),
}


def constant(kind):
    return {
        "rotary": (1 / 10000 ** (torch.arange(0, 16, 2) / 16)).half(),
        "positions": torch.arange(64)[None],
        "mask": torch.ones(64, 64, dtype=torch.uint8).tril()[None, None],
        "masked": torch.tensor(-1e4),
    }[kind]


@pytest.mark.parametrize("kind", CONSTANTS)
def test_constants_that_the_model_computes(tmp_path, kind):
    family, name, shown = CONSTANTS[kind]
    folder = change(save(tmp_path, family), lambda tensors: tensors.update({name: constant(kind)}))
    assert shown in load_checkpoint(folder).unused_tensors
    change(folder, lambda tensors: tensors.update({name: 1 + 3 * constant(kind).abs()}))
    with pytest.raises(ModelError, match="holds other values than those that transformers computes"):
        load_base(folder)


def test_the_tensor_of_t5_that_nobody_reads(tmp_path):
    name = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    folder = change(save(tmp_path, "t5"), lambda tensors: tensors.update({name: torch.randn(32, 4)}))
    assert load_checkpoint(folder).unused_tensors == (name.replace(".0.", ".*.").replace(".1.", ".*."),)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_tied_matrices(tmp_path, family):
    table, other = (
        ("model.embed_tokens.weight", "lm_head.weight")
        if family == "llama"
        else (
            "shared.weight",
            "encoder.embed_tokens.weight",
        )
    )
    folder = change(save(tmp_path, family), lambda tensors: tensors.update({other: tensors[table].clone()}))
    assert load_checkpoint(folder).unused_tensors == ()
    change(folder, lambda tensors: tensors.update({other: tensors[table] + 1}))
    with pytest.raises(ModelError, match=f"ties '{other}' to '{table}'.*tie_word_embeddings"):
        load_base(folder)


@pytest.mark.parametrize("saved_by", [4, 5])
def test_a_head_of_its_own(tmp_path, saved_by):
    """As of T5 1.1, whose class ties the head unless both matrices are in the files; releases say it in two ways."""
    from transformers import T5Config, T5ForConditionalGeneration

    settings = FAMILIES["t5"]().config.to_dict() | {"tie_word_embeddings": False, "scale_decoder_outputs": False}
    model = T5ForConditionalGeneration(T5Config(**settings)).eval()
    model.lm_head.weight = torch.nn.Parameter(torch.randn(96, 48))
    model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path)
    config(tmp_path, tie_word_embeddings=saved_by == 5, scale_decoder_outputs=False)
    ids = {"input_ids": token_ids(1), "decoder_input_ids": token_ids(2)}
    with torch.no_grad():
        assert torch.equal(load_base(tmp_path)(**ids).logits, model(**ids).logits)


def test_experts_that_are_stacked_while_loading(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 3}
    MixtralForCausalLM(MixtralConfig(**sizes, **heads)).save_pretrained(tmp_path)
    assert load_checkpoint(tmp_path).unused_tensors == ()
    lora = "model.layers.0.self_attn.q_proj.lora_A.weight"
    change(tmp_path, lambda tensors: tensors.update({lora: torch.randn(2, 48)}))
    with pytest.raises(ModelError, match="merge it"):
        load_base(tmp_path)


def test_loading_info_that_says_less_is_not_believed(tmp_path, monkeypatch):
    """transformers drops names that a class tells it to ignore; the account does not."""
    from transformers import LlamaForCausalLM

    folder = change(save(tmp_path), lambda tensors: tensors.update({f"{QUERY}.lora_A.weight": torch.randn(2, 48)}))
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"lora_"])
    with pytest.raises(ModelError, match="merge it"):
        load_base(folder)
