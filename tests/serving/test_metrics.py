"""Metrics: what they count is what was asked."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.runtime import random_adapter, write_adapter
from helpers.served import serve_in_thread, wait_for
from prometheus_client.parser import text_string_to_metric_families

from adalink.runtime import Deployment, Request


def test_metrics_count_by_task(opened: Deployment, slow_steps: None) -> None:
    with serve_in_thread(opened, slots=8) as server:
        answer = server.post("/v1/completions", {"model": "beta", "prompt": "wheat", "max_tokens": 6, "min_tokens": 6})
        assert answer.json()["usage"]["completion_tokens"] == 6
        list(server.openai.completions.create(model="alpha", prompt="oil", max_tokens=3, stream=True))
        server.post("/v1/completions", {"model": "beta", "prompt": "wheat", "stop_token_ids": [96]})
        server.post("/v1/completions", {"model": "nothing", "prompt": "wheat"})
        assert server.metric("adalink_generated_tokens_total", task="beta") == 6
        assert server.metric("adalink_prompt_tokens_total", task="beta") == 5
        assert server.metric("adalink_prompt_tokens_total", task="alpha") == 3
        assert server.metric("adalink_time_to_first_token_seconds_count", task="beta") == 1
        assert server.metric("adalink_time_between_tokens_seconds_count", task="beta") == 5
        # Five steps of 20 ms at least.
        assert 0.1 < server.metric("adalink_time_between_tokens_seconds_sum", task="beta") < 1
        assert server.metric("adalink_requests_total", task="beta", outcome="ok") == 1
        assert server.metric("adalink_requests_total", task="beta", outcome="invalid") == 1
        assert server.metric("adalink_slots") == 8
        assert server.metric("adalink_tasks") == len(opened.tasks)
        text = server.get("/metrics").text
        # A client's words become no labels.
        assert "nothing" not in text
        families = {family.name: family.type for family in text_string_to_metric_families(text)}
        assert families["adalink_time_to_first_token_seconds"] == "histogram"


def test_dimensions_that_no_task_has_are_no_models_and_no_labels(opened: Deployment, tmp_path: Path) -> None:
    settings = {"rank": 4, "activation": "identity", "bias": False, "scope": "all", "nested": True}
    adapter = random_adapter(opened.manifest.base.fingerprint, opened.manifest.base.hidden_size, 3, **settings)
    opened.add_task(write_adapter(tmp_path / "wide", adapter))
    try:
        with serve_in_thread(opened) as server:
            for name, message in (("wide@99991", "has rank 4"), ("beta@99992", "not nested")):
                refused = server.post("/v1/completions", {"model": name, "prompt": "wheat"})
                assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
                assert message in refused.json()["error"]["message"]
                assert server.get(f"/v1/models/{name}").status_code == 404
            assert server.get("/v1/models/wide@4").json()["id"] == "wide@4"
            server.post("/v1/completions", {"model": "wide@4", "prompt": "wheat", "max_tokens": 2})
            text = server.get("/metrics").text
            assert 'task="wide@4"' in text
            assert "9999" not in text
    finally:
        opened.remove_task("wide")


def test_load_is_that_of_now(opened: Deployment, slow_steps: None) -> None:
    with serve_in_thread(opened) as server:
        handles = [opened.submit(Request("wheat", task="beta", max_new_tokens=50)) for _ in range(8)]
        wait_for(lambda: server.metric("adalink_requests_running") == 8)
        handles += [opened.submit(Request("wheat", max_new_tokens=50)) for _ in range(2)]
        assert server.metric("adalink_requests_waiting") == 2
        for handle in handles:
            handle.cancel()
        wait_for(lambda: server.metric("adalink_requests_running") + server.metric("adalink_requests_waiting") == 0)


def test_counts_that_are_wrong_are_found(opened: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_in_thread(opened) as server:
        monkeypatch.setattr(server.gateway.metrics, "count_choice", lambda task, generation: None)
        server.post("/v1/completions", {"model": "beta", "prompt": "wheat", "max_tokens": 6})
        assert server.metric("adalink_generated_tokens_total", task="beta") == 0
