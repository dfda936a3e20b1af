"""Task graphs with a soft prompt or a table of token ids: self-contained, checked before they are registered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from helpers.folds import export_folded
from helpers.runtime import ACTIVATIONS, random_adapter, write_adapter
from helpers.soft_prompts import TASKS
from helpers.tiny_models import VOCAB_SIZE, llama

from adalink.export.adapter import check as task_check
from adalink.export.adapter.check import check_ids_table, check_task_graph
from adalink.export.adapter.export import export_adapter
from adalink.export.adapter.session import OpenGraph
from adalink.export.adapter.task_graph import build_task_graph
from adalink.export.base.export import export_base
from adalink.runtime.deployment import Deployment
from adalink.runtime.errors import ConfigError, ContractError, GraphError, ManifestError
from adalink.runtime.storage.adapter import Adapter, make_adapter
from adalink.runtime.storage.embedding_table import EmbeddingTable
from adalink.runtime.storage.manifest_io import decode_manifest, read_manifest
from adalink.runtime.tasks.folding import ids_table

WIDTH, ROWS = 48, 6
ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
OTHERS = [task for task in TASKS if task != "words"]


def make(task: str, seed: int = 3, **changes: Any) -> Adapter:
    return random_adapter("sha256:" + "5a" * 32, WIDTH, seed, **(TASKS[task] | changes))


def exact(values: np.ndarray, dtype: str) -> np.ndarray:
    return values.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype).astype(np.float32)


def inputs(dtype: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return exact(rng.normal(size=(2, ROWS, WIDTH)), dtype), rng.integers(0, VOCAB_SIZE, (2, ROWS))


def expected(adapter: Adapter, x: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The whole output in PyTorch float64, with shape ``(batch, soft_tokens + seq, d)``."""
    weights = {name: torch.tensor(value, dtype=torch.float64) for name, value in adapter.weights.items()}
    result = torch.tensor(x, dtype=torch.float64)
    if adapter.config.input == "ids":
        result = result + weights["text.table.weight"][torch.tensor(ids)] @ weights["text.up.weight"].T
    elif adapter.config.rank:
        hidden = ACTIVATIONS[adapter.config.activation](
            result @ weights["text.down.weight"].T + weights["text.down.bias"]
        )
        result = result + hidden @ weights["text.up.weight"].T + weights["text.up.bias"]
    soft = weights.get("soft_prompt", torch.zeros(0, WIDTH, dtype=torch.float64))
    return torch.cat([soft.expand(len(x), -1, -1), result], dim=1).numpy()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("task", OTHERS)
def test_the_graph_is_the_whole_input_side(task: str, dtype: str) -> None:
    if TASKS[task].get("input") == "ids" and dtype == "bfloat16":
        return  # refused with the base, below
    adapter, (x, ids) = make(task), inputs(dtype)
    opened = OpenGraph(build_task_graph(adapter, task, dtype).SerializeToString(), dtype)
    others = {"input_ids": ids} if adapter.config.input == "ids" else {}
    soft_tokens = adapter.config.soft_tokens
    received, wanted = opened.run(x, others, soft_tokens), expected(adapter, x, ids)
    assert received.shape == wanted.shape == (2, soft_tokens + ROWS, WIDTH)
    np.testing.assert_array_equal(received[:, :soft_tokens], exact(wanted[:, :soft_tokens], dtype))
    np.testing.assert_allclose(received, wanted, rtol=2 * ROUNDOFF[dtype], atol=64 * ROUNDOFF["float32"])
    assert opened.metadata.get("soft_tokens", "0") == str(soft_tokens)
    assert opened.metadata.get("input", "embeddings") == adapter.config.input


def test_graphs_of_other_adapters_are_byte_for_byte_what_they_were() -> None:
    model = build_task_graph(make("words"), "words", "float32")
    assert [value.name for value in model.graph.input] == ["inputs_embeds"]
    assert not {"soft_tokens", "input"} & {entry.key for entry in model.metadata_props}
    assert {node.op_type for node in model.graph.node} == {"MatMul", "Add", "Gelu"}


@pytest.mark.parametrize("task", OTHERS)
def test_the_check_passes_the_right_graph_and_finds_a_changed_number(task: str) -> None:
    adapter, (x, ids) = make(task), inputs("float32")
    graph = OpenGraph(build_task_graph(adapter, task, "float32").SerializeToString(), "float32")
    check_task_graph(graph, adapter, "float32", x[0], ids[0])
    for name, value in adapter.weights.items():
        changed = value.copy()
        changed[ids[0, 0] if "table" in name else 0, ...] += np.float32(0.05)
        other = make_adapter(adapter.config, adapter.weights | {name: changed})
        with pytest.raises(GraphError, match="soft prompt is not what" if name == "soft_prompt" else "within"):
            check_task_graph(graph, other, "float32", x[0], ids[0])


