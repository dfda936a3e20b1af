"""Small real deployments, exported once a session."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from helpers.runtime import Tiny, build
from helpers.vision_deployments import VisionCases, VisionDeployment, VisionDeployments

from adalink.runtime import Deployment
from adalink.runtime.ort.static_cache import StaticCacheDecodeState


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return build("llama", tmp_path_factory.mktemp("llama"), ("text", "image"))


@pytest.fixture(scope="module")
def deployment(llama: Tiny) -> Iterator[Deployment]:
    with Deployment.open(llama.folder) as opened:
        yield opened


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return build("bert", tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return build("t5", tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="session")
def vision_deployments(tmp_path_factory: pytest.TempPathFactory) -> VisionDeployments:
    return VisionDeployments(tmp_path_factory.mktemp("vision_deployments"))


@pytest.fixture(scope="session")
def vision_cases(vision_deployments: VisionDeployments) -> Iterator[VisionCases]:
    made = VisionCases(vision_deployments)
    yield made
    for case in made.values():
        case.opened.close()


@pytest.fixture(scope="session")
def vision_deployment(vision_deployments: VisionDeployments) -> VisionDeployment:
    return vision_deployments["llava"]


@pytest.fixture
def resumed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many positions were known of each prompt that went on from the prefix cache."""
    counts: list[int] = []
    begin = StaticCacheDecodeState.begin

    def note(self: StaticCacheDecodeState, states: Any) -> None:
        if states is not None:
            counts.append(states.shape[2])
        begin(self, states)

    monkeypatch.setattr(StaticCacheDecodeState, "begin", note)
    return counts
