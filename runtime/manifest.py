"""``manifest.json``: what a deployment holds, and every file with its digest and size (docs/formats.md)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from adalink.runtime.adapter import ACTIVATIONS, KINDS, SCOPES
from adalink.runtime.digest import digest_bytes
from adalink.runtime.errors import DeploymentError, IntegrityError, ManifestError

MANIFEST_FILE = "manifest.json"
SCHEMA_VERSION = 3
DTYPES = ("float32", "float16", "bfloat16")
FOLDS = ("table", "rank")
BASE_KINDS = ("decoder", "encoder", "encoder-decoder")
_MAX_MANIFEST_BYTES = 64 << 20
_TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
# Folders and a name with slashes between; none is empty, "." or "..".
_PATH = re.compile(r"(?:(?!\.{1,2}/)[^/\\\0]+/)*(?!\.{1,2}$)[^/\\\0]+")
# The digest's line as the indented encoding has it; only fields of the top level are indented by two.
_NO_DIGEST = b'\n  "digest": ""'


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of the manifest: immutable, and an unknown field is an error."""


class FileRecord(_Strict, frozen=True, kw_only=True, gc=False):
    """Digest and size of one file."""

    sha256: str
    size_bytes: int


class Cache(_Strict, frozen=True, kw_only=True):
    """Shape of the KV cache: per layer, key and value of shape ``(batch, kv_heads, past, head_dim)``."""

    layers: int
    kv_heads: int
    head_dim: int


class Base(_Strict, frozen=True, kw_only=True):
    """The base contract: what a task must match, and what the runtime needs to know of the model.

    Attributes:
        name: name of the model, for people.
        architecture: Hugging Face ``model_type``.
        kind: one of ``BASE_KINDS``.
        fingerprint: digest of the input embedding matrix.
        vocab_size: rows of the embedding table.
        hidden_size: width of the embeddings.
        embedding_dtype: dtype of the table and of ``inputs_embeds``; one of ``DTYPES``.
        modalities: modalities that the base takes.
        max_positions: longest sequence the model was made for; ``None`` when it has no limit of its own.
        cache: shape of the KV cache; ``None`` for an encoder.
        eos_token_ids: tokens that end a generation.
        pad_token_id: token that fills shorter rows.
        bos_token_id: token that begins a text, for chat templates that write it.
        decoder_start_token_id: first decoder token of an encoder-decoder.
        embeddings: path of the table (safetensors, one tensor ``embeddings`` with shape ``(vocab, d)``): what the
            embedding module returns for each id.
        tokenizer: path of ``tokenizer.json``; ``None`` when the checkpoint has none.
        chat_template: path of the Jinja chat template, if the model has one.
        bank: path of the bank graph of each of ``adalink.runtime.adapter.KINDS``.
    """

    name: str
    architecture: str
    kind: str
    fingerprint: str
    vocab_size: int
    hidden_size: int
    embedding_dtype: str
    modalities: tuple[str, ...]
    max_positions: int | None
    cache: Cache | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    bos_token_id: int | None = None
    decoder_start_token_id: int | None = None
    embeddings: str
    tokenizer: str | None
    chat_template: str | None = None
    bank: dict[str, str]


class Quantization(_Strict, frozen=True, kw_only=True):
    """How a variant's constant matrices are stored: blocks of integers with a scale and a zero point each.

    Attributes:
        algorithm: how they were chosen.
        bits: bits of a weight.
        block_size: weights of a block, consecutive along the input.
        sensitive_bits: bits of a weight of the matrices whose rounding costs most (docs/decisions/0007).
        sensitive_block_size: weights of a block of those.
        activation_bits: bits that the inputs of these matrices are rounded to while the engine runs.
    """

    algorithm: str
    bits: int
    block_size: int
    sensitive_bits: int
    sensitive_block_size: int
    activation_bits: int


class Variant(_Strict, frozen=True, kw_only=True):
    """One form of the base: an ONNX graph, or a compiled engine.

    Attributes:
        target: what it was exported for (``portable``, ``onnxruntime-cpu``, ``onnxruntime-cuda``); of a compiled
            engine, its backend.
        quantization: how its matrices are quantised; ``None`` when they are stored as they are.
        backends: runtime backends it serves.
        graph: path of the graph, or of the engine's plan; for an encoder-decoder, of its encoder.
        decoder_graph: path of the decoder of an encoder-decoder.
        files: every file of the variant, the graphs and their external data, or the plans and their record.
    """

    target: str
    quantization: Quantization | None = None
    backends: tuple[str, ...]
    graph: str
    decoder_graph: str | None = None
    files: tuple[str, ...]

    @property
    def is_compiled(self) -> bool:
        """Whether ``graph`` is the plan of an engine rather than an ONNX file."""
        return not self.graph.endswith(".onnx")


