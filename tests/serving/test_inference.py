"""Open Inference Protocol: forward passes, compared with PyTorch and with ``Deployment.run``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from helpers.runtime import Tiny, build
from helpers.served import Served, serve_in_thread

from adalink.runtime import Deployment
from adalink.serving.endpoints import inference

IDS = [[5, 9, 30, 7], [8, 8, 2, 0]]


def tensor(name: str, values: Any, **changes: Any) -> dict[str, Any]:
    array = np.array(values)
    return {"name": name, "shape": list(array.shape), "datatype": "INT64", "data": array.ravel().tolist(), **changes}


def values_of(answer: Any) -> np.ndarray:
    (output,) = answer.json()["outputs"]
    assert output["datatype"] == "FP32"
    return np.array(output["data"]).reshape(output["shape"])


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Tiny, Served]]:
    tiny = build("bert", tmp_path_factory.mktemp("bert"))
    with Deployment.open(tiny.folder, threads=1) as deployment, serve_in_thread(deployment) as server:
        yield tiny, server


@pytest.mark.parametrize("task", [None, "alpha", "beta"])
def test_logits_are_those_of_pytorch(served: Served, llama: Tiny, task: str | None) -> None:
    body = {"id": "7", "inputs": [tensor("input_ids", IDS[:1])]}
    answer = served.post(f"/v2/models/{task or served.base}/infer", body)
    assert (answer.json()["id"], answer.json()["model_name"]) == ("7", task or served.base)
    assert values_of(answer)[0] == pytest.approx(llama.logits(IDS[0], task), abs=1e-4)


@pytest.mark.parametrize("is_nested", [False, True])
def test_states_of_an_encoder_are_those_of_run(bert: tuple[Tiny, Served], is_nested: bool) -> None:
    _, server = bert
    mask = [[1, 1, 1, 1], [1, 1, 0, 0]]
    wanted = server.deployment.run(input_ids=IDS, attention_mask=mask, tasks="beta")["last_hidden_state"]
    changes = {"data": IDS} if is_nested else {}
    inputs = [tensor("input_ids", IDS, **changes), tensor("attention_mask", mask)]
    answer = server.post("/v2/models/beta/infer", {"inputs": inputs, "outputs": [{"name": "last_hidden_state"}]})
    assert np.array_equal(values_of(answer), wanted)


def test_encoder_generates_nothing(bert: tuple[Tiny, Served]) -> None:
    answer = bert[1].post("/v1/completions", {"model": "beta", "prompt": "a"})
    assert answer.status_code == 400
    assert "encoder" in answer.json()["error"]["message"]


def test_metadata_names_inputs_and_outputs(served: Served, bert: tuple[Tiny, Served]) -> None:
    assert served.get("/v2").json()["name"] == "adalink-kit"
    assert served.get("/v2/health/ready").status_code == 200
    assert served.get("/v2/models/beta/ready").json() == {"name": "beta", "ready": True}
    decoder = served.get("/v2/models/beta").json()
    assert [one["name"] for one in decoder["inputs"]] == ["input_ids", "attention_mask"]
    assert decoder["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [-1, -1, 96]}]
    assert [one["name"] for one in bert[1].get("/v2/models/alpha").json()["inputs"]][2:] == ["token_type_ids"]


@pytest.mark.parametrize("path", ["/v2/models/gamma", "/v2/models/gamma/ready", "/v2/models/gamma/infer"])
def test_unknown_model_is_404(served: Served, path: str) -> None:
    answer = served.post(path, {"inputs": []}) if path.endswith("infer") else served.get(path)
    assert answer.status_code == 404


@pytest.mark.parametrize(
    ("inputs", "param"),
    [
        ([], "inputs"),
        ([tensor("pixels", IDS)], "inputs[0]"),
        ([tensor("input_ids", IDS)] * 2, "inputs[1]"),
        ([tensor("token_type_ids", IDS)], "inputs[0]"),
        ([tensor("input_ids", IDS, datatype="FP32")], "inputs[0].datatype"),
        ([tensor("input_ids", IDS, shape=[2, 5])], "inputs[0].data"),
        ([tensor("input_ids", IDS, shape=[8])], "inputs[0].shape"),
        ([tensor("input_ids", IDS, shape=[-2, -4])], "inputs[0].shape[0]"),
        ([tensor("input_ids", IDS, data=[1.5] * 8)], "inputs[0].data"),
        ([tensor("input_ids", IDS, data=["a"] * 8)], "inputs[0].data"),
        ([tensor("input_ids", IDS, data=[2**63] * 8)], "inputs[0].data"),
        ([tensor("input_ids", IDS, data=[[1], 2])], "inputs[0].data"),
        ([tensor("input_ids", [[96]])], None),
    ],
)
def test_wrong_inputs_are_refused(served: Served, inputs: Any, param: str | None) -> None:
    answer = served.post("/v2/models/beta/infer", {"inputs": inputs})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_wrong_output_is_refused(served: Served) -> None:
    body = {"inputs": [tensor("input_ids", IDS)], "outputs": [{"name": "last_hidden_state"}]}
    answer = served.post("/v2/models/beta/infer", body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "outputs")


def test_large_answer_is_refused_before_it_is_computed(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "MOST_VALUES", 8 * 96 - 1)
    answer = served.post("/v2/models/beta/infer", {"inputs": [tensor("input_ids", IDS)]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "inputs")
