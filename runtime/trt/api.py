"""One interface to the modules ``tensorrt`` (10.x, 11.x) and ``tensorrt_rtx``, which hides their differences."""

from __future__ import annotations

import functools
import importlib
import re
from collections import deque
from collections.abc import Iterable
from types import ModuleType
from typing import Any

from packaging.version import InvalidVersion, Version

from adalink.runtime.errors import BackendError, BackendUnavailableError
from adalink.runtime.extras import install_command

# Backend -> its modules, of which the first one installed is used; and the extra that installs it.
TENSORRT_BACKENDS = {
    "tensorrt": (("tensorrt",), "tensorrt"),
    "tensorrt-rtx": (("tensorrt_rtx", "tensorrt_rtx_bindings"), "tensorrt-rtx"),
}
_OLDEST, _TOO_NEW = Version("10.0"), Version("12.0")
_NOT_TARGETS = ("NONE", "CURRENT")
_KEPT_LINES = 32
# Source location at the beginning of the library's log lines.
_SOURCE_LOCATION = re.compile(r"^\[[^\]]*::\d+\] ")


class Heard:
    """The library's last error lines; safe for calls from the library's threads."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)

    def add(self, line: str) -> None:
        """Keep a line, unless it repeats the last one."""
        text = _SOURCE_LOCATION.sub("", " ".join(line.split()))
        if text and (not self._lines or self._lines[-1] != text):
            self._lines.append(text)

    def take(self) -> list[str]:
        """The lines since the last call, each once."""
        lines = []
        while self._lines:
            lines.append(self._lines.popleft())
        return list(dict.fromkeys(lines))


class Api:
    """One of the two modules; created once a process by ``load_api``, since the library keeps its first logger.

    Attributes:
        backend: ``"tensorrt"`` or ``"tensorrt-rtx"``.
        trt: the module.
        version: its version.
        logger: collects the library's errors; for builders, runtimes and parsers.
        recorder: the same for runtimes and contexts, through their ``error_recorder``.
    """

    def __init__(self, backend: str, module: ModuleType) -> None:
        self.backend = backend
        self.trt: Any = module
        self.version = str(module.__version__)
        self._heard = Heard()
        self.logger = _make_logger(module, self._heard)
        self.recorder = _make_recorder(module, self._heard)

    @property
    def is_rtx(self) -> bool:
        """Whether this is TensorRT-RTX, which compiles for a GPU it need not have."""
        return self.backend == "tensorrt-rtx"

    @property
    def has_kv_cache_update(self) -> bool:
        """Whether an engine can write its cache in place."""
        return hasattr(self.trt.INetworkDefinition, "add_kv_cache_update")

    @property
    def has_timing_cache(self) -> bool:
        """Whether builds use a timing cache; with one, TensorRT-RTX would need the GPU."""
        return not self.is_rtx

    @property
    def targets(self) -> tuple[str, ...]:
        """Compute capabilities that a build can target, such as ``"sm86"``; none for TensorRT, which needs the GPU."""
        kinds = getattr(self.trt, "ComputeCapability", None) if self.is_rtx else None
        names = [] if kinds is None else [name for name in kinds.__members__ if name not in _NOT_TARGETS]
        return tuple(sorted((name.lower() for name in names), key=lambda name: int(name.removeprefix("sm"))))

    def clear(self) -> None:
        """Discard earlier errors, before a step whose errors matter."""
        self._heard.take()

    def error(self, what: str, repair: str, more: Iterable[str] = ()) -> BackendError:
        """A ``BackendError`` in the library's own words.

        Args:
            what: what failed, such as ``"engine.plan: cannot be loaded"``.
            repair: how to repair it.
            more: further words, such as a parser's.
        """
        said = list(dict.fromkeys([*(" ".join(line.split()) for line in more), *self._heard.take()]))
        words = "; ".join(said) or "it gave no reason"
        return BackendError(f"{what}: {self.trt.__name__} {self.version} says: {words}; {repair}")

    def make_builder(self) -> Any:
        """A builder; raises ``BackendError``.

        Its errors are heard through the logger: with a recorder, letting a parsed network go crashes the process.
        """
        self.clear()
        try:
            return self.trt.Builder(self.logger)
        except Exception as error:
            raise self.error("no builder", "check the installation with 'adalink doctor'", [str(error)]) from error

    def make_runtime(self) -> Any:
        """A runtime, which loads plans; raises ``BackendError``."""
        self.clear()
        try:
            runtime = self.trt.Runtime(self.logger)
        except Exception as error:
            raise self.error(
                "no runtime", "check driver and installation with 'adalink doctor'", [str(error)]
            ) from error
        runtime.error_recorder = self.recorder
        return runtime

    def runtime_config(self, engine: Any) -> tuple[Any, Any]:
        """How TensorRT-RTX is to run an engine, and its cache of what it compiles; ``(None, None)`` for TensorRT.

        Kernels are compiled for each shape when it first comes, not in the background: a recorded step would keep the
        slower ones for ever. The kit records steps itself, so the library's own recording stays off.
        """
        if not self.is_rtx or not hasattr(engine, "create_runtime_config"):
            return None, None
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(self.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        config.dynamic_shapes_kernel_specialization_strategy = self.trt.DynamicShapesKernelSpecializationStrategy.EAGER
        cache = config.create_runtime_cache()
        config.set_runtime_cache(cache)
        return config, cache

    def make_context(self, engine: Any, config: Any) -> Any:
        """An execution context whose scratch memory is the caller's; raises ``BackendError``.

        Args:
            engine: the deserialised plan.
            config: what ``runtime_config`` gave.
        """
        self.clear()
        strategy = self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = engine.create_execution_context(strategy if config is None else config)
        if context is None:
            raise self.error("no execution context", "close other programs that use the GPU's memory")
        context.error_recorder = self.recorder
        return context

    def scratch_bytes(self, engine: Any) -> int:
        """Scratch memory that a context of an engine needs, whatever its profile."""
        name = "device_memory_size_v2" if hasattr(engine, "device_memory_size_v2") else "device_memory_size"
        return int(getattr(engine, name))

    def set_scratch(self, context: Any, address: int, size_bytes: int) -> None:
        """Give a context its scratch memory, which contexts that never run at a time may share."""
        if hasattr(context, "set_device_memory"):
            context.set_device_memory(address, size_bytes)
        else:
            context.device_memory = address

    def network_flags(self) -> int:
        """Flags of a network whose precision is that of the graph: always so in TensorRT 11, asked for in 10."""
        kinds = self.trt.NetworkDefinitionCreationFlag
        flags = 0
        for name in ("STRONGLY_TYPED",):
            if (kind := getattr(kinds, name, None)) is not None:
                flags |= 1 << int(kind)
        return flags

    def set_targets(self, config: Any, names: tuple[str, ...]) -> None:
        """Compile for these compute capabilities, of which ``targets`` are known; TensorRT-RTX only."""
        kinds = self.trt.ComputeCapability
        config.num_compute_capabilities = len(names)
        for index, name in enumerate(names):
            if not config.set_compute_capability(getattr(kinds, name.upper()), index):
                raise self.error(f"target {name}", f"choose from {', '.join(self.targets)}")

    def set_portable(self, config: Any) -> None:
        """Compile for Ampere and every later GPU, at some cost in speed; TensorRT only."""
        config.hardware_compatibility_level = self.trt.HardwareCompatibilityLevel.AMPERE_PLUS

    def validity(self, plan: bytes | memoryview) -> tuple[str, tuple[str, ...]] | None:
        """What the header of a plan says: ``("valid" | "suboptimal" | "invalid", reasons)``.

        Only TensorRT-RTX can tell; ``None`` for TensorRT. Without a GPU the verdict is on what the header alone shows.
        """
        size = getattr(self.trt.Runtime, "engine_header_size", None)
        if size is None or not hasattr(self.trt.Runtime, "get_engine_validity"):
            return None
        runtime = self.make_runtime()
        verdict, reasons = runtime.get_engine_validity(bytes(plan[: int(runtime.engine_header_size)]))
        self.clear()
        kinds = getattr(self.trt, "EngineInvalidityDiagnostics", None)
        known = {} if kinds is None else kinds.__members__
        names = [name.lower().replace("_", " ") for name, kind in known.items() if int(reasons) & int(kind)]
        return str(verdict.name).lower(), tuple(names)


@functools.cache
def load_api(backend: str) -> Api:
    """The module of a backend.

    Args:
        backend: ``"tensorrt"`` or ``"tensorrt-rtx"``.

    Raises:
        BackendUnavailableError: its package is not installed, does not load, or is of a version the kit does not know.
    """
    modules, extra = TENSORRT_BACKENDS[backend]
    install = install_command(extra)
    module = None
    for name in modules:
        try:
            module = importlib.import_module(name)
            break
        except ModuleNotFoundError as error:
            if error.name != name:
                raise _unavailable(backend, name, error, install) from error
        except Exception as error:  # a library that is missing or does not fit is an ImportError, OSError or worse
            raise _unavailable(backend, name, error, install) from error
    if module is None:
        raise BackendUnavailableError(f"backend {backend!r} needs the package {modules[0]}, which is absent: {install}")
    if backend == "tensorrt":
        _check_version(str(module.__version__), install)
    return Api(backend, module)


def _unavailable(backend: str, name: str, error: Exception, install: str) -> BackendUnavailableError:
    return BackendUnavailableError(
        f"backend {backend!r}: the package {name} does not load ({type(error).__name__}: {error}); install it again: "
        f"{install}"
    )


def _check_version(version: str, install: str) -> None:
    try:
        is_known = _OLDEST <= Version(version) < _TOO_NEW
    except InvalidVersion:
        is_known = False
    if not is_known:
        raise BackendUnavailableError(
            f"backend 'tensorrt': version {version} is installed, expected {_OLDEST} or later and before {_TOO_NEW}: "
            f"{install}"
        )


def _make_logger(module: Any, heard: Heard) -> Any:
    class Logger(module.ILogger):  # type: ignore[misc]
        """Keeps errors; warnings and notes are dropped."""

        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            if int(severity) <= int(module.ILogger.ERROR):
                heard.add(msg)

    return Logger()


def _make_recorder(module: Any, heard: Heard) -> Any:
    class Recorder(module.IErrorRecorder):  # type: ignore[misc]
        """Forwards errors, and keeps none."""

        def __init__(self) -> None:
            module.IErrorRecorder.__init__(self)

        def report_error(self, code: Any, desc: str) -> bool:
            heard.add(desc)
            return False

        def num_errors(self) -> int:
            return 0

        def get_error_code(self, index: int) -> Any:
            return None

        def get_error_desc(self, index: int) -> str:
            return ""

        def has_overflowed(self) -> bool:
            return False

        def clear(self) -> None:
            return None

    return Recorder()
