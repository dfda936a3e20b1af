"""Weight files of a checkpoint folder, checked before anything is loaded: which file holds which tensor.

Only safetensors are ever read. The rule is that of transformers: ``model.safetensors``, else the shards that
``model.safetensors.index.json`` names.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from adalink.runtime.errors import ModelError
from adalink.runtime.storage.lfs import find_pointer
from adalink.training.models.hub_access import download_options
from adalink.training.models.size_limit import check_counts

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
ADAPTER_CONFIG = "adapter_config.json"
_QUANTIZATION_FIELDS = ("quantization_config", "compression_config")
_MODULES_FILE = "modules.json"  # of sentence-transformers


@dataclass(frozen=True)
class WeightFiles:
    """Tensors of a checkpoint, by what its files say.

    Attributes:
        tensors: path of the file of each tensor.
        others: weight files that no tensor is taken from, relative to the folder.
        has_own_head: whether ``config.json`` says that the head has a matrix of its own.
        numbers: how many numbers the tensors have together.
    """

    tensors: dict[str, Path]
    others: tuple[str, ...] = ()
    has_own_head: bool = False
    numbers: int = 0


def find_weight_files(folder: Path, name: str) -> WeightFiles:
    """Find and check the weight files of a checkpoint folder.

    Args:
        folder: a folder with ``config.json``.
        name: display name of the model, for errors.

    Raises:
        ModelError: a file is missing, truncated, pickled or outside the folder, an adapter lies beside the weights,
            the weights are quantised, or the config counts more layers than they can fill.
    """
    if (folder / ADAPTER_CONFIG).exists():  # also in the cache of a hub id
        refuse_adapter(name)
    config = _read_json(folder / "config.json", name)
    for field in _QUANTIZATION_FIELDS:
        if settings := _field(config, field):
            method = settings.get("quant_method", "unknown") if isinstance(settings, dict) else settings
            raise ModelError(
                f"base model {name}: config.json has a {field} (quant_method {method!r}): its weights are quantised "
                "and would not be loaded exactly; export the original checkpoint, with --quantize if it shall be small"
            )
    paths = _weight_paths(folder, name, config)
    tensors: dict[str, Path] = {}
    numbers = 0
    for path in paths:
        for tensor, size in _tensor_sizes(path, name).items():
            if tensor in tensors:
                raise ModelError(
                    f"base model {name}: tensor {tensor!r} is in {tensors[tensor].name} and in {path.name}; expected "
                    "one: remove the file that is not the model's"
                )
            tensors[tensor] = path
            numbers += size
    check_counts(config, len(tensors), name)
    others = tuple(
        path.relative_to(folder).as_posix()
        for path in sorted((*folder.glob("*.safetensors"), *_module_files(folder)))
        if path not in paths
    )
    parts = (config, config.get("text_config"))
    # The second is how transformers 5 writes T5 1.1, whose class ties the head unless both matrices are there.
    fields = ("tie_word_embeddings", "scale_decoder_outputs")
    has_own_head = any(isinstance(part, dict) and part.get(field) is False for part in parts for field in fields)
    return WeightFiles(tensors, others, has_own_head, numbers)


def check_pointers(path: Path, name: str) -> None:
    """Refuse Git LFS pointers: ``path`` itself, or a file in that folder; raises ``ModelError``."""
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if pointer := find_pointer(file):
            raise ModelError(f"base model {name}: {file.name} {pointer}")


def refuse_adapter(name: str) -> NoReturn:
    """Raise the ``ModelError`` of a checkpoint with an adapter beside its weights."""
    raise ModelError(
        f"base model {name}: {ADAPTER_CONFIG} lies beside its weights, of an adapter that transformers would apply "
        "where peft is installed; merge it first (PeftModel.merge_and_unload(), then save_pretrained into a new "
        "folder), or move the adapter's files away"
    )


def check_config(folder: Path, name: str) -> None:
    """Check the counts of a ``config.json`` without its weights, if there is one; raises ``ModelError``."""
    path = folder / "config.json"
    if path.is_file():
        check_counts(_read_json(path, name), None, name)


def fetch_weights(hub_id: str) -> Path | None:
    """Fetch config and weights of a hub id; returns their folder in the cache, ``None`` if they cannot be had.

    Raises:
        ModelError: it has an adapter beside its weights, or its index names a file that is pickled or outside.
    """
    if fetch_file(hub_id, ADAPTER_CONFIG) is not None:
        refuse_adapter(hub_id)
    config, weights = fetch_file(hub_id, "config.json"), fetch_file(hub_id, WEIGHTS_FILE)
    if weights is None and (weights := fetch_file(hub_id, INDEX_FILE)) is not None:
        for shard in sorted(set(_weight_map(weights, hub_id).values())):
            fetch_file(hub_id, shard)
    return None if config is None or weights is None else config.parent


def fetch_file(hub_id: str, file: str) -> Path | None:
    """A file of a hub id, from the cache or the network; ``None`` if it cannot be had."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(hub_id, file, **download_options(hub_id)))
    except (HfHubHTTPError, HFValidationError, OSError):  # transformers then says what is wrong
        return None


