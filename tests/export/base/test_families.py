"""The exported base of every family computes what its PyTorch model computes: padded, cached, one token at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import numpy as np
import onnxruntime as ort
import pytest
import torch
from helpers.export import (
    ALL_DECODERS,
    ALL_ENCODERS,
    LENGTH,
    MODELS,
    SHORT,
    Array,
    Exported,
    difference,
    open_exported,
    windowed_mistral,
    windowed_qwen2,
    yardstick,
)
from helpers.tiny_models import DECODERS, token_ids

from adalink.export.base.export import export_base


def run(session: ort.InferenceSession, feeds: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
    """The first output, and the cache as the next call's feeds."""
    if any(node.name == "token_type_ids" for node in session.get_inputs()):
        feeds = {"token_type_ids": np.zeros(feeds["attention_mask"].shape, np.int64), **feeds}
    outputs = dict(zip([node.name for node in session.get_outputs()], session.run(None, feeds), strict=True))
    first = outputs.pop("logits", None)
    if first is None:
        first = outputs.pop("last_hidden_state")
    return first, {name.replace("present", "past_key_values"): value for name, value in outputs.items()}


def on_each(models: Iterable[str]) -> pytest.MarkDecorator:
    """Run a test on the exports of these models, made once each.

    Graphs for ONNX Runtime with grouped attention have a test file of their own, test_grouped_graphs.py.
    """
    cases = [(name, "portable") for name in models]
    cases += [(name, "onnxruntime-cpu") for name in [*ALL_ENCODERS, "llama-narrow", "t5"] if name in models]
    return pytest.mark.parametrize("exported", cases, indirect=True, ids="-".join)


@pytest.fixture(scope="module")
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    name, target = request.param
    model, out = MODELS[name](), tmp_path_factory.mktemp(name)
    manifest = export_base(model, out, target=target)
    return open_exported(model, manifest, out, target)


def padded_batch() -> tuple[torch.Tensor, Array, Array]:
    """Ids, mask and positions of a long row and a short one with padding on its left."""
    ids = token_ids(0, 2, LENGTH)
    mask, positions = np.ones((2, LENGTH), np.int64), np.tile(np.arange(LENGTH), (2, 1))
    mask[1, : LENGTH - SHORT] = 0
    positions[1] = np.maximum(np.arange(LENGTH) - (LENGTH - SHORT), 0)
    return ids, mask, positions


@on_each([*ALL_DECODERS, "llama-narrow"])
def test_padded_prompt_equals_each_row_alone(exported: Exported) -> None:
    ids, mask, positions = padded_batch()
    feeds = {"inputs_embeds": exported.embed(ids), "attention_mask": mask, "position_ids": positions}
    logits, _ = run(exported.graph, feeds | exported.empty_cache(2))
    assert np.isfinite(logits).all(), "fully masked positions must stay finite"
    for row, start in ((0, 0), (1, LENGTH - SHORT)):
        expected, limit = yardstick(exported.model, input_ids=ids[row : row + 1, start:])
        assert difference(logits[row, start:], expected[0]) <= limit


@on_each([*ALL_DECODERS, "llama-narrow"])
def test_cached_steps_equal_the_whole_sequence(exported: Exported) -> None:
    """A prompt of 11, a chunk of 3, then single tokens: past is 0, then more than the window, then grows by one."""
    ids, mask, positions = padded_batch()
    embeds, cache, made = exported.embed(ids), exported.empty_cache(2), []
    for begin, end in [(0, 11), (11, 14), *((i, i + 1) for i in range(14, LENGTH))]:
        feeds = {
            "inputs_embeds": embeds[:, begin:end],
            "attention_mask": mask[:, :end],
            "position_ids": positions[:, begin:end],
        }
        logits, cache = run(exported.graph, feeds | cache)
        made.append(logits)
    whole = np.concatenate(made, axis=1)
    for row, start in ((0, 0), (1, LENGTH - SHORT)):
        expected, limit = yardstick(exported.model, input_ids=ids[row : row + 1, start:])
        assert difference(whole[row, start:], expected[0]) <= limit


@on_each([*ALL_DECODERS, "llama-narrow"])
def test_wrong_position_mask_or_cache_is_outside_the_limit(exported: Exported) -> None:
    """The limit of the tests above is tight enough to find what it is there to find."""
    ids = token_ids(1, 1, LENGTH)
    embeds, ones = exported.embed(ids), np.ones((1, LENGTH), np.int64)
    feeds = {
        "inputs_embeds": embeds[:, :-1],
        "attention_mask": ones[:, :-1],
        "position_ids": np.arange(LENGTH - 1)[None],
    }
    _, cache = run(exported.graph, feeds | exported.empty_cache(1))
    expected, limit = yardstick(exported.model, input_ids=ids)
    step = {"inputs_embeds": embeds[:, -1:], "attention_mask": ones, "position_ids": np.array([[LENGTH - 1]])}

    def error(changed: dict[str, Array], past: dict[str, Array] = cache) -> float:
        return difference(run(exported.graph, step | changed | past)[0][0], expected[0, -1:])

    assert error({}) <= limit
    assert error({"position_ids": np.array([[LENGTH]])}) > 10 * limit
    hidden = ones.copy()
    hidden[0, -3] = 0
    assert error({"attention_mask": hidden}) > 10 * limit
    crossed = {name: value[:, :, ::-1].copy() if name.endswith("key") else value for name, value in cache.items()}
    assert error({}, crossed) > 10 * limit