class Fold(_Strict, frozen=True, kw_only=True):
    """A text task computed ahead for every token of the vocabulary (docs/formats.md).

    Attributes:
        kind: ``"table"``: the adapted embeddings; ``"rank"``: ``act(down(x))`` of each token.
        path: safetensors file with the one tensor.
    """

    kind: str
    path: str


class Task(_Strict, frozen=True, kw_only=True):
    """One deployed adapter.

    Attributes:
        graph: path of the task graph.
        config: path of its ``adapter_config.json``.
        weights: path of its ``adapter_model.safetensors``.
        adapter_digest: digest of the adapter (`adalink.runtime.adapter.Adapter.digest`).
        rank: rank of the bottleneck.
        activation: its activation.
        modalities: modalities it adapts, in the order of the graph's ``modality`` indices.
        scope: ``"all"`` or ``"prompt"``.
        fold: the task computed ahead, if it was exported so.
    """

    graph: str
    config: str
    weights: str
    adapter_digest: str
    rank: int
    activation: str
    modalities: tuple[str, ...]
    scope: str
    fold: Fold | None = None

    @property
    def files(self) -> tuple[str, ...]:
        """Paths of the task's files."""
        own = (self.graph, self.config, self.weights)
        return own if self.fold is None else (*own, self.fold.path)


class Manifest(_Strict, frozen=True, kw_only=True):
    """The whole manifest; paths are relative to the deployment, with forward slashes.

    ``digest`` is of the manifest itself, encoded with that field empty: no byte of it can change unnoticed. Only
    ``encode_manifest`` fills it in.
    """

    schema_version: int
    kit_version: str
    base: Base
    variants: dict[str, Variant]
    tasks: dict[str, Task]
    files: dict[str, FileRecord]
    digest: str = ""

    def paths_in_use(self) -> set[str]:
        """Paths that the base, a variant or a task refers to."""
        single = (self.base.embeddings, self.base.tokenizer, self.base.chat_template)
        base = {path for path in (*single, *self.base.bank.values()) if path}
        variants = {path for variant in self.variants.values() for path in variant.files}
        tasks = {path for task in self.tasks.values() for path in task.files}
        return base | variants | tasks

    def size_bytes(self, paths: Iterable[str]) -> int:
        """Size of some of the files together."""
        return sum(self.files[path].size_bytes for path in paths)


def encode_manifest(manifest: Manifest) -> bytes:
    """Check ``manifest``, give it its digest and encode it; raises ``ManifestError``."""
    _check(manifest)
    data = _canonical(msgspec.structs.replace(manifest, digest=""))
    return data.replace(_NO_DIGEST, _NO_DIGEST[:-1] + digest_bytes(data).encode() + b'"', 1)


def decode_manifest(data: bytes, origin: str = MANIFEST_FILE) -> Manifest:
    """Decode and check a manifest; raises ``ManifestError`` with the path of the wrong field."""
    if len(data) > _MAX_MANIFEST_BYTES:
        raise ManifestError(f"{origin} has {len(data)} bytes, expected at most {_MAX_MANIFEST_BYTES}: not a manifest")
    try:
        version = msgspec.json.decode(data, type=_VersionOnly).schema_version
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _manifest_error(origin, error) from error
    if version != SCHEMA_VERSION:
        age = "newer" if version > SCHEMA_VERSION else "older"
        raise ManifestError(
            f"{origin}: $.schema_version is {version}, this kit reads {SCHEMA_VERSION}: the deployment was written by "
            f"a kit that is {age}; " + ("upgrade adalink-kit" if age == "newer" else "export it again"),
            field="$.schema_version",
        )
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _manifest_error(origin, error) from error
    _check(manifest, origin)
    if digest_bytes(data.replace(manifest.digest.encode(), b"", 1)) != manifest.digest:
        raise ManifestError(
            f"{origin}: $.digest is {manifest.digest!r}, not the digest of what the manifest says: it was altered "
            "after it was written; export the deployment again or restore it from a good copy",
            field="$.digest",
        )
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Read a deployment's manifest.

    Raises:
        DeploymentError: there is no such folder, or it holds no manifest.
        ManifestError: the manifest is wrong.
    """
    path = folder / MANIFEST_FILE
    try:
        with path.open("rb") as stream:
            data = stream.read(_MAX_MANIFEST_BYTES + 1)
    except FileNotFoundError as error:
        what = "holds no manifest.json" if folder.is_dir() else "does not exist"
        raise DeploymentError(
            f"deployment {folder} {what}: make one with 'adalink export base MODEL --out {folder}', and run that again "
            "if an export was interrupted"
        ) from error
    except OSError as error:
        raise DeploymentError(f"deployment {folder}: cannot read {MANIFEST_FILE}: {error.strerror}") from error
    return decode_manifest(data, origin=str(path))


def locate(folder: Path, relative: str) -> Path:
    """Path of a deployment's file; raises ``IntegrityError`` if it is missing or a link leads outside."""
    root = folder.resolve()
    path = root / relative
    try:
        resolved = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise IntegrityError(
            f"{path}: the manifest lists this file, but it cannot be found: export it again, or reopen the "
            "deployment if another process has just replaced it"
        ) from error
    if not resolved.is_relative_to(root):
        raise IntegrityError(f"{path} is a link to {resolved}, outside the deployment: replace it by the file itself")
    if not resolved.is_file():
        raise IntegrityError(f"{path} is not a file: export it again")
    return resolved


