"""Weight files are safetensors inside the folder, whole, and the model's own; everything else is refused by name."""

import json
import shutil

import pytest
import torch
from helpers.tiny_models import FAMILIES
from helpers.tiny_tokenizer import make_tokenizer
from safetensors.torch import load_file, save_file

from adalink.runtime.errors import ModelError
from adalink.training.models import loading
from adalink.training.models.loading import load_base, load_checkpoint, load_tokenizer

INDEX = "model.safetensors.index.json"
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 538090408\n"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    FAMILIES["llama"]().save_pretrained(folder, max_shard_size="100kB")
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def sharded(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "tiny")


@pytest.fixture
def single(tmp_path):
    FAMILIES["llama"]().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def edit_index(folder, edit):
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def test_shards(sharded):
    assert load_checkpoint(sharded).unused_tensors == ()


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        ("weights.bin", r"names 'weights.bin'; expected .safetensors files: others may be pickled"),
        ("../tiny/x.safetensors", r"names '../tiny/x.safetensors', which is not a file inside"),
        ("/tmp/x.safetensors", r"names '/tmp/x.safetensors', which is not a file inside"),
        ("..\\x.safetensors", r"which is not a file inside the model's folder"),
        ("https://host/x.safetensors", r"which is not a file inside the model's folder"),
        (7, r"names 7, which is not a file inside"),
    ],
)
def test_an_index_that_leads_elsewhere(sharded, shard, message):
    (sharded / "weights.bin").write_bytes(b"a pickle")
    edit_index(sharded, lambda names: names.update({"model.norm.weight": shard}))
    with pytest.raises(ModelError, match=message):
        load_base(sharded)


def test_pickled_shards_beside_a_safetensors_file(single):
    (single / "model.safetensors").rename(single / "other.safetensors")
    torch.save({}, single / "pytorch_model-00001-of-00001.bin")
    weight_map = {"model.norm.weight": "pytorch_model-00001-of-00001.bin"}
    (single / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with pytest.raises(ModelError, match=r"neither model.safetensors nor .*pytorch_model-00001.*never loaded"):
        load_base(single)


def test_pickled_weights_that_come_after_the_check_are_not_loaded(single, monkeypatch):
    """The check has seen safetensors; transformers must not take what lies there by then."""
    find = loading.find_weight_files

    def late(folder, name):
        found = find(folder, name)
        torch.save(load_file(single / "model.safetensors"), single / "pytorch_model.bin")
        (single / "model.safetensors").unlink()
        return found

    monkeypatch.setattr(loading, "find_weight_files", late)
    with pytest.raises(ModelError, match=r"transformers cannot load it: .*model\.safetensors"):
        load_base(single)


def test_missing_shards(sharded):
    shards = sorted(sharded.glob("*.safetensors"))
    shards[1].unlink()
    with pytest.raises(ModelError, match=rf"1 of {len(shards)} weight files are missing, the first '{shards[1].name}'"):
        load_base(sharded)


def test_an_index_of_another_checkpoint(sharded):
    edit_index(sharded, lambda names: names.update({"model.extra.weight": names["model.norm.weight"]}))
    with pytest.raises(ModelError, match=r"says that tensor 'model.extra.weight' is in .*does not hold it"):
        load_base(sharded)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "\xff"])
def test_an_index_that_is_none(sharded, text):
    (sharded / INDEX).write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match=INDEX):
        load_base(sharded)


@pytest.mark.parametrize("data", [b"", b"\xff" * 64, (2).to_bytes(8, "little") + b"[]", b"\0" * 100])
def test_headers_that_are_none(single, data):
    (single / "model.safetensors").write_bytes(data)
    with pytest.raises(ModelError, match=r"model.safetensors \(\d+ bytes\) is not a complete safetensors file"):
        load_base(single)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"])
def test_git_lfs_pointers(single, name):
    make_tokenizer().save_pretrained(single)
    (single / name).write_text(POINTER)
    for load in (load_base, load_tokenizer):
        with pytest.raises(ModelError, match=rf"{name} is a Git LFS pointer of 134 bytes .* of 538090408 .*lfs pull"):
            load(single)


def test_a_gguf_file_that_is_a_git_lfs_pointer(tmp_path):
    (tmp_path / "a.gguf").write_text(POINTER)
    for spec in (tmp_path, tmp_path / "a.gguf"):
        with pytest.raises(ModelError, match=r"a.gguf is a Git LFS pointer"):
            load_base(spec)


def test_an_adapter_beside_the_weights(single):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(FAMILIES["llama"](), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(single)
    with pytest.raises(ModelError, match=r"adapter_config.json lies beside its weights.*merge_and_unload"):
        load_base(single)


def test_an_adapter_beside_a_gguf_file(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"model a: adapter_config.json lies beside its weights"):
        load_base(tmp_path / "a.gguf")


@pytest.mark.parametrize("method", ["fp8", "gptq", "awq", "bitsandbytes", "compressed-tensors"])
@pytest.mark.parametrize("is_nested", [False, True])
def test_quantised_checkpoints(single, method, is_nested):
    config = json.loads((single / "config.json").read_text())
    settings = {"quantization_config": {"quant_method": method}}
    (single / "config.json").write_text(json.dumps(config | ({"text_config": settings} if is_nested else settings)))
    with pytest.raises(ModelError, match=rf"quant_method '{method}'.*quantised.*export the original"):
        load_base(single)


def test_further_weight_files_are_named(single):
    shutil.copy(single / "model.safetensors", single / "consolidated.safetensors")
    (single / "2_Dense").mkdir()
    shutil.copy(single / "model.safetensors", single / "2_Dense")
    (single / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "2_Dense"}, {"path": "../tiny"}]))
    assert load_checkpoint(single).unused_tensors == ("2_Dense/model.safetensors", "consolidated.safetensors")


def test_one_tensor_in_two_files(sharded):
    first, second, *_ = sorted(sharded.glob("*.safetensors"))
    tensors = load_file(second) | dict([next(iter(load_file(first).items()))])
    save_file(tensors, second, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"expected one: remove the file"):
        load_base(sharded)


def hub(tmp_path, monkeypatch, folder):
    """A hub's cache that holds the files of a folder, as links, as huggingface_hub writes it."""
    root = tmp_path / "hub"
    snapshot = root / "models--org--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (root / "models--org--name" / "refs").mkdir()
    (root / "models--org--name" / "refs" / "main").write_text("abc")
    for file in folder.iterdir():
        (snapshot / file.name).symlink_to(file)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(root))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return snapshot


def test_hub_ids_are_accounted_for_too(single, tmp_path, monkeypatch):
    path = single / "model.safetensors"
    hub(tmp_path, monkeypatch, single)
    assert load_checkpoint("org/name").unused_tensors == ()
    save_file(load_file(path) | {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(1)}, path)
    with pytest.raises(ModelError, match=r"org/name.*merge it"):
        load_base("org/name")


def test_a_pickle_of_a_hub_id_is_never_loaded(single, tmp_path, monkeypatch):
    torch.save(load_file(single / "model.safetensors"), single / "pytorch_model.bin")
    (single / "model.safetensors").unlink()
    snapshot = hub(tmp_path, monkeypatch, single)
    with pytest.raises(ModelError, match=r"org/name: .*transformers cannot load it"):
        load_base("org/name")
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(snapshot)  # what would be loaded without the demand for safetensors
