"""TensorRT builder: one ONNX graph to one plan. Errors carry the library's own message."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from adalink.export.engine.progress import EngineProgress, make_monitor
from adalink.runtime.builds import count_builder_call
from adalink.runtime.errors import GraphError
from adalink.runtime.logs import get_logger
from adalink.runtime.profile import ShapeRange
from adalink.runtime.storage.user_cache import cache_path, read_cache_file, write_cache_file
from adalink.runtime.trt.api import Api

if TYPE_CHECKING:
    import onnx

# Shape ranges of the named dimensions of a graph's inputs: one profile.
Sizes = Mapping[str, ShapeRange]
ConfigureTarget = Callable[[Any], None]

_LOG = get_logger(__name__)


@dataclass(frozen=True)
class BuiltPlan:
    """A plan file.

    Attributes:
        seconds: time of parsing and building.
        size_bytes: size of the file.
    """

    seconds: float
    size_bytes: int


class PlanDraft:
    """A parsed network with its profiles, before it is built; a context manager.

    The library's objects are released in dependency order: a parser that outlives its network crashes the process.

    Attributes:
        network: the parsed network.
        config: the builder's settings.
        profiles: optimisation profiles, in their order.
    """

    def __init__(self, api: Api, graph: onnx.ModelProto, origin: Path | None, name: str) -> None:
        """Parse a graph.

        Args:
            api: the library.
            graph: the graph to parse, as a strongly typed network: its precision is the graph's.
            origin: a file in the folder of its external data.
            name: name of the plan, for messages.

        Raises:
            BackendError: the parser refused.
        """
        self._api, self._name, self._graph = api, name, graph
        self._begun = time.perf_counter()
        # The parser's constants may be views of these bytes.
        self._bytes = graph.SerializeToString()
        self._builder: Any = api.make_builder()
        self.network: Any = self._builder.create_network(api.network_flags())
        self._parser: Any = api.trt.OnnxParser(self.network, api.logger)
        self.config: Any = self._builder.create_builder_config()
        self.profiles: list[Any] = []
        self._monitor: Any = None
        where = (str(origin),) if origin is not None else ()
        if not self._parser.parse(self._bytes, *where):
            reasons = [self._parser.get_error(index).desc() for index in range(self._parser.num_errors)]
            self.close()
            raise api.error(
                f"{name}: its graph cannot be parsed", "try a newer version, and report this with the graph", reasons
            )
        # In this mode a float32 product would be computed with 10 bits of its mantissa.
        if (tf32 := getattr(api.trt.BuilderFlag, "TF32", None)) is not None:
            self.config.clear_flag(tf32)

    def __enter__(self) -> PlanDraft:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release all objects of the library; the draft cannot be used afterwards."""
        self._parser = None
        self.config = None
        self.profiles = []
        self.network = None
        self._builder = None
        self._monitor = None

    def add_profile(self, sizes: Sizes) -> None:
        """Add an optimisation profile: a shape range for each named dimension of the inputs.

        Raises:
            GraphError: an input has a dimension that ``sizes`` does not name.
            BackendError: the library refused.
        """
        profile = self._builder.create_optimization_profile()
        for value in self._graph.graph.input:
            dims = value.type.tensor_type.shape.dim
            if unknown := [dim.dim_param for dim in dims if dim.dim_param and dim.dim_param not in sizes]:
                raise GraphError(
                    f"{self._name}: input {value.name} has a dimension {unknown[0]!r}, expected {', '.join(sizes)}: "
                    "export the base again"
                )
            ranges = [sizes[dim.dim_param] if dim.dim_param else ShapeRange(*[dim.dim_value] * 3) for dim in dims]
            limits = zip(*((limit.min, limit.opt, limit.max) for limit in ranges), strict=True)
            profile.set_shape(value.name, *limits)
        if self.config.add_optimization_profile(profile) < 0:
            raise self._api.error(f"{self._name}: its profile was refused", "choose other sizes with --profile")
        self.profiles.append(profile)

    def build(self, path: Path, set_target: ConfigureTarget, progress: EngineProgress) -> BuiltPlan:
        """Build the plan and write it.

        Args:
            path: file to write.
            set_target: sets the target GPUs on the builder's config.
            progress: callback; see ``EngineProgress``.

        Raises:
            BackendError: the builder refused.
        """
        self._api.clear()
        set_target(self.config)
        timing_cache = self._load_timing_cache()
        self._monitor = make_monitor(self._api.trt, self._name, progress)
        self.config.progress_monitor = self._monitor
        count_builder_call()
        try:
            plan = self._builder.build_serialized_network(self.network, self.config)
        except MemoryError:
            plan = None
        self._monitor.raise_what_stopped_it()
        if plan is None:
            raise self._api.error(
                f"{self._name} was not built",
                "where it is memory, free some or narrow --profile; else try another --target or version",
            )
        seconds = time.perf_counter() - self._begun
        if timing_cache is not None:
            self._save_timing_cache(timing_cache)
        with memoryview(plan) as data:
            path.write_bytes(data)
            _LOG.info("built %s with %s: %d bytes, %.1f s", self._name, self._api.backend, data.nbytes, seconds)
            return BuiltPlan(seconds, data.nbytes)

    def _load_timing_cache(self) -> Path | None:
        """Give the builder the timings of earlier builds; returns the cache file, ``None`` if there is no cache."""
        path = cache_path("timing", f"{self._api.backend}-{self._api.version}.cache")
        if not self._api.has_timing_cache or path is None:
            return None
        cache = self.config.create_timing_cache(read_cache_file(path) or b"")
        # The builder refuses timings of another GPU or driver.
        if cache is None or not self.config.set_timing_cache(cache, ignore_mismatch=False):
            self.config.set_timing_cache(self.config.create_timing_cache(b""), ignore_mismatch=False)
        return path

    def _save_timing_cache(self, path: Path) -> None:
        """Save the timings for the next build."""
        with memoryview(self.config.get_timing_cache().serialize()) as data:
            write_cache_file(path, data)


def writes_in_place(api: Api) -> bool:
    """Whether engines of this library can update their KV cache in place: both builder and parser must support it."""
    if not api.has_kv_cache_update:
        return False
    builder = api.make_builder()
    network = builder.create_network(api.network_flags())
    parser = api.trt.OnnxParser(network, api.logger)
    is_supported = bool(parser.supports_operator("TensorScatter"))
    del parser, network, builder  # in this order; see PlanDraft
    return is_supported


def build_plan(
    api: Api,
    graph: onnx.ModelProto,
    path: Path,
    profiles: Sequence[Sizes],
    set_target: ConfigureTarget,
    progress: EngineProgress,
    origin: Path | None = None,
) -> BuiltPlan:
    """Build one plan and write it to ``path``; arguments and errors as in ``PlanDraft``."""
    with PlanDraft(api, graph, origin, path.name) as draft:
        for sizes in profiles:
            draft.add_profile(sizes)
        return draft.build(path, set_target, progress)
