"""``export_engine``: the base of a deployment to a compiled TensorRT engine, with embedders for every task."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from adalink.export.adapter.embedder_graph import EMBEDDERS, build_embedder_graph
from adalink.export.engine.graph import engine_graph
from adalink.export.engine.progress import EngineProgress
from adalink.export.engine.request import check_request, find_portable
from adalink.export.engine.targets import CURRENT, resolve_target
from adalink.export.engine.tensorrt_builder import BuiltPlan, Sizes, build_plan, writes_in_place
from adalink.export.writer import DeploymentWriter, open_writer
from adalink.runtime.errors import BackendUnavailableError, ConfigError
from adalink.runtime.profile import Profile, ShapeRange, check_profile, default_profile, parse_profile
from adalink.runtime.storage.integrity import locate, read_graph, verify_files
from adalink.runtime.storage.manifest import Base, Manifest, Variant, Vision
from adalink.runtime.storage.manifest_validation import check_task_name
from adalink.runtime.storage.verification_cache import check_graphs
from adalink.runtime.trt.api import TENSORRT_BACKENDS, Api, load_api
from adalink.runtime.trt.record import PLAN_FILE, RECORD_FILE, VISION_FILE, EngineRecord, VisionRecord

if TYPE_CHECKING:
    import onnx

_LARGEST_RANK, _MOST_SLOTS = 256, 1 << 14
_LIKELY_SLOTS = _LIKELY_RANK = 16
_MOST_ELEMENTS = (1 << 31) - 1  # of one tensor


def export_engine(
    deployment: str | Path,
    backend: str,
    *,
    target: Sequence[str] = (CURRENT,),
    profile: Profile | str | None = None,
    name: str | None = None,
    variant: str | None = None,
    tasks: Sequence[str] = (),
    replace: bool = False,
    progress: EngineProgress | None = None,
) -> Manifest:
    """Build an engine of a deployment's base, its embedders, and the graphs of some tasks. The base does not change.

    For a base that takes images, the vision tower is built too, for as many images at a time as the profile says.

    Args:
        deployment: the deployment folder.
        backend: ``"tensorrt"`` or ``"tensorrt-rtx"``.
        target: target GPUs; see ``adalink.export.engine.targets.resolve_target``.
        profile: shape ranges, or the text of them for ``adalink.runtime.profile.parse_profile``.
        name: name of the variant; the backend's by default.
        variant: the portable variant to build from; the only one by default.
        tasks: tasks whose graphs are built as well, for programs that do not use this kit.
        replace: whether to replace an existing engine of that name.
        progress: callback, called with the current step and the fraction done, ``None`` where that is not known.

    Returns:
        The deployment's manifest.

    Raises:
        BackendUnavailableError: the library is not installed, or needs a GPU and there is none.
        BackendError: the library refused; with its own message.
        ConfigError: the base, variant, target or profile cannot be built.
        DeploymentError: there is no deployment or no portable variant, the name is taken, or the disk is full.
        GraphError: the portable graph is not one of this kit.
        UnknownTaskError: a task is not deployed.
    """
    if backend not in TENSORRT_BACKENDS:
        raise BackendUnavailableError(f"backend {backend!r} has no engines: expected {' or '.join(TENSORRT_BACKENDS)}")
    progress = progress or (lambda line, fraction: None)
    engine = backend if name is None else name
    check_task_name(engine, "engine")
    api = load_api(backend)
    with open_writer(deployment) as writer:
        manifest = writer.manifest
        check_request(manifest, engine, tasks, replace=replace)
        source = find_portable(Path(deployment), manifest, variant)
        shapes = _profile(profile, manifest.base)
        resolved, set_target = resolve_target(api, target)
        progress("reading the portable graph", None)
        tower = manifest.base.vision.files if manifest.base.vision else ()
        verify_files(writer.folder, manifest, (*manifest.variants[source].files, *tower))
        for files in (manifest.variants[source].files, tower):
            check_graphs(writer.folder, manifest, files)
        build = partial(build_plan, api, set_target=set_target, progress=progress)
        builder = _EngineBuilder(writer, manifest, api, writer.fresh_folder(f"engines/{engine}"), shapes, build)
        record = builder.build_all(source, resolved, tuple(dict.fromkeys(tasks)))
        builder.write_record(record)
        compiled = Variant(
            target=backend,
            backends=(backend,),
            graph=f"{builder.folder}/{PLAN_FILE}",
            vision_graph=None if record.vision is None else f"{builder.folder}/{VISION_FILE}",
            files=builder.files,
        )
        progress("hashing and committing", None)
        return writer.commit(msgspec.structs.replace(manifest, variants={**manifest.variants, engine: compiled}))


class _EngineBuilder:
    """Builds the plans of one engine into a deployment."""

    def __init__(
        self,
        writer: DeploymentWriter,
        manifest: Manifest,
        api: Api,
        folder: str,
        profile: Profile,
        build: partial[BuiltPlan],
    ) -> None:
        self.folder = folder
        self.files: tuple[str, ...] = ()
        self._writer, self._manifest, self._api = writer, manifest, api
        self._profile, self._build = profile, build

    def build_all(self, source: str, target: tuple[str, ...], tasks: tuple[str, ...]) -> EngineRecord:
        """Build every plan; returns the engine's record."""
        base, files = self._manifest.base, self._manifest.files
        graph = self._manifest.variants[source].graph
        portable = locate(self._writer.folder, graph)
        cache = None
        if base.kind == "decoder":
            cache = "in-place" if writes_in_place(self._api) else "growing"
        rank, slots = embedder_limits(base.hidden_size)
        embedders, task_plans = {}, {}
        # Small plans first: an unsupported target shows within seconds.
        for embedder in EMBEDDERS:
            embedders[embedder] = f"front-{embedder.replace('.', '-')}.plan"
            self._plan(
                embedders[embedder], build_embedder_graph(embedder, base), [embedder_sizes(self._profile, rank, slots)]
            )
        for task in tasks:
            task_plans[task] = f"task-{task}.plan"
            self._plan(task_plans[task], self._task_graph(task), [_rows_of(self._profile)])
        vision = None if base.vision is None else self._build_vision(base.vision)
        model = engine_graph(portable, base, self._profile.capacity if cache == "in-place" else None)
        built = self._plan(PLAN_FILE, model, base_sizes(self._profile), portable)
        return EngineRecord(
            backend=self._api.backend,
            version=self._api.version,
            target=target,
            variant=source,
            onnx_sha256=files[graph].sha256,
            weights_sha256=files[f"{graph}.data"].sha256,
            profile=self._profile,
            cache=cache,
            embedders=embedders,
            embedder_rank=rank,
            embedder_slots=slots,
            tasks=task_plans,
            build_seconds=round(built.seconds, 2),
            plan_bytes=built.size_bytes,
            vision=vision,
        )

    def write_record(self, record: EngineRecord) -> None:
        """Write ``engine.json``."""
        data = msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n"
        self._stage(RECORD_FILE).write_bytes(data)

    def _build_vision(self, vision: Vision) -> VisionRecord | None:
        """Build the vision tower from its graph, if the profile has a range of images."""
        import onnx

        if self._profile.images is None:
            return None
        path, files = locate(self._writer.folder, vision.graph), self._manifest.files
        model = onnx.load(str(path), load_external_data=False)
        built = self._plan(VISION_FILE, model, [{"images": self._profile.images}], path)
        return VisionRecord(
            onnx_sha256=files[vision.graph].sha256,
            weights_sha256=files[f"{vision.graph}.data"].sha256,
            build_seconds=round(built.seconds, 2),
            plan_bytes=built.size_bytes,
        )

    def _plan(
        self, name: str, graph: onnx.ModelProto, profiles: Sequence[Sizes], origin: Path | None = None
    ) -> BuiltPlan:
        return self._build(graph, self._stage(name), profiles, origin=origin)

    def _stage(self, name: str) -> Path:
        relative = f"{self.folder}/{name}"
        self.files = (*self.files, relative)
        return self._writer.stage(relative)

    def _task_graph(self, task: str) -> onnx.ModelProto:
        import onnx

        data = read_graph(self._writer.folder, self._manifest, self._manifest.tasks[task].graph)
        return onnx.load_from_string(data)


