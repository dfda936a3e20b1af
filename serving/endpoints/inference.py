"""Open Inference Protocol, version 2 (KServe, Triton): ``Deployment.run`` with the base and every task as models."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta
from starlette.requests import Request as HttpRequest

from adalink.runtime.arrays import Array
from adalink.serving.api_error import ApiError
from adalink.serving.endpoints.completions import read_fields
from adalink.serving.gateway import Gateway
from adalink.serving.json_body import JsonResponse

# Most numbers of an answer: about 80 MB of JSON.
MOST_VALUES = 1 << 22


class TensorFields(msgspec.Struct, kw_only=True):
    """An input: numbers row after row, nested or not."""

    name: str
    shape: Annotated[list[Annotated[int, Meta(ge=1, le=1 << 31)]], Meta(min_length=2, max_length=2)]
    datatype: str
    data: list[Any]


class OutputFields(msgspec.Struct, kw_only=True):
    """An output that is asked for."""

    name: str


class InferFields(msgspec.Struct, kw_only=True):
    """A request for ``/v2/models/NAME/infer``."""

    inputs: list[TensorFields]
    id: str | None = None
    outputs: list[OutputFields] | None = None


async def server_metadata(request: HttpRequest) -> JsonResponse:
    """``GET /v2``."""
    return JsonResponse({"name": "adalink-kit", "version": version("adalink-kit"), "extensions": []})


async def model_metadata(request: HttpRequest) -> JsonResponse:
    """``GET /v2/models/{model}``; -1 in a shape stands for any number."""
    gateway: Gateway = request.app.state.gateway
    name = request.path_params["model"]
    gateway.task_of(name)
    inputs = [{"name": one, "datatype": "INT64", "shape": [-1, -1]} for one in _input_names(gateway)]
    widths = _output_widths(gateway)
    outputs = [{"name": one, "datatype": "FP32", "shape": [-1, -1, width]} for one, width in widths.items()]
    return JsonResponse({"name": name, "versions": ["1"], "platform": "adalink", "inputs": inputs, "outputs": outputs})


async def model_ready(request: HttpRequest) -> JsonResponse:
    """``GET /v2/models/{model}/ready``."""
    gateway: Gateway = request.app.state.gateway
    name = request.path_params["model"]
    gateway.task_of(name)
    return JsonResponse({"name": name, "ready": True})


async def infer(request: HttpRequest) -> JsonResponse:
    """``POST /v2/models/{model}/infer``: a forward pass over whole sequences."""
    gateway: Gateway = request.app.state.gateway
    name = request.path_params["model"]
    task = gateway.task_of(name)
    fields: InferFields = await read_fields(request, gateway, InferFields)
    answer: bytes = await gateway.with_tasks(_infer, gateway, name, task, fields)
    return JsonResponse(answer)


def _infer(gateway: Gateway, name: str, task: str | None, fields: InferFields) -> bytes:
    arrays: dict[str, Array] = {}
    for index, tensor in enumerate(fields.inputs):
        where = f"inputs[{index}]"
        if tensor.name not in _input_names(gateway) or tensor.name in arrays:
            raise ApiError(400, f"{where} is {tensor.name!r:.80}, expected each of {_input_names(gateway)} once", where)
        arrays[tensor.name] = _as_array(tensor, where)
    if "input_ids" not in arrays:
        raise ApiError(400, "inputs has no input_ids", "inputs")
    names = _asked_outputs(gateway, fields)
    _check_size(gateway, arrays, names)
    outputs = gateway.deployment.run(
        input_ids=arrays["input_ids"],
        attention_mask=arrays.get("attention_mask"),
        token_type_ids=arrays.get("token_type_ids"),
        decoder_input_ids=arrays.get("decoder_input_ids"),
        tasks=task,
    )
    tensors = [_as_tensor(one, outputs[one]) for one in names or outputs]
    answer = {"model_name": name, "model_version": "1", "outputs": tensors}
    return msgspec.json.encode({**answer, "id": fields.id} if fields.id is not None else answer)


def _as_array(tensor: TensorFields, where: str) -> Array:
    """The numbers of an input, int64 with its shape; raises ``ApiError``."""
    if tensor.datatype not in ("INT64", "INT32"):
        raise ApiError(
            400, f"{where}.datatype is {tensor.datatype!r:.40}, expected INT64 or INT32", f"{where}.datatype"
        )
    try:
        values = np.asarray(tensor.data)
    except (ValueError, OverflowError) as error:
        raise ApiError(400, f"{where}.data is no array of whole numbers", f"{where}.data") from error
    if values.dtype.kind != "i" or values.size != tensor.shape[0] * tensor.shape[1]:
        raise ApiError(400, f"{where}.data is no array of whole numbers with the shape {tensor.shape}", f"{where}.data")
    return values.astype(np.int64).reshape(tensor.shape)


def _as_tensor(name: str, values: Array) -> dict[str, Any]:
    data = values.astype(np.float32).ravel().tolist()
    return {"name": name, "datatype": "FP32", "shape": list(values.shape), "data": data}


def _asked_outputs(gateway: Gateway, fields: InferFields) -> list[str]:
    """The outputs that are asked for; an empty list for all."""
    names = [output.name for output in fields.outputs or ()]
    if wrong := [name for name in names if name not in _output_widths(gateway)]:
        known = ", ".join(_output_widths(gateway))
        raise ApiError(400, f"outputs has {wrong[0]!r:.80}, expected some of {known}", "outputs")
    return names


def _check_size(gateway: Gateway, arrays: dict[str, Array], names: list[str]) -> None:
    """Refuse what would be answered with too many numbers, before it is computed."""
    widths = _output_widths(gateway)
    source = {"logits": arrays.get("decoder_input_ids", arrays["input_ids"]), "last_hidden_state": arrays["input_ids"]}
    total = sum(source[name].size * widths[name] for name in names or widths)
    if total > MOST_VALUES:
        raise ApiError(
            400, f"the answer would have {total} numbers, at most {MOST_VALUES} are sent: send less", "inputs"
        )


def _input_names(gateway: Gateway) -> tuple[str, ...]:
    kind = gateway.base.kind
    more = {"encoder": ("token_type_ids",), "encoder-decoder": ("decoder_input_ids",)}.get(kind, ())
    return ("input_ids", "attention_mask", *more)


def _output_widths(gateway: Gateway) -> dict[str, int]:
    """Width of each output."""
    base = gateway.base
    hidden, logits = {"last_hidden_state": base.hidden_size}, {"logits": base.vocab_size}
    return {"decoder": logits, "encoder": hidden}.get(base.kind, {**hidden, **logits})
