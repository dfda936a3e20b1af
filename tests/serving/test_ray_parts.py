"""What replicas and proxies of Ray Serve add to the server, without a cluster; the builder alone needs Ray."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
import yaml
from helpers.code_blocks import check_command
from helpers.paths import REPOSITORY
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from adalink.runtime import ConfigError, Deployment
from adalink.serving import ServeOptions, make_app
from adalink.serving.ray.options import ReplicaOptions, read_options
from adalink.serving.ray.proxy import ProxyErrors, middlewares
from adalink.serving.ray.replica_app import ReplicaApp


def ask(app: ASGIApp, path: str = "/v1/models", client: str = "127.0.0.1", host: str = "localhost") -> httpx.Response:
    async def get() -> httpx.Response:
        transport = httpx.ASGITransport(app, client=(client, 5000))
        async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}") as http:
            return await http.get(path)

    return anyio.run(get)


def test_texts_of_a_command_line_become_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["deployment=smollm2", "variant=int4", "threads=4", "replicas=3", "timeout=20", "watch=false", "queue=7"]
    options = read_options(dict(word.split("=") for word in words))
    wanted = ReplicaOptions(
        deployment=str(tmp_path / "smollm2"), variant="int4", threads=4, replicas=3, timeout=20.0, watch=False, queue=7
    )
    assert options == wanted
    assert options.deployment_options == {
        "num_replicas": 3,
        "ray_actor_options": {"num_cpus": 4, "num_gpus": 0},
        "max_ongoing_requests": 32,
        "max_queued_requests": 7,
        "graceful_shutdown_timeout_s": 30,
        "graceful_shutdown_wait_loop_s": 0.5,
        "health_check_period_s": 5,
    }


def test_autoscaling_aims_at_full_slots() -> None:
    options = read_options({"deployment": "/d", "slots": 8, "min_replicas": "0", "max_replicas": "4"})
    scaling = options.deployment_options["autoscaling_config"]
    assert scaling == {"min_replicas": 0, "max_replicas": 4, "target_ongoing_requests": 8.0}
    assert "num_replicas" not in options.deployment_options
    options = read_options({"deployment": "/d", "max_replicas": 2, "target": 3})
    scaling = options.deployment_options["autoscaling_config"]
    assert scaling == {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 3.0}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({}, "missing argument `deployment`"),
        ({"replica": 2}, "there is no argument `replica`"),
        ({"threads": "two"}, "Expected `int`, got `str`, given as `threads`"),
        ({"threads": 0}, "threads is 0, expected at least 1"),
        ({"drain": -1}, "drain is -1.*, expected at least 0"),
        ({"target": 0, "max_replicas": 2}, "target is 0.*, expected more than 0"),
        ({"target": 4}, "give max_replicas too"),
        ({"min_replicas": 0}, "give max_replicas too"),
        ({"replicas": 2, "max_replicas": 4}, "give one of them"),
        ({"min_replicas": 5, "max_replicas": 4}, "more than max_replicas, 4"),
        ({"timeout": 60}, "give drain at least the timeout"),
        ({"drain": "nan"}, "drain is nan"),
    ],
)
def test_wrong_arguments_are_named(args: dict[str, Any], message: str) -> None:
    if args:
        args = {"deployment": "d", **args}
    with pytest.raises(ConfigError, match=message):
        read_options(args)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray's own classes
def test_builder_binds_a_replica() -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install '.[ray]'")
    from adalink.serving.ray import app

    with pytest.raises(ConfigError, match="missing argument `deployment`"):
        app({})
    built: Any = app({"deployment": "/d", "replicas": "2", "threads": "3"})
    bound = built._bound_deployment
    assert (bound.name, bound.num_replicas, bound.max_queued_requests) == ("AdaLink", 2, 256)
    assert bound.ray_actor_options["num_cpus"] == 3
    assert bound.init_args == (ReplicaOptions(deployment="/d", replicas=2, threads=3),)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray's own classes
def test_examples_of_yaml_are_taken() -> None:
    config = yaml.safe_load((REPOSITORY / "examples/ray/serve.yaml").read_text())
    (application,) = config["applications"]
    options = read_options(application["args"])
    scaling = application["deployments"][0]["autoscaling_config"]
    assert {key: scaling[key] for key in ("min_replicas", "max_replicas", "target_ongoing_requests")} == (
        options.deployment_options["autoscaling_config"]
    )
    assert application["import_path"] == "adalink.serving.ray:app"
    if find_spec("ray") is not None:
        from ray.serve.schema import ServeDeploySchema

        ServeDeploySchema.model_validate(config)
    (container,) = yaml.safe_load((REPOSITORY / "examples/kserve/inference-service.yaml").read_text())["spec"][
        "predictor"
    ]["containers"]
    program, *words = [*container["command"], *container["args"]]
    assert program == "adalink"
    check_command(words)


def test_replica_answers_its_own_machine_without_a_key(opened: Deployment) -> None:
    inner = make_app(opened, ServeOptions(checks_host=True))
    replica = ReplicaApp(inner, "r1", is_open=False)
    answer = ask(replica)
    assert answer.status_code == 200
    assert answer.headers["x-adalink-replica"] == "r1"
    assert {model["id"] for model in answer.json()["data"]} >= {"alpha", "beta"}
    for client in ("192.0.2.7", "not an address"):
        refused = ask(replica, client=client)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "key_needed")
    assert ask(replica, host="elsewhere.example").json()["error"]["code"] == "wrong_host"
    assert ask(ReplicaApp(make_app(opened), "r1", is_open=True), client="192.0.2.7").status_code == 200


def test_metrics_of_one_replica_are_not_told_as_those_of_all(opened: Deployment) -> None:
    answer = ask(ReplicaApp(make_app(opened), "r1", is_open=True), "/metrics")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_here")


def raw(messages: list[dict[str, Any]]) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in messages:
            await send(message)

    return app


def start(status: int, kind: str) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": [(b"content-type", kind.encode())]}


def body(text: bytes, *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": text, "more_body": more}


def test_replica_lost_before_its_answer_is_503() -> None:
    answer = ask(ProxyErrors(raw([])))
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error"]["code"] == "replica_lost"
    assert middlewares()[0].cls is ProxyErrors


def test_replica_lost_within_a_stream_ends_it_with_an_error() -> None:
    events = [start(200, "text/event-stream; charset=utf-8"), body(b'data: {"a": 1}\n\n', more=True)]
    first, last, rest = ask(ProxyErrors(raw(events))).text.split("\n\n")
    assert (json.loads(first.removeprefix("data: ")), rest) == ({"a": 1}, "")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "replica_lost"


def test_answer_that_is_cut_is_not_made_whole() -> None:
    sent: list[Any] = []

    async def run() -> None:
        async def send(message: Any) -> None:
            sent.append(message)

        app = ProxyErrors(raw([start(200, "application/json"), body(b'{"a"', more=True)]))
        await app({"type": "http"}, None, send)  # type: ignore[arg-type]

    anyio.run(run)
    assert [message.get("more_body") for message in sent] == [None, True]


@pytest.mark.parametrize(
    ("status", "text", "code"),
    [
        (503, "Request dropped due to backpressure (num_queued_requests=256)", "queue_full"),
        (503, "Deployment is unavailable", "unavailable"),
        (408, "Request 1 timed out after 5s.", "timeout"),
        (500, "File /secret/place.py", "internal_error"),
    ],
)
def test_answers_of_the_proxy_are_openai_errors(status: int, text: str, code: str) -> None:
    answer = ask(ProxyErrors(PlainTextResponse(text, status)))
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert "secret" not in answer.text
    assert ("retry-after" in answer.headers) == (status == 503)


def test_answers_of_a_replica_pass_unchanged(opened: Deployment) -> None:
    plain, wrapped = make_app(opened), ProxyErrors(make_app(opened))
    for path in ("/v1/models", "/metrics", "/health/ready", "/nothing", "/v1/models/nobody"):
        before, after = ask(plain, path), ask(wrapped, path)
        assert before.status_code == after.status_code
        assert before.headers["content-type"] == after.headers["content-type"]
        if path != "/metrics":
            assert {**before.json(), "data": 0} == {**after.json(), "data": 0}
