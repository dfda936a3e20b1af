"""Folded tasks: every token within the graph's bound, used for token ids alone, refused where they make no sense."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.folds import export_folded
from helpers.runtime import random_adapter, reseal, write_adapter
from helpers.tiny_models import FAMILIES
from helpers.tiny_tokenizer import make_tokenizer
from safetensors.numpy import load_file, save_file

from adalink.export.adapter import folding as fold_module
from adalink.export.adapter.export import export_adapter
from adalink.export.base.export import export_base
from adalink.runtime import Deployment
from adalink.runtime.errors import ConfigError, GraphError, IntegrityError
from adalink.runtime.storage.adapter import Adapter
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.tools.parity.reference.float64_adapter import exact_adapter

D, V = 48, 96


def make(fingerprint: str, seed: int, **changes: Any) -> Adapter:
    settings = {"rank": 5, "activation": "gelu", "bias": True, "scope": "all"} | changes
    return random_adapter(fingerprint, D, seed, **settings)


@pytest.fixture(scope="module", params=["float32", "float16", "bfloat16"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "deployment"
    target = "portable" if request.param == "bfloat16" else "onnxruntime-cpu"
    export_base(
        FAMILIES["llama"](),
        folder,
        dtype=request.param,
        target=target,
        tokenizer=make_tokenizer(),
        modalities=("text", "image"),
    )
    return folder


@pytest.fixture
def deployment(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "deployment"))


@pytest.mark.parametrize("fold", ["table", "rank"])
@pytest.mark.parametrize("changes", [{}, {"activation": "silu", "bias": False, "rank": 48}, {"activation": "relu"}])
def test_every_token_within_the_bound(deployment: Path, tmp_path: Path, fold: str, changes: dict[str, Any]) -> None:
    manifest = read_manifest(deployment)
    dtype = manifest.base.embedding_dtype
    adapter = make(manifest.base.fingerprint, 1, **changes)
    source = write_adapter(tmp_path / "topics", adapter)
    if dtype == "bfloat16":  # for other hosts: the CPU provider runs no base of this dtype
        if fold == "table":
            entry = export_adapter(source, deployment, fold=fold).tasks["topics"].fold
            assert entry is not None
            assert (deployment / entry.path).stat().st_size == pytest.approx(V * D * 2, abs=256)
        return
    export_adapter(source, deployment, name="plain")
    export_folded(source, deployment, "topics", fold)
    ids = np.arange(V).reshape(2, -1)
    with Deployment.open(deployment, threads=1) as opened:
        embeds = opened.input_embeddings(ids)
        adapted = opened.input_embeddings(ids, tasks="topics")
        assert adapted.dtype == np.dtype(dtype)
        exact = exact_adapter(adapter, "text", embeds.reshape(V, D).astype(np.float64), dtype)
        assert (np.abs(adapted.reshape(V, D).astype(np.float64) - exact.output) <= exact.bound).all()
        # Given embeddings, and batches of several tasks, go through the weights: the bits of the unfolded task.
        unfolded = opened.input_embeddings(ids, tasks="plain")
        np.testing.assert_array_equal(opened.input_embeddings(inputs_embeds=embeds, tasks="topics"), unfolded)
        np.testing.assert_array_equal(opened.input_embeddings(ids, tasks=["topics", None])[0], unfolded[0])
        modality = np.ones(ids.shape, np.int64)
        np.testing.assert_array_equal(opened.input_embeddings(ids, tasks="topics", modality=modality), embeds)
        texts = [opened.generate(["wheat"], tasks=name, max_new_tokens=8)[0] for name in ("topics", "plain")]
        if dtype == "float32":
            assert texts[0] == texts[1]


def test_a_folded_table_is_the_embedding_table_of_another_host(llama: Any, tmp_path: Path) -> None:
    """Read with the format's own library: the file alone, with the base graph, is the task."""
    folder = Path(shutil.copytree(llama.folder, tmp_path / "deployment"))
    export_adapter(llama.sources / "alpha", folder, name="folded", fold="table")
    (tensor,) = load_file(folder / "tasks/folded/embeddings.safetensors").values()
    with Deployment.open(folder, threads=1) as opened:
        np.testing.assert_array_equal(tensor, opened.input_embeddings([range(V)], tasks="alpha")[0])
        ids = np.array([[5, 40, 7]])
        np.testing.assert_array_equal(
            opened.run(inputs_embeds=tensor[ids])["logits"], opened.run(input_ids=ids, tasks="alpha")["logits"]
        )


