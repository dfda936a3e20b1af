"""`adalink verify` on soft prompts and tables of token ids, and the faults it exists to find, each really planted."""

import shutil
from dataclasses import replace

import msgspec
import numpy as np
import onnx
import pytest
from helpers.host_device import HostBackend
from helpers.quick import slow_except
from helpers.runtime import random_adapter, reseal, write_adapter
from helpers.soft_prompts import TASKS
from helpers.tiny_deployments import make_model_folder
from helpers.tiny_models import llava
from helpers.tiny_tokenizer import make_tokenizer
from helpers.vision import clip_processor
from onnx import numpy_helper

from adalink.export.adapter.export import export_adapters
from adalink.export.base.export import export_base
from adalink.runtime import deployment as deployment_module
from adalink.runtime.errors import RequestError
from adalink.runtime.generation.padding import positions_of
from adalink.runtime.ort import dynamic_cache as onnxruntime_growing
from adalink.runtime.profile import Profile, ShapeRange
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.runtime.tasks import registry as tasks
from adalink.runtime.tasks.soft_prompt import SoftPromptLayout
from adalink.tools.parity import suite
from adalink.tools.parity.suite import VerifyOptions, verify

OWN = ["soft", "both", "ids"]


def make(root, family, names, targets=("onnxruntime-cpu",)):
    model, folder = make_model_folder(root / "tiny", family), root / "deployment"
    for target in targets:
        export_base(model, folder, target=target)
    base = read_manifest(folder).base
    sources = {
        name: write_adapter(root / name, random_adapter(base.fingerprint, base.hidden_size, seed, **TASKS[name]))
        for seed, name in enumerate(names)
    }
    export_adapters(sources, folder)
    return model, folder


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return make(tmp_path_factory.mktemp("clean"), "llama", OWN, ("onnxruntime-cpu", "portable"))


@pytest.fixture
def deployment(clean, tmp_path):
    """A copy to plant a fault in."""
    model, original = clean
    return model, shutil.copytree(original, tmp_path / "deployment")


def outcome(model, folder, **options):
    report = verify(folder, str(model), {}, VerifyOptions(threads=1, quick=True, **options))
    assert not report.skipped
    return {check.name: check.passed for check in report.checks}


def failures(model, folder, **options):
    return {name for name, passed in outcome(model, folder, **options).items() if not passed}


def concerning(found, task):
    return {name for name in found if f"/{task}/" in name}


@pytest.mark.parametrize("variant", ["onnxruntime-cpu", "portable"])
def test_clean_deployment_passes(clean, variant):
    results = outcome(*clean, variant=variant)
    assert all(results.values()), {name for name, passed in results.items() if not passed}
    assert {"adapter/soft/graph-soft-prompt", "adapter/ids/bank-vocabulary", "adapter/ids/graph-vocabulary"} <= set(
        results
    )
    assert {f"task/{task}/generation" for task in OWN} <= set(results)
    assert {"mixed/generation", "control/soft/logits", "swap/return"} <= set(results)


@pytest.mark.parametrize("family", slow_except(["bert", "t5", "gemma3"], "bert", "t5"))
def test_every_kind_of_base_passes(family, tmp_path):
    results = outcome(*make(tmp_path, family, ["soft", "asked", "ids-asked"]))
    assert all(results.values()), {name for name, passed in results.items() if not passed}


@pytest.mark.parametrize("in_place", slow_except([True, False], True), ids=["in-place", "growing"])
def test_an_engine_on_a_device_passes(clean, monkeypatch, in_place):
    """Main memory is the device; corners of the profile are reached with soft prompts as with text alone."""
    profile = Profile(batch=ShapeRange(1, 2, 3), seq=ShapeRange(1, 8, 16), past=ShapeRange(0, 16, 63))
    for module in (suite, deployment_module):
        monkeypatch.setattr(module, "open_backend", lambda name, threads=None: HostBackend(profile, in_place=in_place))
    results = outcome(*clean, variant="portable")
    assert all(results.values()), {name for name, passed in results.items() if not passed}
    assert "profile/batch=3,prompt=60/generation" in results


def test_a_base_that_takes_images_passes(tmp_path):
    model = tmp_path / "model"
    for part in (llava(), make_tokenizer(), clip_processor()):
        part.save_pretrained(model)
    folder = tmp_path / "deployment"
    export_base(model, folder)
    base = read_manifest(folder).base
    settings = {
        "soft-both": TASKS["both"] | {"modalities": ("image", "text")},
        "ids-asked": TASKS["ids-asked"],
    }
    sources = {
        name: write_adapter(tmp_path / name, random_adapter(base.fingerprint, base.hidden_size, 5, **own))
        for name, own in settings.items()
    }
    export_adapters(sources, folder)
    results = outcome(model, folder)
    assert all(results.values()), {name for name, passed in results.items() if not passed}
    assert {f"task/{task}/images/logits" for task in settings} <= set(results)


def test_a_quantised_base_passes(deployment, tmp_path):
    model, folder = deployment
    export_base(model, folder, quantization="int4")
    results = outcome(model, folder, variant="int4")
    assert all(results.values()), {name for name, passed in results.items() if not passed}
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(RequestError, match="exact match of ids cannot be measured: it has a table of token ids"):
        outcome(model, folder, variant="int4", task_rows={"ids": rows})


