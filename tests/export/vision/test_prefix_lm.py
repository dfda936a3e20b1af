"""PaliGemma exported: the prompt in both directions and all else causal, in one graph of standard operators."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from helpers.export import Array, yardstick
from helpers.tiny_models import IMAGE_SIZE, IMAGE_TOKENS, PREFIX_IMAGE_TOKEN, paligemma
from helpers.tiny_tokenizer import make_prefix_tokenizer, make_tokenizer
from helpers.vision import siglip_processor

from adalink.export.base.export import export_base
from adalink.runtime.errors import ConfigError, ManifestError, ModelError
from adalink.runtime.storage.manifest import Manifest
from adalink.runtime.storage.manifest_io import encode_manifest
from adalink.training.method.attach import attach
from adalink.training.method.config import AdaLinkConfig
from adalink.training.models.loading import base_fingerprint

LENGTH, SHORT, STEPS = 12, 7, 6
TARGETS = ("portable", "onnxruntime-cpu")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Manifest]:
    model, folder = paligemma(), tmp_path_factory.mktemp("exported")
    for target in TARGETS:
        manifest = export_base(
            model, folder, target=target, tokenizer=make_prefix_tokenizer(), image_processor=siglip_processor()
        )
    return model, folder, manifest


class Engine:
    """A language engine that is called as the runtime calls it, on embeddings of tokens."""

    def __init__(self, model: Any, folder: Path, manifest: Manifest, target: str) -> None:
        self._model, self._base = model, manifest.base
        self._session = ort.InferenceSession(str(folder / manifest.variants[target].graph))
        self._cache: dict[str, Array] = {}

    def __call__(self, ids: torch.Tensor, mask: Array, positions: Array, *, first: bool) -> Array:
        cache = self._base.cache
        assert cache is not None
        if first:
            empty = np.zeros((len(ids), cache.kv_heads, 0, cache.head_dim), np.float32)
            self._cache = {past: empty for past, _ in cache.names()}
        with torch.no_grad():
            embeds = self._model.get_input_embeddings()(ids).numpy()
        feeds = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions, **self._cache}
        logits, *present = self._session.run(None, feeds)
        self._cache = dict(zip(self._cache, present, strict=True))
        return np.asarray(logits)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("pad", ["left", "right"])
def test_prompt_then_steps_are_pytorchs_in_a_padded_batch(exported: Any, target: str, pad: str) -> None:
    """A prompt of 12 and one of 7, then a token, three at once and two: prompts whole, what follows causal."""
    model, folder, manifest = exported
    tokens = torch.randint(3, 96, (2, LENGTH + STEPS), generator=torch.Generator().manual_seed(4))
    prompts, follows = (LENGTH, SHORT), tokens[:, LENGTH:]
    mask, ids = np.ones((2, LENGTH), np.int64), tokens[:, :LENGTH].clone()
    blank = slice(LENGTH - SHORT) if pad == "left" else slice(SHORT, LENGTH)
    mask[1, blank] = 0
    ids[1, mask[1] != 0] = tokens[1, :SHORT]
    ids[1, blank] = 0
    engine = Engine(model, folder, manifest, target)
    found = [engine(ids, mask, np.maximum(mask.cumsum(axis=1) - 1, 0), first=True)]
    at = np.array(prompts)[:, None]
    for start, stop in ((0, 1), (1, 4), (4, 6)):
        mask = np.concatenate([mask, np.ones((2, stop - start), np.int64)], axis=1)
        found.append(engine(follows[:, start:stop], mask, at + np.arange(start, stop), first=False))
    received = np.concatenate(found, axis=1)
    for row, length in enumerate(prompts):
        whole = torch.cat([tokens[row, :length], follows[row]])[None]
        types = (torch.arange(length + STEPS) >= length).long()[None]
        expected, limit = yardstick(model, input_ids=whole, token_type_ids=types)
        assert np.abs(received[row][mask[row] != 0] - expected[0]).max() <= limit
        for wrong in (torch.ones_like(types), torch.zeros_like(types)):  # all causal, nothing causal
            other, _ = yardstick(model, input_ids=whole, token_type_ids=wrong)
            assert np.abs(other - expected).max() > 100 * limit


def test_vision_graph_and_table_are_the_models(exported: Any) -> None:
    model, folder, manifest = exported
    pixels = torch.randn(3, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(1))
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        plain = model.get_image_features(pixel_values=pixels).pooler_output
        limit = 8 * float((plain - exact.get_image_features(pixel_values=pixels.double()).pooler_output).abs().max())
    session = ort.InferenceSession(str(folder / "base" / "vision" / "model.onnx"))
    (embeds,) = session.run(["image_embeds"], {"pixel_values": pixels.numpy()})
    assert np.abs(embeds - plain.numpy()).max() <= limit < 1e-4
    assert manifest.base.fingerprint == base_fingerprint(model)


def test_graphs_hold_standard_operators_and_the_manifest_says_why(tmp_path: Path) -> None:
    said: list[str] = []
    manifest = export_base(
        paligemma(tie_word_embeddings=True),
        tmp_path,
        tokenizer=make_prefix_tokenizer(),
        image_processor=siglip_processor(),
        progress=said.append,
    )
    graph = onnx.load(tmp_path / manifest.variants["onnxruntime-cpu"].graph, load_external_data=False).graph
    assert "GroupQueryAttention" not in {node.op_type for node in graph.node}
    assert any("its prompt attends in both directions, and GroupQueryAttention only causally" in line for line in said)
    base, vision = manifest.base, manifest.base.vision
    assert (base.architecture, base.bidirectional_prompt, vision.architecture) == ("gemma", True, "paligemma")
    assert (vision.image_token_id, vision.tokens_per_image) == (PREFIX_IMAGE_TOKEN, IMAGE_TOKENS)
    assert msgspec.to_builtins(vision.prompt_form) == {"image": "<image>", "before": "<bos>", "after": "\n"}
    wrong = msgspec.structs.replace(vision.prompt_form, image="")
    wrong_vision = msgspec.structs.replace(vision, prompt_form=wrong)
    with pytest.raises(ManifestError, match=r"prompt_form\.image is ''"):
        encode_manifest(msgspec.structs.replace(manifest, base=msgspec.structs.replace(base, vision=wrong_vision)))


def test_a_checkpoint_brings_its_processor_and_its_form(tmp_path: Path) -> None:
    paligemma().save_pretrained(tmp_path / "source")
    make_prefix_tokenizer().save_pretrained(tmp_path / "source")
    siglip_processor().save_pretrained(tmp_path / "source")
    manifest = export_base(tmp_path / "source", tmp_path / "out")
    assert manifest.base.vision.prompt_form is not None
    assert manifest.base.name == "source"
    bare = export_base(paligemma(), tmp_path / "bare", image_processor=siglip_processor())
    assert bare.base.vision.prompt_form is None, "without a tokenizer there are no texts"


def test_a_variant_without_a_tokenizer_keeps_the_form_that_is_there(tmp_path: Path) -> None:
    own = {"image_processor": siglip_processor()}
    first = export_base(paligemma(), tmp_path, tokenizer=make_prefix_tokenizer(), **own)
    assert export_base(paligemma(), tmp_path, target="portable", **own).base == first.base
    assert first.base.vision.prompt_form is not None


def test_what_cannot_be_exported_is_refused_with_the_reason(tmp_path: Path) -> None:
    own = {"tokenizer": make_prefix_tokenizer(), "image_processor": siglip_processor()}
    with pytest.raises(ConfigError, match=r"'int4' is for bases whose attention is causal: .* leave it out"):
        export_base(paligemma(), tmp_path, quantization="int4", **own)
    with pytest.raises(ModelError, match="expected token 98, the placeholder, twice"):
        export_base(paligemma(), tmp_path, **own | {"tokenizer": make_tokenizer()})
    with pytest.raises(ModelError, match="no image processor was found"):
        export_base(paligemma(), tmp_path)
    alone = paligemma().model.language_model
    from transformers import GemmaForCausalLM

    text = GemmaForCausalLM(alone.config)
    with pytest.raises(ModelError, match="its decoder attends in both directions"):
        export_base(text, tmp_path)
    model = paligemma()
    with attach(model, AdaLinkConfig(rank=2, modalities=("image",))), pytest.raises(ModelError, match="has a hook"):
        export_base(model, tmp_path, **own)
    assert not (tmp_path / "manifest.json").exists()


def test_paligemma_2_is_refused_for_its_language_model(tmp_path: Path) -> None:
    from transformers import Gemma2Config

    shape = {"vocab_size": 112, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "head_dim": 16}
    text = Gemma2Config(**shape, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
    tiny = paligemma().config
    config = type(tiny)(
        vision_config=tiny.vision_config, text_config=text, image_token_index=98, projection_dim=48, hidden_size=48
    )
    with pytest.raises(ModelError, match="model type 'gemma2' is not supported"):
        export_base(type(paligemma())(config), tmp_path, image_processor=siglip_processor())
