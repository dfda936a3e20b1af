"""Manifest validation beyond the types of fields."""

from __future__ import annotations

import re
from collections.abc import Callable

from adalink.runtime.errors import DeploymentError, ManifestError
from adalink.runtime.storage.adapter_spec import ACTIVATION_KEYS, Fault, find_fault
from adalink.runtime.storage.generation_schema import check_generation
from adalink.runtime.storage.manifest import (
    BASE_KINDS,
    DTYPES,
    FOLDS,
    KV_CACHE_DTYPES,
    MANIFEST_FILE,
    Base,
    Manifest,
    Task,
    Variant,
    Vision,
)
from adalink.runtime.storage.pooling_schema import check_pooling
from adalink.runtime.storage.table_schema import check_table_storage

_TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
# Folders and a name with slashes between; none is empty, "." or "..".
_PATH = re.compile(r"(?:(?!\.{1,2}/)[^/\\\0]+/)*(?!\.{1,2}$)[^/\\\0]+")


def check_task_name(name: str, what: str = "task") -> None:
    """Check that the name of a task, or of an engine, can be a folder name; raises ``DeploymentError``."""
    if not _TASK_NAME.fullmatch(name):
        raise DeploymentError(
            f"{what} name {name!r}: expected 1 to 64 letters, digits, '-' or '_', starting with a letter or digit"
        )


def check_manifest(manifest: Manifest, origin: str = MANIFEST_FILE) -> None:
    """Validate a manifest's values; raises ``ManifestError`` with the path of the wrong field."""

    def demand(holds: bool, field: str, received: object, expected: str) -> None:
        if not holds:
            raise ManifestError(f"{origin}: {field} is {received!r}, expected {expected}", field=field)

    base = manifest.base
    for name, limit in (("vocab_size", 1 << 26), ("hidden_size", 1 << 20)):
        value = getattr(base, name)
        demand(1 <= value <= limit, f"$.base.{name}", value, f"1 to {limit}")
    demand(base.kind in BASE_KINDS, "$.base.kind", base.kind, f"one of {', '.join(BASE_KINDS)}")
    demand(base.embedding_dtype in DTYPES, "$.base.embedding_dtype", base.embedding_dtype, f"one of {DTYPES}")
    demand(bool(_DIGEST.fullmatch(base.fingerprint)), "$.base.fingerprint", base.fingerprint, "'sha256:' and 64 digits")
    known = not base.weights_digest or bool(_DIGEST.fullmatch(base.weights_digest))
    demand(known, "$.base.weights_digest", base.weights_digest, "'sha256:' and 64 digits, or nothing")
    demand(
        base.bank.keys() == set(ACTIVATION_KEYS),
        "$.base.bank",
        sorted(base.bank),
        f"a graph for each of {', '.join(ACTIVATION_KEYS)}",
    )
    demand(bool(base.modalities), "$.base.modalities", base.modalities, "at least one name")
    demand(
        base.max_positions is None or 1 <= base.max_positions <= 1 << 31,
        "$.base.max_positions",
        base.max_positions,
        "null or a positive number",
    )
    demand(
        (base.cache is None) == (base.kind == "encoder"),
        "$.base.cache",
        base.cache,
        "null for an encoder and a shape for every other kind",
    )
    if base.cache is not None:
        for name in ("layers", "kv_heads", "head_dim"):
            value = getattr(base.cache, name)
            demand(1 <= value <= 1 << 16, f"$.base.cache.{name}", value, f"1 to {1 << 16}")
    _check_special_tokens(base, demand)
    if base.generation is not None:
        check_generation(base.generation, base.vocab_size, demand)
    if base.pooling is not None:
        check_pooling(base.pooling, demand)
    if base.table is not None:
        check_table_storage(base.table, base.hidden_size, demand)
    if base.vision is not None:
        _check_vision(base.vision, base, demand)
    demand(bool(manifest.variants), "$.variants", {}, "at least one variant of the base")
    for name, variant in manifest.variants.items():
        for path in (variant.graph, variant.decoder_graph, variant.vision_graph):
            field = f"$.variants[{name!r}].files"
            demand(path is None or path in variant.files, field, variant.files, f"a list with {path}")
        _check_cache_graphs(name, variant, base, demand)
        field, tower = f"$.variants[{name!r}].vision_graph", variant.vision_graph
        demand(tower is None or base.vision is not None, field, tower, "null for a base that takes no images")
    for name, task in manifest.tasks.items():
        if fault := _check_task(name, task, base, demand):
            field = f"$.tasks[{name!r}].{fault.field}"
            raise ManifestError(f"{origin}: {field}: {fault.message}", field=field)
    for path, record in manifest.files.items():
        # Fast path: thousands of tasks have three files each, and only a wrong one needs a description.
        if not (_PATH.fullmatch(path) and 0 <= record.size_bytes <= 1 << 42 and _DIGEST.fullmatch(record.sha256)):
            field = f"$.files[{path!r}]"
            demand(bool(_PATH.fullmatch(path)), field, path, "a relative path inside the deployment, without '..'")
            demand(0 <= record.size_bytes <= 1 << 42, f"{field}.size_bytes", record.size_bytes, f"0 to {1 << 42}")
            demand(False, f"{field}.sha256", record.sha256, "'sha256:' and 64 digits")
    for path in sorted(manifest.paths_in_use() - manifest.files.keys()):
        demand(False, f"$.files[{path!r}]", None, "a digest and size, since the manifest refers to it")