def test_a_soft_prompt_of_another_scale(clean, monkeypatch):
    """As if the model's embedding module scaled it, by one percent."""
    made = tasks.soft_prompts_of
    monkeypatch.setattr(
        tasks,
        "soft_prompts_of",
        lambda *given: [replace(prompt, vectors=prompt.vectors * np.float32(1.01)) for prompt in made(*given)],
    )
    found = failures(*clean)
    assert {"task/soft/logits", "task/soft/decode-logits", "task/both/logits"} <= found
    assert not concerning(found, "ids")


def test_a_table_of_ids_of_another_scale(clean, monkeypatch):
    made = tasks.ids_table
    monkeypatch.setattr(
        tasks, "ids_table", lambda adapter: replace(made(adapter), up=made(adapter).up * np.float32(1.01))
    )
    found = failures(*clean)
    assert {"adapter/ids/bank-vocabulary", "task/ids/logits"} <= found
    assert not concerning(found, "soft") | concerning(found, "both")


def test_a_soft_prompt_behind_the_first_token(clean, monkeypatch):
    prepend = SoftPromptLayout.prepend

    def behind(self, embeds, modality):
        wide, indices = prepend(self, embeds, modality)
        for row, where, _ in self._prompt_slices():
            moved = np.r_[where.stop, where]
            wide[row, where.start : where.stop + 1] = wide[row, moved]
            indices[row, where.start : where.stop + 1] = indices[row, moved]
        return wide, indices

    monkeypatch.setattr(SoftPromptLayout, "prepend", behind)
    found = failures(*clean)
    assert {"task/soft/logits", "task/soft/generation", "task/both/logits"} <= found
    assert not concerning(found, "ids")


def test_a_bottleneck_that_acts_on_the_soft_prompt(clean, monkeypatch):
    prepend = SoftPromptLayout.prepend
    monkeypatch.setattr(
        SoftPromptLayout,
        "prepend",
        lambda self, *given: (prepend(self, *given)[0], np.zeros(self.mask.shape, np.int64)),
    )
    found = failures(*clean)
    assert {"task/both/logits", "task/both/decode-logits"} <= found
    assert not concerning(found, "soft") | concerning(found, "ids")


def test_positions_that_do_not_count_from_the_soft_prompt(clean, monkeypatch):
    """Tokens numbered from 0 behind a soft prompt of five: only where an engine is given its positions."""

    def from_the_text(mask):
        positions = positions_of(mask)
        return np.maximum(positions - 5, 0) if mask.shape[1] > 5 else positions

    monkeypatch.setattr(onnxruntime_growing, "positions_of", from_the_text)
    assert {"task/soft/logits", "task/soft/decode-logits"} <= failures(*clean, variant="portable")


def test_outputs_of_the_position_before(clean, monkeypatch):
    monkeypatch.setattr(
        SoftPromptLayout,
        "strip",
        lambda self, output: (
            output if self.is_empty else np.take_along_axis(output, np.maximum(self._columns - 1, 0)[..., None], axis=1)
        ),
    )
    found = failures(*clean)
    assert {"task/soft/logits", "task/soft/top1", "task/both/logits"} <= found
    assert not concerning(found, "ids")


def test_a_row_of_a_mixed_batch_laid_out_as_another(clean, monkeypatch):
    """Every row begins with the longest soft prompt of its batch: rows alone are right."""
    created = SoftPromptLayout.__init__

    def longest(self, mask, prompts, base):
        most = max((prompt for prompt in prompts if prompt), key=lambda own: len(own.vectors), default=None)
        created(self, mask, [most] * len(prompts), base)

    monkeypatch.setattr(SoftPromptLayout, "__init__", longest)
    found = failures(*clean)
    assert {"mixed/logits", "mixed/generation"} <= found
    assert not {name for name in found if name.startswith("task/")}


@pytest.mark.parametrize("fault", ["number", "order"])
def test_a_task_graph_with_another_soft_prompt(deployment, fault):
    model, folder = deployment
    path = folder / "tasks/both/adapter.onnx"
    graph = onnx.load(path)
    if fault == "number":
        (tensor,) = (own for own in graph.graph.initializer if own.name == "soft_prompt")
        values = numpy_helper.to_array(tensor).copy()
        values[1, 7] = np.nextafter(values[1, 7], np.float32(9))
        tensor.CopyFrom(numpy_helper.from_array(values, "soft_prompt"))
    else:
        node = graph.graph.node[-1]
        first, second = node.input
        node.input[:] = [second, first]
    path.write_bytes(graph.SerializeToString())
    reseal(folder)
    wrong = {"number": set(), "order": {"adapter/both/graph-vocabulary", "adapter/both/graph-weights"}}[fault]
    assert failures(model, folder) == {"adapter/both/graph-soft-prompt"} | wrong


def test_a_manifest_that_says_otherwise(deployment):
    model, folder = deployment
    manifest = read_manifest(folder)
    own = msgspec.structs.replace(manifest.tasks["soft"], soft_tokens=6)
    reseal(folder, tasks={**manifest.tasks, "soft": own})
    assert failures(model, folder) == {"adapter/soft/contract"}
