"""The reference reads the checkpoint's files itself: what loading dropped is a failed check, whatever loading says.

Each planted checkpoint goes through an export whose own account is switched off. Every other check of ``verify`` passes
then, since both sides load the model alike.
"""

import pytest
import torch
from helpers.tiny_deployments import make_model_folder
from helpers.tiny_models import FAMILIES, LAYERS
from safetensors.torch import load_file, save_file

from adalink.export.base.export import export_base
from adalink.runtime.errors import ModelError
from adalink.tools.parity.reference.checkpoint import NAME, check_checkpoint
from adalink.tools.parity.reference.stored_model import load_stored
from adalink.tools.parity.suite import VerifyOptions, verify
from adalink.training.models import loading
from adalink.training.models.weight_files import WeightFiles

QUERY = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def blind(monkeypatch):
    """Loading as it was before every tensor was accounted for."""
    monkeypatch.setattr(loading, "account_for_tensors", lambda *arguments: [])
    monkeypatch.setattr(loading, "find_weight_files", lambda folder, name: WeightFiles({}, numbers=10**9))
    monkeypatch.setattr(loading, "refuse_adapter", lambda name: None)


def plant(folder, tensors):
    path = folder / "model.safetensors"
    save_file(load_file(path) | tensors, path, metadata={"format": "pt"})
    return folder


def lora(folder):
    return plant(folder, {f"{QUERY}.lora_A.default.weight": torch.ones(4, 48)})


def adapter_beside(folder):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(FAMILIES["llama"](), config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("fault", "named"), [(lora, f"{QUERY}.lora_A.default.weight"), (adapter_beside, "adapter_config.json")]
)
def test_verify_finds_what_only_the_files_say(tmp_path, blind, fault, named):
    model = fault(make_model_folder(tmp_path / "tiny", "llama"))
    export_base(model, tmp_path / "deployment")
    report = verify(tmp_path / "deployment", str(model), {}, VerifyOptions(threads=1, quick=True))
    failed = {check.name: check.detail for check in report.checks if not check.passed}
    assert set(failed) == {NAME}
    assert f"in the files but not in the model: {named}" in failed[NAME]


PLANTED = {
    f"{QUERY}.lora_B.weight": torch.zeros(64, 4),
    f"{QUERY}.weight_scale_inv": torch.ones(1),
    f"{QUERY}.bias": torch.zeros(64),
    f"model.layers.{LAYERS}.input_layernorm.weight": torch.ones(48),
    "model.extra.position_ids": torch.ones(3, dtype=torch.int64),
    "model.rotary_emb.inv_freq": torch.ones(8),
    "lm_head.bias": torch.zeros(96),
    "model.norm.copy": None,  # of a tensor that the model has once
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_tensor_that_the_model_lacks(tmp_path, blind, name):
    FAMILIES["llama"]().save_pretrained(tmp_path)
    norm = load_file(tmp_path / "model.safetensors")["model.norm.weight"]
    value = PLANTED[name]
    plant(tmp_path, {name: norm if value is None else value})
    check = check_checkpoint(tmp_path, loading.load_base(tmp_path))
    assert not check.passed
    assert check.measured == 1
    assert f"in the files but not in the model: {name}" in check.detail


def test_a_parameter_that_no_file_holds(tmp_path, blind):
    FAMILIES["llama"]().save_pretrained(tmp_path)
    model = loading.load_base(tmp_path)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-6
    check = check_checkpoint(tmp_path, model)
    name = "model.layers.1.mlp.up_proj.weight"
    assert check.measured == 2
    assert f"in the files but not in the model: {name}; in the model but not in the files: {name}" in check.detail


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_saved_is_what_is_loaded(tmp_path, family):
    FAMILIES[family]().save_pretrained(tmp_path, max_shard_size="100kB")
    for load in (loading.load_base, load_stored):
        check = check_checkpoint(tmp_path, load(tmp_path))
        assert check.passed, check.detail


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_stored_in_another_dtype(tmp_path, dtype):
    FAMILIES["llama"]().to(dtype).save_pretrained(tmp_path)
    assert check_checkpoint(tmp_path, loading.load_base(tmp_path)).passed


def test_heads_and_constants_are_named(tmp_path):
    FAMILIES["bert"]().save_pretrained(tmp_path)
    head = {"classifier.weight": torch.randn(3, 48), "cls.predictions.bias": torch.randn(96)}
    plant(tmp_path, head | {"embeddings.position_ids": torch.arange(64)[None]})
    check = check_checkpoint(tmp_path, loading.load_base(tmp_path))
    assert check.passed
    assert check.detail.endswith("left out on purpose: classifier.weight, cls.predictions.bias")


def test_files_that_change_meanwhile_are_no_reference(tmp_path):
    model = make_model_folder(tmp_path / "tiny", "llama")
    export_base(model, tmp_path / "deployment")

    def touch(line):
        if line.startswith("base: outputs"):
            plant(model, {})

    with pytest.raises(ModelError, match=r"model\.safetensors changed while it was read"):
        verify(tmp_path / "deployment", str(model), {}, VerifyOptions(threads=1, quick=True), progress=touch)
