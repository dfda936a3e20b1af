"""`adalink verify` on PaliGemma: a clean deployment passes, and what is particular of it is found when it is wrong."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest
from helpers.host_device import HostBackend
from helpers.runtime import reseal
from helpers.tiny_models import paligemma
from helpers.tiny_tokenizer import make_prefix_tokenizer
from helpers.vision import siglip_processor
from helpers.vision_deployments import build_seeing_prefix

from adalink.export.base import modules as graph_modules
from adalink.export.base.export import export_base
from adalink.runtime import deployment as deployment_module
from adalink.runtime.profile import Profile, ShapeRange
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.tools.parity import suite


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    paligemma().save_pretrained(folder)
    make_prefix_tokenizer().save_pretrained(folder)
    siglip_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_seeing_prefix(tmp_path_factory.mktemp("clean")).folder


def failures(model: Path, folder: Path) -> set[str]:
    report = suite.verify(folder, str(model), {}, suite.VerifyOptions(threads=1, quick=True))
    assert {"base/tokenizer", "base/images/logits", "task/both/generation", "mixed/images/decode-logits"} <= {
        check.name for check in report.checks
    }
    return {check.name for check in report.checks if not check.passed}


def test_a_clean_deployment_passes(model: Path, clean: Path) -> None:
    assert failures(model, clean) == set()


def test_a_prompt_that_is_causal_is_found(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_modules, "prompt_mask", graph_modules.causal_mask)
    found = failures(model, build_seeing_prefix(tmp_path).folder)
    assert found >= {"base/logits", "base/images/logits", "base/decode-logits", "task/both/images/logits"}


def test_a_prompt_whose_last_position_only_itself_sees_is_found(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def early(inputs_embeds, attention_mask, window):
        keys, queries = graph_modules._positions(inputs_embeds, attention_mask)
        in_prompt = (queries[:1] == 0) & (keys < queries[-1:])
        seen = graph_modules._causal(keys, queries, window) | in_prompt
        return graph_modules._additive(seen[None, None] & (attention_mask[:, None, None, :] != 0))

    monkeypatch.setattr(graph_modules, "prompt_mask", early)
    assert failures(model, build_seeing_prefix(tmp_path).folder) >= {"base/logits", "base/decode-logits"}


@pytest.mark.parametrize("in_place", [True, False], ids=["in-place", "growing"])
def test_an_engine_of_limited_shapes_passes_at_its_corners(
    model: Path, clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_place: bool
) -> None:
    folder = shutil.copytree(clean, tmp_path / "deployment")
    export_base(model, folder, target="portable")
    profile = Profile(batch=ShapeRange(1, 2, 3), seq=ShapeRange(1, 8, 24), past=ShapeRange(0, 16, 63))
    for module in (suite, deployment_module):
        monkeypatch.setattr(module, "open_backend", lambda name, threads=None: HostBackend(profile, in_place=in_place))
    report = suite.verify(folder, str(model), {}, suite.VerifyOptions(variant="portable", quick=True))
    assert {check.name for check in report.checks if not check.passed} == set()
    profile_limits = {check.name.split("/")[1] for check in report.checks if check.name.startswith("profile/")}
    assert profile_limits == {"batch=1,prompt=1", "batch=1,prompt=24", "batch=3,prompt=1", "batch=3,prompt=8"}
    assert "base/images/logits" in {check.name for check in report.checks}


def test_another_form_of_prompts_is_found(model: Path, clean: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(clean, tmp_path / "deployment")
    base = read_manifest(folder).base
    form = msgspec.structs.replace(base.vision.prompt_form, after="")
    vision = msgspec.structs.replace(base.vision, prompt_form=form)
    reseal(folder, base=msgspec.structs.replace(base, vision=vision))
    assert "base/tokenizer" in failures(model, folder)
