"""A plan is code: one that was exchanged after it was verified is not used, whenever it is loaded."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from adalink.runtime.device.workspace import ENGINE
from adalink.runtime.errors import IntegrityError
from adalink.runtime.trt.backend import TensorRtPlans


class FakeApi:
    """The library: calls ``meanwhile`` while it reads a plan."""

    def __init__(self, meanwhile: Callable[[], None]) -> None:
        self._meanwhile = meanwhile

    def make_runtime(self) -> FakeApi:
        return self

    def deserialize_cuda_engine(self, data: memoryview) -> object:
        self._meanwhile()
        return object()

    def runtime_config(self, engine: object) -> tuple[None, None]:
        return None, None

    def clear(self) -> None: ...


def exchange(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    other.replace(path)


def open_plans(folder: Path, meanwhile: Callable[[], None] = lambda: None) -> Any:
    (folder / "engine.plan").write_bytes(b"plan")
    (folder / "front.plan").write_bytes(b"plan")
    record = SimpleNamespace(profile=None, embedder_rank=1, embedder_slots=1, embedders={"gelu.ids": "front.plan"})
    device = SimpleNamespace(not_recording=nullcontext())
    return TensorRtPlans(FakeApi(meanwhile), device, folder, record)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "file"), [(ENGINE, "engine.plan"), ("gelu.ids", "front.plan")])
def test_plan_that_is_exchanged_before_it_is_loaded_is_not_used(tmp_path: Path, name: str, file: str) -> None:
    plans = open_plans(tmp_path)
    exchange(tmp_path / file)
    with pytest.raises(IntegrityError, match=rf"{file} was changed after it was verified"):
        plans._engine(name)


def test_plan_that_is_exchanged_while_it_is_loaded_is_not_used(tmp_path: Path) -> None:
    plans = open_plans(tmp_path, lambda: exchange(tmp_path / "engine.plan"))
    with pytest.raises(IntegrityError, match=r"engine\.plan was changed"):
        plans._engine(ENGINE)


def test_plan_that_is_what_it_was_is_used(tmp_path: Path) -> None:
    plans = open_plans(tmp_path)
    assert plans._engine(ENGINE) is plans._engine(ENGINE)
