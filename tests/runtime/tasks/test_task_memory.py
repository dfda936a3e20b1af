"""Weights of tasks in memory: mapped once, let go in the order of their last use, loaded again, kept while used."""

from __future__ import annotations

import gc
import os
import shutil
import sys
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers.runtime import random_adapter, write_adapter

from adalink.export.adapter.export import export_adapters
from adalink.runtime import Deployment
from adalink.runtime.errors import ContractError, IntegrityError, RequestError
from adalink.runtime.ort.backend import OnnxRuntimeBackend
from adalink.runtime.storage import mmap as file_memory
from adalink.runtime.storage.mmap import map_file, read_file

NAMES = [f"task-{index}" for index in range(6)]
IDS = [[5, 9, 40]]


@pytest.fixture(scope="module")
def many(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny deployment with six more tasks of one size."""
    root = tmp_path_factory.mktemp("many")
    folder = Path(shutil.copytree(llama.folder, root / "deployment"))
    config = llama.adapters["alpha"].config
    settings: dict[str, Any] = {"rank": 4, "activation": "gelu", "bias": False, "scope": "all"}
    sources = {
        name: write_adapter(root / name, random_adapter(config.base_fingerprint, 48, seed, **settings))
        for seed, name in enumerate(NAMES)
    }
    export_adapters(sources, folder)
    return folder


SIZE = 2 * 4 * 48 * 4


def loaded(opened: Deployment) -> set[str]:
    return set(opened._tasks._loaded.entries)


@pytest.mark.skipif(os.name != "posix", reason="files are read, not mapped")
@pytest.mark.parametrize("answer", [None, file_memory._FAILED])
def test_a_file_that_the_system_does_not_map_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: int | None
) -> None:
    """As where a process has more maps than it may; an address that is none must not be looked at."""
    data = np.random.default_rng(0).integers(0, 256, 10_001, np.uint8).tobytes()
    (tmp_path / "file").write_bytes(data)
    refusing = SimpleNamespace(mmap=lambda *arguments: answer, munmap=lambda *arguments: 0)
    monkeypatch.setattr(file_memory, "_library", lambda: refusing)
    with (tmp_path / "file").open("rb") as stream:
        assert file_memory._map(stream.fileno(), len(data)) is None
    assert map_file(tmp_path / "file").tobytes() == data


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_deployed_task_is_a_map_without_a_descriptor_until_nobody_uses_it(many: Path) -> None:
    def maps() -> int:
        return Path("/proc/self/maps").read_text().count("task-3/adapter_model.safetensors")

    with Deployment.open(many) as opened:
        opened.load_task("task-2")
        open_files = len(list(Path("/proc/self/fd").iterdir()))
        assert maps() == 0
        opened.load_task("task-3")
        assert maps() == 1
        assert len(list(Path("/proc/self/fd").iterdir())) == open_files
        selection = opened._tasks.resolve("task-3", 1)
        (part,) = selection._groups
        assert not part.weights["down"].flags.writeable
        assert part.weights["down"].ctypes.data % 64 == 0
        before = opened.input_embeddings(IDS, tasks="task-3")
        opened.unload_task("task-3")
        gc.collect()
        assert maps() == 1, "the selection still uses it"
        np.testing.assert_array_equal(selection.apply(opened.input_embeddings(IDS)), before)
        del selection, part
        gc.collect()
        assert maps() == 0


def test_a_file_is_the_same_mapped_and_read(tmp_path: Path) -> None:
    for size in (0, 1, 4095, 4096, 100_001):
        data = np.random.default_rng(size).integers(0, 256, size, np.uint8).tobytes()
        (tmp_path / "file").write_bytes(data)
        for memory in (map_file(tmp_path / "file"), read_file(tmp_path / "file")):
            assert memory.tobytes() == data
            assert size == 0 or memory.ctypes.data % 64 == 0


def test_an_added_task_is_found_again_from_another_folder(
    many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(many / "tasks" / "task-5", tmp_path / "added")
    monkeypatch.chdir(tmp_path)
    with Deployment.open(many) as opened:
        opened.add_task("added")
        opened.unload_task("added")
        monkeypatch.chdir(many)
        np.testing.assert_array_equal(
            opened.input_embeddings(IDS, tasks="added"), opened.input_embeddings(IDS, tasks="task-5")
        )


def test_all_tasks_of_a_kind_share_one_graph(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened_kinds: list[str] = []
    open_bank = OnnxRuntimeBackend.open_bank

    def count(self: OnnxRuntimeBackend, kind: str, graph: bytes, base: Any) -> Any:
        opened_kinds.append(kind)
        return open_bank(self, kind, graph, base)

    monkeypatch.setattr(OnnxRuntimeBackend, "open_bank", count)
    with Deployment.open(many) as opened:
        for _ in range(2):
            opened.input_embeddings([*IDS, *IDS, *IDS, *IDS], tasks=["task-0", "task-1", "alpha", "prompted"])
            opened.unload_task("task-0")
    assert sorted(opened_kinds) == ["gelu", "identity_bias"]


def test_the_least_recently_used_task_goes_first(many: Path) -> None:
    with Deployment.open(many, task_memory_bytes=2 * SIZE) as opened:
        for name in ("task-0", "task-1", "task-0", "task-2"):
            opened.input_embeddings(IDS, tasks=name)
        assert loaded(opened) == {"task-0", "task-2"}
        opened.input_embeddings([*IDS, *IDS, *IDS], tasks=["task-2", None, "task-4"])
        assert loaded(opened) == {"task-2", "task-4"}
        opened.unload_task("task-2")
        opened.input_embeddings(IDS, tasks="task-5")
        assert loaded(opened) == {"task-4", "task-5"}


@pytest.mark.parametrize("room", [1, 2, 4])
def test_any_order_of_use_keeps_the_latest(many: Path, room: int) -> None:
    rng = np.random.default_rng(room)
    expected: OrderedDict[str, None] = OrderedDict()
    with Deployment.open(many) as plain:
        outputs = {name: plain.input_embeddings(IDS, tasks=name) for name in NAMES}
    with Deployment.open(many, task_memory_bytes=room * SIZE + 7) as opened:
        for _ in range(300):
            name = NAMES[rng.integers(len(NAMES))]
            np.testing.assert_array_equal(opened.input_embeddings(IDS, tasks=name), outputs[name])
            expected[name] = None
            expected.move_to_end(name)
            while len(expected) > room:
                expected.popitem(last=False)
            assert loaded(opened) == set(expected)
            assert opened._tasks._loaded.size == len(expected) * SIZE


def test_a_batch_larger_than_the_budget_is_served_whole(many: Path) -> None:
    with Deployment.open(many) as plain, Deployment.open(many, task_memory_bytes=1) as opened:
        ids = IDS * len(NAMES)
        np.testing.assert_array_equal(
            opened.input_embeddings(ids, tasks=NAMES), plain.input_embeddings(ids, tasks=NAMES)
        )
        texts = [
            [row.token_ids for row in each.generate(["wheat"] * 6, tasks=NAMES, max_new_tokens=5)]
            for each in (opened, plain)
        ]
        assert texts[0] == texts[1]
        assert len(loaded(opened)) == 1
    with pytest.raises(RequestError, match="task_memory_bytes is 0"):
        Deployment.open(many, task_memory_bytes=0)


def test_what_is_loaded_again_is_checked_again(many: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(many, tmp_path / "copy"))
    added = Path(shutil.copytree(many / "tasks" / "task-5", tmp_path / "added"))
    with Deployment.open(folder) as opened:
        before = opened.input_embeddings(IDS, tasks="task-0")
        opened.add_task(added)
        opened.unload_task("added")
        np.testing.assert_array_equal(
            opened.input_embeddings(IDS, tasks="added"), opened.input_embeddings(IDS, tasks="task-5")
        )
        opened.unload_task("added")
        opened.unload_task("task-0")
        shutil.copyfile(many / "tasks" / "task-1" / "adapter_model.safetensors", added / "adapter_model.safetensors")
        with pytest.raises(ContractError, match=r"added: adapter sha256:.*expected was sha256:.*add the adapter again"):
            opened.input_embeddings(IDS, tasks="added")
        path = folder / "tasks" / "task-0" / "adapter_model.safetensors"
        good = path.read_bytes()
        path.unlink()
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(IntegrityError, match=r"task-0/adapter_model\.safetensors has digest"):
            opened.input_embeddings(IDS, tasks="task-0")
        path.unlink()
        path.write_bytes(good)
        np.testing.assert_array_equal(opened.input_embeddings(IDS, tasks="task-0"), before)
