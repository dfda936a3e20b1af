"""Random tasks in random batches against PyTorch, while threads add, replace, let go and remove them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.runtime import random_adapter, write_adapter
from helpers.tiny_models import FAMILIES

from adalink.export.base.export import export_base
from adalink.runtime import Deployment
from adalink.runtime.errors import UnknownTaskError
from adalink.runtime.storage.adapter import Adapter
from adalink.runtime.storage.adapter_spec import ACTIVATIONS
from adalink.runtime.storage.lru import LruTable
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.tools.parity.reference.float64_adapter import exact_adapter

POOL = 24
THREADS, STEPS = 4, 120
D, VOCABULARY = 48, 96


class World:
    """A deployment on disk without tasks, and a pool of adapters that may become some."""

    def __init__(self, root: Path, dtype: str) -> None:
        self.dtype = dtype
        self.folder = root / "deployment"
        export_base(FAMILIES["llama"](), self.folder, dtype=dtype)
        fingerprint = read_manifest(self.folder).base.fingerprint
        rng = np.random.default_rng(11)
        self.adapters: list[Adapter] = []
        self.sources: list[Path] = []
        for index in range(POOL):
            settings: dict[str, Any] = {
                "rank": int(rng.choice([1, 2, 3, 5, 8, 16, 31, 48])),
                "activation": str(rng.choice(ACTIVATIONS)),
                "bias": bool(rng.integers(2)),
                "scope": "prompt" if rng.integers(4) == 0 else "all",
            }
            self.adapters.append(random_adapter(fingerprint, D, 100 + index, **settings))
            self.sources.append(write_adapter(root / f"source-{index}", self.adapters[-1]))

    def is_adapted(self, received: np.ndarray, plain: np.ndarray, index: int | None) -> bool:
        """Whether a row, shape ``(seq, d)``, is the plain one under adapter ``index`` of the pool."""
        if index is None:
            return received.tobytes() == plain.tobytes()
        exact = exact_adapter(self.adapters[index], "text", plain.astype(np.float64), self.dtype)
        return bool((np.abs(received.astype(np.float64) - exact.output) <= exact.bound).all())


@pytest.fixture(scope="module", params=["float32", "float16"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def opened(world: World) -> Iterator[Deployment]:
    # Room for a few tasks of the pool only: most uses load again what another one made go.
    with Deployment.open(world.folder, threads=1, task_memory_bytes=3 * 2 * 16 * D * 4) as deployment:
        yield deployment


def check_batch(
    world: World, opened: Deployment, names: list[str | None], own: list[int | None], ids: Any
) -> list[str]:
    """Run one batch as a prompt and as generated tokens; what is wrong with it."""
    plain, wrong = opened.input_embeddings(ids), []
    selection = opened._tasks.resolve(names, len(names))
    whole, stacked = selection.apply(plain), selection.for_decoding().apply(plain)
    for row, index in enumerate(own):
        if not world.is_adapted(whole[row], plain[row], index):
            wrong.append(f"row {row}, adapter {index}")
        generated = None if index is not None and world.adapters[index].config.scope == "prompt" else index
        if not world.is_adapted(stacked[row], plain[row], generated):
            wrong.append(f"generated row {row}, adapter {index}")
    return wrong


def test_random_batches_equal_pytorch(world: World, opened: Deployment) -> None:
    for index, source in enumerate(world.sources):
        opened.add_task(source, f"task-{index}")
    rng = np.random.default_rng(1)
    for _ in range(60):
        batch, length = int(rng.integers(1, 9)), int(rng.integers(1, 6))
        own = [None if rng.integers(5) == 0 else int(rng.integers(POOL)) for _ in range(batch)]
        names = [None if index is None else f"task-{index}" for index in own]
        assert check_batch(world, opened, names, own, rng.integers(0, VOCABULARY, (batch, length))) == []


def work(world: World, opened: Deployment, seed: int, failures: list[str]) -> None:
    """One thread's random life: tasks of its own, and one name that all threads give to one of two adapters."""
    rng = np.random.default_rng(seed)
    mine: dict[str, int] = {}

    def add(name: str) -> None:
        mine[name] = int(rng.integers(POOL))
        opened.add_task(world.sources[mine[name]], name)

    try:
        for step in range(STEPS):
            name = f"thread{seed}-{rng.integers(4)}"
            match rng.choice(["add", "replace", "unload", "remove", "shared", "run", "run"]):
                case "add" if name not in mine:
                    add(name)
                case "replace" if name in mine:
                    opened.remove_task(name)
                    add(name)
                case "unload" if name in mine:
                    opened.unload_task(name)
                case "remove" if name in mine:
                    opened.remove_task(name)
                    del mine[name]
                    failures += check_gone(opened, name)
                case "shared" if seed == 0:
                    opened.remove_task("shared")
                    opened.add_task(world.sources[step % 2], "shared")
                case _:
                    names = [None, *rng.choice(list(mine), 4)] if mine else [None]
                    own = [None if each is None else mine[each] for each in names]
                    ids = rng.integers(0, VOCABULARY, (len(names), 3))
                    failures += check_batch(world, opened, names, own, ids)
                    failures += check_shared(world, opened, ids)
    except Exception as error:
        failures.append(f"thread {seed}: {error!r}")


def check_gone(opened: Deployment, name: str) -> list[str]:
    try:
        opened.input_embeddings([[1]], tasks=name)
    except UnknownTaskError:
        return []
    return [f"{name} still runs"]


def check_shared(world: World, opened: Deployment, ids: np.ndarray) -> list[str]:
    """All rows of one batch have the same of the two adapters, whichever it is at the time; it may be between them."""
    names = [None, "shared", "shared"]
    ids = np.resize(ids, (3, 3))
    try:
        adapted = opened.input_embeddings(ids, tasks=names)
    except UnknownTaskError:
        return []
    plain = opened.input_embeddings(ids)
    fits = [all(world.is_adapted(adapted[row], plain[row], index) for row in (1, 2)) for index in (0, 1)]
    return [] if sum(fits) == 1 else [f"shared is {fits}"]


def run_threads(world: World, opened: Deployment) -> list[str]:
    opened.add_task(world.sources[0], "shared")
    failures: list[str] = []
    threads = [threading.Thread(target=work, args=(world, opened, seed, failures)) for seed in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert opened._tasks._loaded.size == sum(loaded.size for loaded in opened._tasks._loaded.entries.values())
    return failures


def test_adding_replacing_letting_go_and_removing_under_threads(world: World, opened: Deployment) -> None:
    assert run_threads(world, opened) == []


def test_a_table_that_forgets_to_drop_a_replaced_task_is_found(
    world: World, opened: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: a removed task's weights stay, so that its name goes on with them after it was given to another."""
    put = LruTable.put

    def first_come(self: Any, name: str, *loaded: Any) -> Any:
        return self.entries.get(name) or put(self, name, *loaded)

    monkeypatch.setattr(LruTable, "put", first_come)
    monkeypatch.setattr(LruTable, "pop", lambda self, name: None)
    opened._tasks._loaded._budget = None
    assert any("adapter" in failure for failure in run_threads(world, opened))