def test_the_check_finds_a_graph_that_adapts_behind_a_soft_prompt_alone() -> None:
    model = build_task_graph(make("soft"), "soft", "float32")
    node = next(node for node in model.graph.node if node.op_type == "Concat" and node.attribute[0].i == 1)
    node.input[1] = "doubled"
    model.graph.node.insert(0, onnx.helper.make_node("Add", ["inputs_embeds", "inputs_embeds"], ["doubled"]))
    with pytest.raises(GraphError, match="without a modality were changed"):
        check_task_graph(
            OpenGraph(model.SerializeToString(), "float32"), make("soft"), "float32", inputs("float32")[0][0]
        )


def test_the_check_of_a_table_of_ids_finds_another_table(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = make("ids")
    rows = np.random.default_rng(1).normal(size=(VOCAB_SIZE, WIDTH)).astype(np.float32)
    table = EmbeddingTable(rows, "float32")
    check_ids_table(adapter, table, "float32", np.arange(VOCAB_SIZE))
    other = make_adapter(adapter.config, adapter.weights | {"text.up.weight": adapter.weights["text.up.weight"] * 2})
    monkeypatch.setattr(task_check, "ids_table", lambda _: ids_table(other))
    with pytest.raises(GraphError, match="table of token ids"):
        check_ids_table(adapter, table, "float32", np.arange(VOCAB_SIZE))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("input-side") / "deployment"
    export_base(llama(), folder)
    return folder


def own(folder: Path, task: str, **changes: Any) -> Adapter:
    base = read_manifest(folder).base
    return random_adapter(base.fingerprint, base.hidden_size, 9, **(TASKS[task] | changes))


def test_the_manifest_says_what_a_task_is(folder: Path, tmp_path: Path) -> None:
    entry = export_adapter(write_adapter(tmp_path / "soft", own(folder, "soft")), folder, replace=True).tasks["soft"]
    assert (entry.rank, entry.soft_tokens, entry.input) == (0, 5, "embeddings")
    entry = export_adapter(write_adapter(tmp_path / "ids", own(folder, "ids")), folder, replace=True).tasks["ids"]
    assert (entry.rank, entry.soft_tokens, entry.input) == (4, 0, "ids")
    data = (folder / "manifest.json").read_bytes()
    for right, wrong, field in (
        (b'"soft_tokens": 5', b'"soft_tokens": 0', r"rank is 0, expected 1 to 48"),
        (b'"soft_tokens": 5', b'"soft_tokens": 9999', r"soft_tokens is 9999"),
        (b'"input": "ids"', b'"input": "words"', r"input is 'words'"),
    ):
        with pytest.raises(ManifestError, match=field):
            decode_manifest(data.replace(right, wrong))


@pytest.mark.parametrize("fold", ["table", "rank"])
def test_a_bottleneck_is_folded_beside_its_soft_prompt(folder: Path, tmp_path: Path, fold: str) -> None:
    source = write_adapter(tmp_path / "both", own(folder, "both"))
    export_adapter(source, folder, name="plain", replace=True)
    export_folded(source, folder, "folded", fold)
    rows = [[5, 9, 33, 41], [7, 60, 12, 8]]
    with Deployment.open(folder) as deployment:
        expected = deployment.run(input_ids=rows, tasks="plain")["logits"]
        np.testing.assert_allclose(deployment.run(input_ids=rows, tasks="folded")["logits"], expected, atol=1e-5)
        plain, folded = (deployment.input_embeddings(rows, tasks=task) for task in ("plain", "folded"))
        np.testing.assert_allclose(folded, plain, atol=1e-5)


@pytest.mark.parametrize(("task", "reason"), [("soft", "has no bottleneck"), ("ids", "looks token ids up")])
def test_what_has_nothing_to_fold_is_refused(folder: Path, tmp_path: Path, task: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"{reason}: there is nothing to compute ahead"):
        export_adapter(write_adapter(tmp_path / task, own(folder, task)), folder, name="new", fold="table")


def test_what_is_a_lora_now_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="once 'rank', is what 'adalink export lora' writes"):
        export_adapter(write_adapter(tmp_path / "both", own(folder, "both")), folder, name="new", fold="rank")


def test_a_table_of_ids_is_refused_where_numpy_cannot_add(tmp_path: Path) -> None:
    export_base(llama(), tmp_path / "deployment", dtype="bfloat16", target="portable")
    source = write_adapter(tmp_path / "ids", own(tmp_path / "deployment", "ids"))
    with pytest.raises(ContractError, match="bfloat16"):
        export_adapter(source, tmp_path / "deployment")


def test_a_soft_prompt_beyond_the_bases_dtype_is_refused(tmp_path: Path) -> None:
    export_base(llama(), tmp_path / "deployment", dtype="float16")
    adapter = own(tmp_path / "deployment", "soft")
    huge = make_adapter(adapter.config, {"soft_prompt": adapter.weights["soft_prompt"] * np.float32(1e6)})
    with pytest.raises(ContractError, match="numbers beyond float16"):
        export_adapter(write_adapter(tmp_path / "soft", huge), tmp_path / "deployment")