def _check_cache_graphs(
    name: str, variant: Variant, base: Base, demand: Callable[[bool, str, object, str], None]
) -> None:
    field, graphs = f"$.variants[{name!r}].kv_cache_graphs", variant.kv_cache_graphs
    allowed = KV_CACHE_DTYPES if base.kind == "decoder" and variant.graph.endswith(".onnx") else ()
    demand(graphs.keys() <= set(allowed), field, graphs, f"no dtypes but {', '.join(allowed) or 'none'}")
    demand(set(graphs.values()) <= set(variant.files), field, graphs, "paths of $.files of the variant")


def _check_special_tokens(base: Base, demand: Callable[[bool, str, object, str], None]) -> None:
    """Validate the ids of special tokens, and the number of token types."""
    ids = {f"eos_token_ids[{index}]": token for index, token in enumerate(base.eos_token_ids)}
    ids |= {"pad_token_id": base.pad_token_id}
    for name in ("bos_token_id", "decoder_start_token_id"):
        if (token := getattr(base, name)) is not None:
            ids[name] = token
    for name, token in ids.items():
        demand(0 <= token < base.vocab_size, f"$.base.{name}", token, f"an id of the vocabulary of {base.vocab_size}")
    if base.kind == "encoder-decoder":
        start = base.decoder_start_token_id
        demand(start is not None, "$.base.decoder_start_token_id", start, "the id with which the decoder begins")
    types = base.token_types
    most = 1 << 16 if base.kind == "encoder" else 1
    demand(types is None or 1 <= types <= most, "$.base.token_types", types, f"1 to {most} for this kind, or null")


def _check_vision(vision: Vision, base: Base, demand: Callable[[bool, str, object, str], None]) -> None:
    demand(base.kind == "decoder", "$.base.vision", vision, f"null for a base of kind {base.kind}")
    demand(
        "image" in base.modalities, "$.base.modalities", base.modalities, "'image' among them, as $.base.vision says"
    )
    demand(vision.graph in vision.files, "$.base.vision.files", vision.files, f"a list with {vision.graph}")
    token, tokens = vision.image_token_id, vision.tokens_per_image
    is_valid = 0 <= token < base.vocab_size and token != base.pad_token_id
    demand(is_valid, "$.base.vision.image_token_id", token, "an id in the vocabulary that is not padding")
    demand(1 <= tokens <= 1 << 16, "$.base.vision.tokens_per_image", tokens, f"1 to {1 << 16}")
    if vision.tiles is not None:
        tiles = vision.tiles
        cells = [cell for row in tiles.before_tile for cell in row]
        is_square = all(len(row) == len(tiles.before_tile) for row in tiles.before_tile)
        demand(is_square, "$.base.vision.tiles.before_tile", tiles.before_tile, "as many columns as rows")
        for token in (token for ids in (*cells, tiles.before_whole, tiles.before_only, tiles.end) for token in ids):
            is_valid = 0 <= token < base.vocab_size and token != vision.image_token_id
            demand(is_valid, "$.base.vision.tiles", token, "ids in the vocabulary, none of them the placeholder")
    if vision.prompt_form is not None:
        image = vision.prompt_form.image
        demand(bool(image), "$.base.vision.prompt_form.image", image, "the text of the placeholder")
    if vision.patches is not None:
        merge, window = vision.patches.merge, vision.patches.window
        is_sound = 1 <= merge <= 1 << 8 and (window is None or 1 <= window <= 1 << 12)
        demand(is_sound, "$.base.vision.patches", vision.patches, "a merge of 1 to 256, a window of 1 to 4096 or null")
        is_piece = tokens == 1 and vision.tiles is None and all(size % merge == 0 for size in vision.image_size)
        demand(is_piece, "$.base.vision", vision, "image_size of whole patches, one token an image and no tiles")
    for size in vision.image_size:
        demand(1 <= size <= 1 << 14, "$.base.vision.image_size", vision.image_size, f"1 to {1 << 14} each")


def _check_task(name: str, task: Task, base: Base, demand: Callable[[bool, str, object, str], None]) -> Fault | None:
    """Validate a task; returns the first fault of its settings."""
    fold = None if task.fold is None else task.fold.kind
    if not (_TASK_NAME.fullmatch(name) and (fold is None or fold in FOLDS) and _DIGEST.fullmatch(task.adapter_digest)):
        field = f"$.tasks[{name!r}]"
        demand(bool(_TASK_NAME.fullmatch(name)), field, name, "letters, digits, '-' and '_'")
        demand(fold is None or fold in FOLDS, f"{field}.fold.kind", fold, f"one of {FOLDS}")
        demand(False, f"{field}.adapter_digest", task.adapter_digest, "a digest")
    return find_fault(task, base.hidden_size)