@pytest.mark.parametrize("fold", ["table", "rank"])
def test_memory_of_a_folded_task_is_counted(llama: Any, tmp_path: Path, fold: str) -> None:
    folder = Path(shutil.copytree(llama.folder, tmp_path / "deployment"))
    entry = export_folded(llama.sources / "alpha", folder, "folded", fold).fold
    assert entry is not None
    with Deployment.open(folder, threads=1) as opened:
        weights = opened._tasks.get("alpha").size
        assert opened._tasks.get("folded").size == weights + (folder / entry.path).stat().st_size


def test_scope_prompt_holds_for_a_folded_task(llama: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama.folder, tmp_path / "deployment"))
    export_folded(llama.sources / "prompted", folder, "folded", "rank")
    with Deployment.open(folder, threads=1) as opened:
        results = [opened.generate(["wheat"], tasks=name, max_new_tokens=8)[0] for name in ("folded", "prompted")]
    assert results[0] == results[1]


def test_only_text_alone_can_be_folded(llama: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama.folder, tmp_path / "deployment"))
    with pytest.raises(ConfigError, match=r"adapts image, text: only an adapter of text alone.*without --fold"):
        export_adapter(llama.sources / "double", folder, name="x", fold="table")
    with pytest.raises(ConfigError, match="fold is 'half', expected table; the bottleneck of every token, once 'rank'"):
        export_adapter(llama.sources / "alpha", folder, name="x", fold="half")
    assert "x" not in read_manifest(folder).tasks


def test_a_wrong_fold_is_not_registered(llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One value of one token, changed by one percent."""
    folder = Path(shutil.copytree(llama.folder, tmp_path / "deployment"))
    check = fold_module.check_fold

    def spoiled(fold: str, data: np.ndarray, adapter: Any, base: Any, table: np.ndarray) -> None:
        tensor = data[-4 * table.shape[0] * table.shape[1] :].view(np.float32).reshape(table.shape)
        tensor[77, 3] += 0.01 * np.abs(tensor).max()
        check(fold, data, adapter, base, table)

    monkeypatch.setattr(fold_module, "check_fold", spoiled)
    with pytest.raises(GraphError, match=r"folded task \(table\): component \d+ of token 77 "):
        export_adapter(llama.sources / "alpha", folder, name="x", fold="table")


def test_a_fold_of_another_shape_is_refused_when_it_is_loaded(llama: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama.folder, tmp_path / "deployment"))
    for kind, name in (("table", "embeddings"), ("rank", "hidden")):
        export_folded(llama.sources / "alpha", folder, kind, kind)
        save_file({name: np.zeros((V, 4), np.float32)}, folder / f"tasks/{kind}/{name}.safetensors")
    reseal(folder)
    with Deployment.open(folder, threads=1) as opened:
        for kind in ("table", "rank"):
            with pytest.raises(IntegrityError, match=rf"tasks/{kind}/.*expected one tensor .*it holds .*\(96, 4\)"):
                opened.input_embeddings([[5]], tasks=kind)
    rank = llama.adapters["alpha"].config.rank
    for kind, name, width in (("table", "embeddings", D), ("rank", "hidden", rank)):
        tensors = {name: np.zeros((V, width), np.float32), "more": np.zeros((2, 3), np.float32)}
        save_file(tensors, folder / f"tasks/{kind}/{name}.safetensors")
    reseal(folder)
    with Deployment.open(folder, threads=1) as opened:
        for kind in ("table", "rank"):
            with pytest.raises(IntegrityError, match=rf"tasks/{kind}/.*expected one tensor .*more of float32"):
                opened.input_embeddings([[5]], tasks=kind)