def test_window_ends_where_the_config_says() -> None:
    """The windowed models differ from the same weights without a window, so parity above tests the window."""
    for windowed in (windowed_mistral(), windowed_qwen2(), DECODERS["gemma3"]()):
        wide = copy.deepcopy(windowed)
        wide.config.sliding_window = LENGTH + 1
        expected, limit = yardstick(windowed, input_ids=token_ids(0, 1, LENGTH))
        with torch.no_grad():
            assert difference(wide(input_ids=token_ids(0, 1, LENGTH)).logits.numpy(), expected) > 10 * limit


@on_each(ALL_ENCODERS)
def test_encoder_with_padding_equals_each_row_alone(exported: Exported) -> None:
    ids = token_ids(2, 2, LENGTH)
    mask = np.ones((2, LENGTH), np.int64)
    mask[1, SHORT:] = 0
    hidden, _ = run(exported.graph, {"inputs_embeds": exported.embed(ids), "attention_mask": mask})
    for row, end in ((0, LENGTH), (1, SHORT)):
        expected, limit = yardstick(exported.model, input_ids=ids[row : row + 1, :end])
        assert difference(hidden[row, :end], expected[0]) <= limit
    unmasked, _ = run(exported.graph, {"inputs_embeds": exported.embed(ids), "attention_mask": np.ones_like(mask)})
    assert difference(unmasked[1, :SHORT], expected[0]) > 10 * limit


@on_each(["t5"])
def test_encoder_decoder_with_cache_and_padding(exported: Exported) -> None:
    source, target = token_ids(3, 2, LENGTH), token_ids(4, 2, 9)
    mask = np.ones((2, LENGTH), np.int64)
    mask[1, SHORT:] = 0
    states, _ = run(exported.graph, {"inputs_embeds": exported.embed(source), "attention_mask": mask})
    embeds, cache, made = exported.embed(target), exported.empty_cache(2), []
    for begin, end in [(0, 4), (4, 6), (6, 7), (7, 8), (8, 9)]:
        feeds = {
            "inputs_embeds": embeds[:, begin:end],
            "attention_mask": np.ones((2, end), np.int64),
            "encoder_hidden_states": states,
            "encoder_attention_mask": mask,
        }
        logits, cache = run(exported.decoder, feeds | cache)
        made.append(logits)
    whole = np.concatenate(made, axis=1)
    for row, end in ((0, LENGTH), (1, SHORT)):
        expected, limit = yardstick(
            exported.model, input_ids=source[row : row + 1, :end], decoder_input_ids=target[row : row + 1]
        )
        assert difference(whole[row], expected[0]) <= limit
    unmasked = feeds | {"encoder_attention_mask": np.ones_like(mask)}
    again, _ = run(exported.decoder, unmasked | {name: value[:, :, :-1] for name, value in cache.items()})
    assert difference(again[1], expected[0, -1:]) > 10 * limit


@on_each(MODELS)
def test_graph_has_the_names_and_dynamic_axes_of_the_contract(exported: Exported) -> None:
    inputs = {node.name: node.shape for node in exported.graph.get_inputs()}
    base = exported.manifest.base
    assert inputs.pop("inputs_embeds") == ["batch", "sequence", base.hidden_size]
    if base.kind != "decoder":
        has_types = getattr(exported.model.config, "type_vocab_size", 1) > 1
        expected = ["attention_mask", "token_type_ids"] if has_types else ["attention_mask"]
        assert inputs == {name: ["batch", "sequence"] for name in expected}
        assert [node.name for node in exported.graph.get_outputs()] == ["last_hidden_state"]
        return
    assert inputs.pop("attention_mask") == ["batch", "total"]
    assert inputs.pop("position_ids") == ["batch", "sequence"]
    cache = base.cache
    names = [f"{i}.{part}" for i in range(cache.layers) for part in ("key", "value")]
    assert inputs == {f"past_key_values.{name}": ["batch", cache.kv_heads, "past", cache.head_dim] for name in names}
    assert [node.name for node in exported.graph.get_outputs()] == ["logits", *(f"present.{name}" for name in names)]


@on_each(["t5"])
def test_decoder_of_an_encoder_decoder_has_the_names_of_the_contract(exported: Exported) -> None:
    names = [node.name for node in exported.decoder.get_inputs() if not node.name.startswith("past_key_values.")]
    assert names == ["inputs_embeds", "attention_mask", "encoder_hidden_states", "encoder_attention_mask"]