def check_task_name(name: str, what: str = "task") -> None:
    """Check that the name of a task, or of an engine, can be a folder name; raises ``DeploymentError``."""
    if not _TASK_NAME.fullmatch(name):
        raise DeploymentError(
            f"{what} name {name!r}: expected 1 to 64 letters, digits, '-' or '_', starting with a letter or digit"
        )


def _canonical(manifest: Manifest) -> bytes:
    return msgspec.json.format(msgspec.json.encode(manifest, order="sorted"), indent=2) + b"\n"


class _VersionOnly(msgspec.Struct):
    schema_version: int


def _manifest_error(origin: str, error: Exception) -> ManifestError:
    """Turn msgspec's error into ours, with the path of the wrong field."""
    found = re.search(r"`(\$[^`]*)`$", str(error))
    field = found.group(1) if found else "$"
    missing = re.search(r"missing required field `([^`]+)`", str(error))
    if missing:
        field = f"{field}.{missing.group(1)}"
    return ManifestError(f"{origin}: {field}: {error}; export the deployment again", field=field)


def _check(manifest: Manifest, origin: str = MANIFEST_FILE) -> None:
    """Check what types alone cannot say."""

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
    demand(base.bank.keys() == set(KINDS), "$.base.bank", sorted(base.bank), f"a graph for each of {', '.join(KINDS)}")
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
    for token in (*base.eos_token_ids, base.pad_token_id):
        demand(0 <= token < base.vocab_size, "$.base.eos_token_ids or pad_token_id", token, "an id in the vocabulary")
    demand(bool(manifest.variants), "$.variants", {}, "at least one variant of the base")
    for name, variant in manifest.variants.items():
        for path in (variant.graph, variant.decoder_graph):
            field = f"$.variants[{name!r}].files"
            demand(path is None or path in variant.files, field, variant.files, f"a list with {path}")
    for name, task in manifest.tasks.items():
        _check_task(name, task, base, demand)
    for path, record in manifest.files.items():
        # Thousands of tasks have three files each: only a wrong one is worth a description.
        if not (_PATH.fullmatch(path) and 0 <= record.size_bytes <= 1 << 42 and _DIGEST.fullmatch(record.sha256)):
            field = f"$.files[{path!r}]"
            demand(bool(_PATH.fullmatch(path)), field, path, "a relative path inside the deployment, without '..'")
            demand(0 <= record.size_bytes <= 1 << 42, f"{field}.size_bytes", record.size_bytes, f"0 to {1 << 42}")
            demand(False, f"{field}.sha256", record.sha256, "'sha256:' and 64 digits")
    for path in sorted(manifest.paths_in_use() - manifest.files.keys()):
        demand(False, f"$.files[{path!r}]", None, "a digest and size, since the manifest refers to it")


def _check_task(name: str, task: Task, base: Base, demand: Callable[[bool, str, object, str], None]) -> None:
    is_sound = (
        _TASK_NAME.fullmatch(name)
        and 1 <= task.rank <= base.hidden_size
        and task.activation in ACTIVATIONS
        and task.scope in SCOPES
        and (task.fold is None or task.fold.kind in FOLDS)
        and _DIGEST.fullmatch(task.adapter_digest)
    )
    if not is_sound:
        field = f"$.tasks[{name!r}]"
        demand(bool(_TASK_NAME.fullmatch(name)), field, name, "letters, digits, '-' and '_'")
        demand(1 <= task.rank <= base.hidden_size, f"{field}.rank", task.rank, f"1 to {base.hidden_size}")
        demand(task.activation in ACTIVATIONS, f"{field}.activation", task.activation, f"one of {ACTIVATIONS}")
        demand(task.scope in SCOPES, f"{field}.scope", task.scope, f"one of {SCOPES}")
        fold = None if task.fold is None else task.fold.kind
        demand(fold is None or fold in FOLDS, f"{field}.fold.kind", fold, f"one of {FOLDS}")
        demand(False, f"{field}.adapter_digest", task.adapter_digest, "a digest")