def base_sizes(profile: Profile) -> list[Sizes]:
    """Shape ranges of a base graph's named dimensions: one profile for an encoder, prefill and decode for a decoder.

    A decoder's forward passes may have any length: the first chunk of a chunked prompt is the remainder. Names that a
    graph does not have (``past`` with a cache in place) are not used.
    """
    if profile.past is None:
        return [{"batch": profile.batch, "sequence": profile.seq}]
    batch, capacity = profile.batch, profile.capacity
    past = profile.past
    prefill: Sizes = {
        "batch": batch,
        "sequence": ShapeRange(1, profile.seq.opt, profile.seq.max),
        "past": ShapeRange(0, 0, capacity - 1),
        "total": ShapeRange(1, profile.seq.opt, capacity),
        "places": ShapeRange(1, batch.opt, profile.logits_capacity),
    }
    decode: Sizes = {
        "batch": batch,
        "sequence": ShapeRange(1, 1, 1),
        "past": ShapeRange(0, past.opt, capacity - 1),
        "total": ShapeRange(1, past.opt + 1, capacity),
        "places": batch,
    }
    return [prefill, decode]


def embedder_limits(hidden_size: int) -> tuple[int, int]:
    """Largest rank and most slots of an embedder: the weights of all slots are one tensor of less than 2^31 numbers."""
    rank = min(hidden_size, _LARGEST_RANK)
    return rank, min(_MOST_SLOTS, _MOST_ELEMENTS // (rank * hidden_size))


def embedder_sizes(profile: Profile, rank: int, slots: int) -> Sizes:
    """Shape ranges of an embedder's named dimensions."""
    return {
        **_rows_of(profile),
        "slots": ShapeRange(1, min(_LIKELY_SLOTS, slots), slots),
        "rank": ShapeRange(1, min(_LIKELY_RANK, rank), rank),
    }


def _rows_of(profile: Profile) -> Sizes:
    """Shape ranges of rows and positions of the base's input, from 1 on."""
    return {
        "batch": ShapeRange(1, profile.batch.opt, profile.batch.max),
        "sequence": ShapeRange(1, profile.seq.opt, profile.seq.max),
    }


def _profile(requested: Profile | str | None, base: Base) -> Profile:
    if isinstance(requested, str):
        return parse_profile(requested, base)
    profile = default_profile(base) if requested is None else requested
    if (profile.past is None) != (base.cache is None):
        raise ConfigError(
            f"profile {profile}: past belongs to decoders, and to all of them; {base.name} is {base.kind}"
        )
    check_profile(profile, base)
    return profile
