"""A deployment as a model of Triton's Python backend: requests of all tasks join and leave one running batch."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from adalink.runtime import AdaLinkError, Deployment, QueueFullError, Request, RequestError, UnknownTaskError


class TritonPythonModel:
    """Triton makes one, calls ``execute`` for each request without waiting for earlier ones, then ``finalize``."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the deployment that the parameters of ``config.pbtxt`` name."""
        config = json.loads(args["model_config"])
        options = {key: value["string_value"] for key, value in config["parameters"].items()}
        self._deployment = Deployment.open(
            options["deployment"],
            options.get("backend", "onnxruntime-cpu"),
            variant=options.get("variant"),
            threads=int(options.get("threads", "1")),
            slots=int(options.get("slots", "16")),
            queue_limit=int(options.get("queue", "256")),
        )

    async def execute(self, requests: list[Any]) -> None:
        """Answer requests, all at once."""
        await asyncio.gather(*(self._answer(request) for request in requests))

    async def _answer(self, request: Any) -> None:
        sender = request.get_response_sender()
        handle = None
        try:
            wants_stream = bool(_value(request, "stream", False))
            handle = self._deployment.submit(_read(request))
            texts = []
            async for piece in handle:
                if sender.is_cancelled():
                    break
                if wants_stream and piece.text:
                    sender.send(_response(piece.text))
                texts.append(piece.text)
            else:
                if not wants_stream:
                    sender.send(_response("".join(texts)))
        except Exception as error:
            sender.send(pb_utils.InferenceResponse([], _triton_error(error)))
        finally:
            if handle is not None:
                handle.cancel()  # has no effect on one that has ended
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def finalize(self) -> None:
        """Close the deployment."""
        self._deployment.close()


def _read(request: Any) -> Request:
    task, most = _value(request, "task", None), _value(request, "max_tokens", None)
    return Request(
        prompt=_value(request, "text_input", b"").decode("utf-8"),
        task=None if task is None else task.decode("utf-8"),
        max_new_tokens=None if most is None else int(most),
    )


def _value(request: Any, name: str, default: Any) -> Any:
    """The only element of an input; ``default`` if the request lacks it."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return default if tensor is None else tensor.as_numpy().reshape(-1)[0]


def _response(text: str) -> Any:
    tensor = pb_utils.Tensor("text_output", np.array([text.encode("utf-8")], dtype=np.object_))
    return pb_utils.InferenceResponse([tensor])


def _triton_error(error: Exception) -> Any:
    """What the client may know: its own faults, and that the engine failed."""
    if isinstance(error, UnknownTaskError):
        return pb_utils.TritonError(str(error), pb_utils.TritonError.NOT_FOUND)
    if isinstance(error, QueueFullError):
        return pb_utils.TritonError(str(error), pb_utils.TritonError.UNAVAILABLE)
    if isinstance(error, (RequestError, UnicodeDecodeError)):
        return pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)
    kind = "the engine failed" if isinstance(error, AdaLinkError) else "the model failed"
    pb_utils.Logger.log_error(f"{kind}: {error}")
    return pb_utils.TritonError(f"{kind}; the server's log says why")
