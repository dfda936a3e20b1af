"""Metrics: what they count is what was asked."""

from __future__ import annotations

import pytest
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