def _weight_paths(folder: Path, name: str, config: dict[str, Any]) -> list[Path]:
    """The weight files, each of which exists."""
    # A config may name the file itself; transformers then takes no other.
    explicit = config.get("transformers_weights")
    if explicit is not None:
        _check_shard(explicit, name, "config.json")
        paths = [folder / str(explicit)]
    elif (folder / WEIGHTS_FILE).is_file():
        paths = [folder / WEIGHTS_FILE]
    elif (folder / INDEX_FILE).is_file():
        paths = _shards(folder, name)
    else:
        files = sorted(path.name for path in folder.iterdir())
        pickled = [file for file in files if file.endswith(PICKLED_SUFFIXES)]
        hint = f"; {pickled[0]} is pickled, which can run code, and is never loaded" if pickled else ""
        named = ", ".join(file for file in files if file.endswith(".safetensors"))
        raise ModelError(
            f"base model {name}: its folder has neither {WEIGHTS_FILE} nor {INDEX_FILE}, but {named or 'no weights'}"
            f"{hint}; save it with save_pretrained(folder), or rename the file that holds the model"
        )
    if missing := [path.name for path in paths if not path.is_file()]:
        raise ModelError(
            f"base model {name}: {len(missing)} of {len(paths)} weight files are missing, the first {missing[0]!r}: "
            "download them into the folder"
        )
    return paths


def _shards(folder: Path, name: str) -> list[Path]:
    """Paths of the shards that the index names."""
    weight_map = _weight_map(folder / INDEX_FILE, name)
    paths = {shard: folder / shard for shard in sorted(set(weight_map.values()))}
    held = {shard: _tensor_sizes(path, name) for shard, path in paths.items() if path.is_file()}
    for tensor, shard in weight_map.items():
        if shard in held and tensor not in held[shard]:
            raise ModelError(
                f"base model {name}: {INDEX_FILE} says that tensor {tensor!r} is in {shard}, which does not hold it: "
                "index and shards are of different checkpoints; download them again"
            )
    return list(paths.values())


def _weight_map(index: Path, name: str) -> dict[str, str]:
    """The file of each tensor, by the index; every file is a safetensors file inside the folder."""
    weight_map = _read_json(index, name).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(
            f"base model {name}: {INDEX_FILE} has no weight_map of tensors and their files: download it again"
        )
    for shard in weight_map.values():
        _check_shard(shard, name, INDEX_FILE)
    return weight_map


def _check_shard(shard: Any, name: str, where: str) -> None:
    """Refuse a file name that is not a safetensors file inside the folder; raises ``ModelError``."""
    path = PurePosixPath(shard) if isinstance(shard, str) else None
    is_inside = path is not None and not path.is_absolute() and ".." not in path.parts and "\\" not in str(shard)
    if path is None or not is_inside or ":" in str(shard):
        raise ModelError(
            f"base model {name}: {where} names {shard!r}, which is not a file inside the model's folder; weights are "
            "read from there alone: put them there, and correct the name"
        )
    if path.suffix != ".safetensors":
        raise ModelError(
            f"base model {name}: {where} names {shard!r}; expected .safetensors files: others may be pickled, which "
            "can run code, and are never loaded: convert them with save_pretrained(folder)"
        )


def _tensor_sizes(path: Path, name: str) -> dict[str, int]:
    """How many numbers each tensor of a safetensors file has, whose header is checked; raises ``ModelError``."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {tensor: math.prod(file.get_slice(tensor).get_shape()) for tensor in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(
            f"base model {name}: {path.name} ({path.stat().st_size} bytes) is not a complete safetensors file: {error}"
            "; download it again"
        ) from error


def _module_files(folder: Path) -> list[Path]:
    """Weights of further modules of a sentence-transformers folder, such as ``2_Dense``."""
    try:
        modules = json.loads((folder / _MODULES_FILE).read_bytes())
        paths = [str(module["path"]) for module in modules if module["path"]]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return []
    inside = [path for path in paths if not PurePosixPath(path).is_absolute() and ".." not in PurePosixPath(path).parts]
    return [file for path in inside for file in sorted((folder / path).glob("*.safetensors"))]


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"base model {name}: {path.name} cannot be read: {error}; download it again") from error
    if not isinstance(content, dict):
        raise ModelError(f"base model {name}: {path.name} is not a JSON object; download it again")
    return content


def _field(config: dict[str, Any], field: str) -> Any:
    """A field of the config or of one of its parts, such as the language model's."""
    parts = (config, *(part for part in config.values() if isinstance(part, dict)))
    return next((part[field] for part in parts if part.get(field)), None)
