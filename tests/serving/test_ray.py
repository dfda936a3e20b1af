"""Ray Serve on two cores: a replica that is killed, a task that is added, a rolling update, metrics of all replicas."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest
from helpers.ray_cluster import Cluster, Crowd, ray_cluster, read_answer
from helpers.runtime import Tiny
from helpers.served import wait_for

from adalink.export.adapter.export import export_adapter
from adalink.runtime import Deployment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install '.[ray]'"),
]

PROMPTS = ["oil", "7", "crude oil, 1987"]  # each task continues them otherwise
TOKENS = 40


@pytest.fixture(scope="module")
def folder(llama: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(llama.folder, tmp_path_factory.mktemp("shared") / "deployment"))


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[tuple[str, str], str]:
    texts = {}
    with Deployment.open(folder, threads=1) as deployment:
        for task in (None, "alpha", "beta", "prompted"):
            for prompt in PROMPTS:
                name = task or deployment.manifest.base.name
                texts[name, prompt] = deployment.generate([prompt], tasks=task, max_new_tokens=TOKENS)[0].text
    assert len(set(texts.values())) == len(texts)  # a wrong task would be seen
    return texts


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with ray_cluster(cpus=3) as cluster:
        yield cluster


@pytest.fixture
def two(cluster: Cluster, folder: Path) -> Cluster:
    cluster.run(deployment=str(folder), replicas=2, slots=8)
    wait_for(lambda: len(cluster.replica_pids()) == 2, 30)
    return cluster


def models_of_replicas(cluster: Cluster, asks: int = 40) -> dict[str, set[str]]:
    """Models that each replica lists."""
    found: dict[str, set[str]] = {}
    for _ in range(asks):
        answer = httpx.get(f"{cluster.url}/v1/models")
        found[answer.headers["x-adalink-replica"]] = {model["id"] for model in answer.json()["data"]}
    return found


def ask_many(cluster: Cluster, choices: int) -> httpx.Response:
    body = {"model": "beta", "prompt": "oil", "max_tokens": TOKENS, "n": choices}
    return httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=30)


def test_replica_is_killed_under_load(two: Cluster, expected: dict[tuple[str, str], str]) -> None:
    crowd, before = Crowd(two.url, expected, TOKENS), two.replica_pids()
    names, victim = set(models_of_replicas(two)), min(before)
    with crowd.asking(8), ThreadPoolExecutor(6) as pool:
        time.sleep(1)
        burst = [pool.submit(ask_many, two, 64) for _ in range(6)]  # work for seconds, on both
        time.sleep(0.6)
        os.kill(victim, signal.SIGKILL)
        answers = [future.result() for future in burst]
        back = wait_for(lambda: len(two.replica_pids() - {victim}) == 2, 60)
        back += wait_for(lambda: len(set(models_of_replicas(two)) - names) == 1, 60)
        time.sleep(1)
    kinds = [read_answer(answer)[0] for answer in answers]  # "full": what is left has no room for all of it
    lost = kinds.count("lost")
    print(crowd.counts, f"{lost} of the burst lost; the replica returned after {back:.1f} s")
    assert crowd.wrong == []
    assert lost + crowd.counts["lost"] + crowd.counts["cut"] > 0  # what it was answering
    assert crowd.counts["whole"] > 20  # the crowd did ask; how often is up to the machine
    assert crowd.counts["full"] == 0
    for answer, kind in zip(answers, kinds, strict=True):
        if kind == "whole":
            texts = [choice["text"] for choice in answer.json()["choices"]]
            assert texts == [expected["beta", "oil"]] * 64
    assert len(set(models_of_replicas(two)) & names) == 1


def test_task_of_the_shared_folder_appears_on_both(
    two: Cluster, folder: Path, llama: Tiny, expected: dict[tuple[str, str], str]
) -> None:
    assert all("later" not in models for models in models_of_replicas(two).values())
    export_adapter(llama.sources / "beta", folder, name="later")
    wait_for(lambda: all("later" in models for models in models_of_replicas(two).values()), 10)
    assert len(models_of_replicas(two)) == 2
    answered = dict.fromkeys(models_of_replicas(two), 0)
    for _ in range(40):
        body = {"model": "later", "prompt": "oil", "max_tokens": TOKENS}
        answer = httpx.post(f"{two.url}/v1/completions", json=body, timeout=20)
        assert answer.json()["choices"][0]["text"] == expected["beta", "oil"]
        answered[answer.headers["x-adalink-replica"]] += 1
    assert min(answered.values()) > 0
    wait_for(lambda: requests_by_replica(two, "later") == answered, 40)


def requests_by_replica(cluster: Cluster, task: str) -> dict[str, int]:
    """What Ray exports: requests of a task that ended well, by replica."""
    text = httpx.get(f"http://127.0.0.1:{cluster.metrics_port}/metrics").text
    found: dict[str, int] = {}
    for line in text.splitlines():
        if line.startswith("ray_adalink_requests_total{") and f'task="{task}"' in line and 'outcome="ok"' in line:
            replica = re.search(r'replica="([^"]*)"', line)
            assert replica is not None
            found[replica[1]] = int(float(line.rpartition(" ")[2]))
    return found


def test_rolling_update_drops_nothing(two: Cluster, folder: Path, expected: dict[tuple[str, str], str]) -> None:
    crowd, before = Crowd(two.url, expected, TOKENS), set(models_of_replicas(two))
    with crowd.asking(12):
        time.sleep(1)
        two.run(deployment=str(folder), replicas=3, slots=4)  # other settings, and one more
        wait_for(lambda: not before & set(models_of_replicas(two)), 60)
        time.sleep(1)
        two.run(deployment=str(folder), replicas=1, slots=4)  # the same settings, fewer
        wait_for(lambda: len(two.replica_pids()) == 1, 60)
        time.sleep(1)
    print(crowd.counts)
    assert crowd.wrong == []
    assert crowd.counts["whole"] > 20  # the crowd did ask; how often is up to the machine
    assert {how for how, count in crowd.counts.items() if count} == {"whole"}
