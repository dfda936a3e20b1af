"""Adding and removing tasks while the server runs, as vLLM does; off without a folder for it."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse

from adalink.runtime.errors import AdaLinkError, DeploymentError
from adalink.runtime.storage.adapter import CONFIG_FILE, WEIGHTS_FILE
from adalink.runtime.storage.manifest_validation import check_task_name
from adalink.serving.api_error import ApiError
from adalink.serving.endpoints.completions import read_fields
from adalink.serving.gateway import Gateway
from adalink.serving.openai.fields import LoadFields, UnloadFields


async def load_adapter(request: HttpRequest) -> PlainTextResponse:
    """``POST /v1/load_lora_adapter``: add a task from a folder inside the tasks folder.

    ``load_inplace`` replaces a task of that name; requests under way end with the adapter they began with.
    """
    gateway: Gateway = request.app.state.gateway
    fields: LoadFields = await read_fields(request, gateway, LoadFields)
    await gateway.in_thread(_load, gateway, fields)
    return PlainTextResponse(f"Success: LoRA adapter '{fields.lora_name}' added successfully.")


async def unload_adapter(request: HttpRequest) -> PlainTextResponse:
    """``POST /v1/unload_lora_adapter``: remove a task from this server; its files stay."""
    gateway: Gateway = request.app.state.gateway
    fields: UnloadFields = await read_fields(request, gateway, UnloadFields)
    if gateway.task_of(fields.lora_name) is None:
        raise ApiError(400, "this is the base model, which cannot be removed", "lora_name")
    await gateway.in_thread(gateway.deployment.remove_task, fields.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{fields.lora_name}' removed successfully.")


def _load(gateway: Gateway, fields: LoadFields) -> None:
    _check_name(fields.lora_name, "lora_name")
    replace = fields.load_inplace or False
    if fields.lora_name == gateway.base_name or (fields.lora_name in gateway.deployment.tasks and not replace):
        raise ApiError(400, f"the model {fields.lora_name!r} exists already: choose another name", "lora_name")
    assert gateway.options.tasks_folder is not None
    folder = _resolve(gateway.options.tasks_folder, fields.lora_path)
    try:
        gateway.deployment.add_task(folder, fields.lora_name, replace=replace)
    except AdaLinkError as error:
        # The client knows the adapter by its name in the folder, and needs to know no more.
        message = str(error).replace(str(folder), fields.lora_path).replace(str(folder.parent), "")
        raise ApiError(400, message, "lora_path") from error


def _resolve(root: Path, name: str) -> Path:
    """An adapter folder inside the tasks folder, without any link; raises ``ApiError`` (400 or 404)."""
    _check_name(name, "lora_path")
    folder = root / name
    if folder.is_symlink() or not folder.is_dir():
        raise ApiError(404, f"there is no adapter folder {name!r} in the tasks folder", "lora_path")
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if (folder / file).is_symlink():
            raise ApiError(400, f"{name}/{file} is a link, expected a file", "lora_path")
    return folder


def _check_name(name: str, field: str) -> None:
    try:
        check_task_name(name, field)
    except DeploymentError as error:
        raise ApiError(400, str(error), field) from error
