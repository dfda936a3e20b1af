"""The example for Triton's Python backend, in a stand-in for Triton that has the interface of its documentation."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers.paths import REPOSITORY
from helpers.runtime import Tiny, build

from adalink.runtime import Deployment

FOLDER = REPOSITORY / "examples/triton/adalink"
FINAL = 1
PROMPT = b"crude oil, 1987"  # each task continues it otherwise


class Tensor:
    def __init__(self, name: str, values: np.ndarray) -> None:
        assert values.dtype != np.dtype("U")  # Triton takes texts as objects alone
        self._name, self._values = name, values

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._values


class TritonError:
    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, UNSUPPORTED = range(6)

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        self.message, self.code = message, code


class InferenceResponse:
    def __init__(self, output_tensors: list[Tensor], error: TritonError | None = None) -> None:
        self.output_tensors, self.error = output_tensors, error

    @property
    def text(self) -> str:
        (tensor,) = self.output_tensors
        assert (tensor.name(), tensor.as_numpy().shape) == ("text_output", (1,))
        return str(tensor.as_numpy()[0].decode())


class Sender:
    """Sends responses of one request; nothing may follow the last."""

    def __init__(self, cancel_after: int | None) -> None:
        self.sent: list[InferenceResponse] = []
        self.is_closed = False
        self._cancel_after = cancel_after

    def is_cancelled(self) -> bool:
        return self._cancel_after is not None and len(self.sent) >= self._cancel_after

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        assert not self.is_closed
        if response is not None:
            self.sent.append(response)
        self.is_closed = flags == FINAL


class InferenceRequest:
    def __init__(self, cancel_after: int | None = None, **inputs: Any) -> None:
        self.sender = Sender(cancel_after)
        self.inputs = {name: Tensor(name, np.array([value], dtype_of(value))) for name, value in inputs.items()}

    def get_response_sender(self) -> Sender:
        return self.sender


def dtype_of(value: Any) -> Any:
    return np.object_ if isinstance(value, bytes) else np.bool_ if isinstance(value, bool) else np.int32


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return build("llama", tmp_path_factory.mktemp("triton"))


@pytest.fixture(scope="module")
def module() -> Iterator[ModuleType]:
    """The example's module, with the stand-in as Triton's."""
    triton = SimpleNamespace(
        Tensor=Tensor,
        TritonError=TritonError,
        InferenceResponse=InferenceResponse,
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=FINAL,
        Logger=SimpleNamespace(log_error=print),
        get_input_tensor_by_name=lambda request, name: request.inputs.get(name),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "triton_python_backend_utils", triton)
        spec = importlib.util.spec_from_file_location("triton_example", FOLDER / "1/model.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


def parameters(folder: Path) -> dict[str, dict[str, str]]:
    """Those of ``config.pbtxt``, for another folder."""
    text = (FOLDER / "config.pbtxt").read_text()
    found = dict(re.findall(r'parameters: \{ key: "(\w+)" value: \{ string_value: "([^"]*)" \} \}', text))
    return {key: {"string_value": value} for key, value in {**found, "deployment": str(folder), "threads": "1"}.items()}


@pytest.fixture(scope="module")
def model(module: ModuleType, tiny: Tiny) -> Iterator[Any]:
    model = module.TritonPythonModel()
    model.initialize({"model_config": json.dumps({"parameters": parameters(tiny.folder)})})
    yield model
    model.finalize()


@pytest.fixture(scope="module")
def expected(tiny: Tiny) -> dict[str | None, str]:
    with Deployment.open(tiny.folder, threads=1) as deployment:
        return {
            task: deployment.generate([PROMPT.decode()], tasks=task, max_new_tokens=9)[0].text
            for task in (None, "alpha", "beta")
        }


def test_config_names_what_the_model_reads() -> None:
    config, code = (FOLDER / "config.pbtxt").read_text(), (FOLDER / "1/model.py").read_text()
    names = set(re.findall(r'\{ name: "(\w+)"', config))
    assert names == set(re.findall(r'(?:_value\(request, |Tensor\()"(\w+)"', code))
    assert set(parameters(Path())) == set(re.findall(r'options(?:\.get\(|\[)"(\w+)"', code)) - {"variant"}
    assert 'backend: "python"' in config
    assert "decoupled: True" in config


def test_requests_of_several_tasks_are_answered_together(model: Any, expected: dict[str | None, str]) -> None:
    requests = [InferenceRequest(text_input=PROMPT, max_tokens=9)]
    requests += [
        InferenceRequest(text_input=PROMPT, task=task, max_tokens=9, stream=stream)
        for task in (b"alpha", b"beta")
        for stream in (False, True)
    ]
    asyncio.run(model.execute(requests))
    assert all(request.sender.is_closed for request in requests)
    texts = ["".join(response.text for response in request.sender.sent) for request in requests]
    assert texts == [expected[task] for task in (None, "alpha", "alpha", "beta", "beta")]
    assert len(set(expected.values())) == 3
    assert [len(request.sender.sent) > 1 for request in requests] == [False, False, True, False, True]


@pytest.mark.parametrize(
    ("inputs", "code", "message"),
    [
        ({"text_input": b"wheat", "task": b"nobody"}, TritonError.NOT_FOUND, "nobody"),
        ({"text_input": b"wheat", "max_tokens": 0}, TritonError.INVALID_ARG, "max_new_tokens is 0"),
        ({"text_input": b"\xff"}, TritonError.INVALID_ARG, "utf-8"),
        ({}, TritonError.INVALID_ARG, "no tokens"),
    ],
)
def test_wrong_requests_are_errors(model: Any, inputs: dict[str, Any], code: int, message: str) -> None:
    request = InferenceRequest(**inputs)
    asyncio.run(model.execute([request]))
    (response,) = request.sender.sent
    assert (response.error.code, request.sender.is_closed) == (code, True)
    assert message in response.error.message


def test_engine_errors_tell_nothing(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(request: Any) -> None:
        raise OSError("/secret/place")

    monkeypatch.setattr(model._deployment, "submit", fail)
    request = InferenceRequest(text_input=PROMPT)
    asyncio.run(model.execute([request]))
    (response,) = request.sender.sent
    assert response.error.code == TritonError.INTERNAL
    assert "secret" not in response.error.message


def test_cancelled_request_ends_at_the_next_piece(model: Any) -> None:
    request = InferenceRequest(cancel_after=2, text_input=PROMPT, max_tokens=40, stream=True)
    asyncio.run(model.execute([request]))
    assert len(request.sender.sent) == 2
    assert request.sender.is_closed
    assert model._deployment.running <= 1
