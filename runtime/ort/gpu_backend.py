"""ONNX Runtime on NVIDIA GPUs: CUDA, TensorRT, and the TensorRT-RTX plugin. Engine memory stays on the device.

Adapters are applied in main memory, as on the CPU; the adapted embeddings are copied to the device.
"""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import msgspec

from adalink.runtime.device.cuda import CudaDevice, load_cuda
from adalink.runtime.device.engine import DeviceEngine, PreEmbedded
from adalink.runtime.device.protocols import DeviceArena
from adalink.runtime.device.workspace import Plans
from adalink.runtime.engine import Backend
from adalink.runtime.errors import BackendUnavailableError, ContractError
from adalink.runtime.implements import implements
from adalink.runtime.ort.errors import guard
from adalink.runtime.ort.gpu_executor import OnnxRuntimeExecutor
from adalink.runtime.ort.open_session import CPU_PROVIDER, Provider, open_session
from adalink.runtime.ort.patch_vision import OnnxPatchGraph
from adalink.runtime.ort.shared_adapter_graph import OnnxSharedAdapterGraph
from adalink.runtime.ort.vision import OnnxVisionGraph
from adalink.runtime.profile import Profile, default_profile
from adalink.runtime.storage.digest import digest_bytes, digest_file
from adalink.runtime.storage.embedding_table import EmbeddingTable
from adalink.runtime.storage.manifest import Base
from adalink.runtime.storage.user_cache import cache_path, make_private_folder
from adalink.runtime.storage.vision_base import VisionBase
from adalink.runtime.storage.vision_schema import PatchTower

if TYPE_CHECKING:
    import onnxruntime as ort

CUDA, TENSORRT, RTX = "onnxruntime-cuda", "onnxruntime-tensorrt", "onnxruntime-tensorrt-rtx"
_PROVIDERS = {CUDA: "CUDAExecutionProvider", TENSORRT: "TensorrtExecutionProvider"}
_PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"
_PLUGIN_PACKAGE = "onnxruntime-ep-nv-tensorrt-rtx-cu13"


class OnnxRuntimeGpuBackend:
    """See ``adalink.runtime.engine.Backend``.

    Attributes:
        name: ``onnxruntime-cuda``, ``onnxruntime-tensorrt`` or ``onnxruntime-tensorrt-rtx``.
    """

    def __init__(self, name: str) -> None:
        """Raises ``BackendUnavailableError`` if package, driver or GPU are missing."""
        try:
            import onnxruntime
        except ImportError as error:
            raise BackendUnavailableError(
                f"backend {name} needs ONNX Runtime, which is not installed: pip install 'adalink-kit[gpu]'"
            ) from error
        provider = _PROVIDERS.get(name)
        if provider is not None and provider not in onnxruntime.get_available_providers():
            raise BackendUnavailableError(
                f"backend {name} needs {provider}, this ONNX Runtime has "
                f"{', '.join(onnxruntime.get_available_providers())}: pip uninstall -y onnxruntime && "
                "pip install 'adalink-kit[gpu]'"
            )
        self.name = name
        self._ort = onnxruntime
        self._plugin = load_plugin(name) if name == RTX else None
        load_cuda(name)

    @implements(Backend)
    def open_engine(self, graph: Path, base: Base, role: str, table: EmbeddingTable) -> DeviceEngine:
        if role != "base" or base.kind == "encoder-decoder":
            raise ContractError(
                f"{graph}: {base.name} is an encoder-decoder, which {self.name} does not run: use onnxruntime-cpu"
            )
        if self.name != CUDA and base.embedding_dtype == "float32":
            # A float32 base means float32, and these providers have no option for it: NVIDIA's libraries read this.
            os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
        device, profile = CudaDevice(self.name), self.profile_of(base)
        session = self._session(graph, base, profile)
        plans = OnnxRuntimePlans(session, self._ort, str(graph), profile)
        return DeviceEngine(device, plans, base, embedder=PreEmbedded(table))

    def profile_of(self, base: Base) -> Profile:
        """Shapes that an engine takes; without images, since the vision tower stays on the CPU and takes any number."""
        return msgspec.structs.replace(default_profile(base), images=None)

    def open_bank(self, activation_key: str, graph: bytes, base: Base) -> OnnxSharedAdapterGraph:
        """See ``adalink.runtime.engine.Backend``: on the CPU, in one thread."""
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        session = open_session(self._ort, "shared adapter graph", graph, options)
        return OnnxSharedAdapterGraph(session, self._ort, base)

    def open_vision(self, graph: Path, base: VisionBase) -> OnnxVisionGraph:
        """See ``adalink.runtime.engine.Backend``: on the CPU."""
        return OnnxVisionGraph(graph, base)

    def open_patch_vision(self, graph: Path, base: VisionBase, patches: PatchTower) -> OnnxPatchGraph:
        """See ``adalink.runtime.engine.Backend``: on the CPU."""
        return OnnxPatchGraph(graph, base, patches)

    def _session(self, graph: Path, base: Base, profile: Profile) -> ort.InferenceSession:
        options = self._ort.SessionOptions()
        options.log_severity_level = 3
        if self._plugin is not None:
            devices = register_plugin(self._ort, self._plugin)
            options.add_provider_for_devices(devices[:1], provider_options(self.name, graph, base, profile))
            return open_session(self._ort, str(graph), str(graph), options, ())
        chain: list[Provider] = [(_PROVIDERS[self.name], provider_options(self.name, graph, base, profile))]
        if self.name == TENSORRT:
            chain.append((_PROVIDERS[CUDA], provider_options(CUDA, graph, base, profile)))
        session = open_session(self._ort, str(graph), str(graph), options, [*chain, CPU_PROVIDER])
        if session.get_providers()[0] != _PROVIDERS[self.name]:
            # ONNX Runtime falls back without an error; a user who asked for a GPU wants to know.
            raise BackendUnavailableError(
                f"{self.name}: ONNX Runtime could not start {_PROVIDERS[self.name]} and would use "
                f"{session.get_providers()[0]}: its CUDA, cuDNN or TensorRT libraries are missing or do "
                "not fit; run 'adalink doctor'"
            )
        return session


class OnnxRuntimePlans:
    """See ``adalink.runtime.device.workspace.Plans``: one session, with a binding for each executor.

    Attributes:
        profile: shapes that the engine takes.
        largest_rank: 0, since there are no embedders.
        largest_slots: likewise.
    """

    largest_rank = 0
    largest_slots = 0

    def __init__(self, session: ort.InferenceSession, runtime: ModuleType, origin: str, profile: Profile) -> None:
        self.profile = profile
        self._session: ort.InferenceSession | None = session
        self._ort = runtime
        self._origin = origin

    @implements(Plans)
    def executor(self, name: str, profile: int, arena: DeviceArena) -> OnnxRuntimeExecutor:
        assert self._session is not None
        return OnnxRuntimeExecutor(self._session, self._ort, self._origin, "cuda", before=arena.queue.wait)

    @implements(Plans)
    def close(self) -> None:
        self._session = None


def provider_options(name: str, graph: Path, base: Base, profile: Profile) -> dict[str, str]:
    """Provider options: shapes cover every request within the profile, so that no request builds an engine.

    Engines are code: their cache is in the user's folder, not in the deployment.
    """
    if name == CUDA:
        return {"device_id": "0", "use_tf32": "0"}  # a float32 base means float32
    low, likely, high = (profile_shapes(base, profile, which) for which in ("min", "opt", "max"))
    folder = _engine_folder(graph)
    if name == TENSORRT:
        cached = {"trt_engine_cache_enable": "1", "trt_timing_cache_enable": "1"}
        paths = {"trt_engine_cache_path": str(folder), "trt_timing_cache_path": str(folder)}
        return {
            "device_id": "0",
            "trt_profile_min_shapes": low,
            "trt_profile_opt_shapes": likely,
            "trt_profile_max_shapes": high,
            **({} if folder is None else cached | paths),
        }
    return {
        "nv_profile_min_shapes": low,
        "nv_profile_opt_shapes": likely,
        "nv_profile_max_shapes": high,
        **({} if folder is None else {"nv_runtime_cache_path": str(folder)}),
    }


def _engine_folder(graph: Path) -> Path | None:
    """Cache folder of a graph's engines, named by the digest of graph and weights.

    ``None`` if it cannot be created, or if others may write to it.

    The provider's own names do not distinguish two graphs of the same structure.
    """
    weights = graph.with_name(f"{graph.name}.data")
    digests = [digest_file(path) for path in (graph, weights) if path.exists()]
    folder = cache_path("engines", digest_bytes("".join(digests).encode()).removeprefix("sha256:")[:32])
    if folder is not None:
        try:
            return folder if make_private_folder(folder, levels=3) else None
        except OSError:
            return None
    return None


def profile_shapes(base: Base, profile: Profile, which: str) -> str:
    """Input shapes of a portable base graph in the providers' format: ``name:1x8x576,...``.

    Args:
        base: the contract.
        profile: shapes of requests.
        which: ``"min"``, ``"opt"`` or ``"max"``.
    """
    batch, seq = getattr(profile.batch, which), getattr(profile.seq, which)
    past = 0 if profile.past is None else getattr(profile.past, which)
    total = min(seq + past, profile.capacity)
    shapes = {"inputs_embeds": (batch, seq, base.hidden_size), "attention_mask": (batch, total)}
    if base.takes_token_types:
        shapes["token_type_ids"] = (batch, seq)
    if base.cache is not None:
        shapes["position_ids"] = (batch, seq)
        cached = (batch, base.cache.kv_heads, past, base.cache.head_dim)
        shapes |= {name: cached for name, _ in base.cache.names()}
    return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())


def load_plugin(name: str) -> ModuleType:
    """The package of TensorRT-RTX's provider; raises ``BackendUnavailableError``."""
    try:
        return import_module(_PLUGIN)
    except ImportError as error:
        raise BackendUnavailableError(
            f"backend {name} needs the provider's package, which is not installed: pip install {_PLUGIN_PACKAGE}"
        ) from error


def register_plugin(runtime: ModuleType, plugin: ModuleType) -> list[ort.OrtEpDevice]:
    """The plugin's devices, registered at the first call; raises ``BackendUnavailableError`` if it has none."""
    name = plugin.get_ep_name()
    devices = [device for device in runtime.get_ep_devices() if device.ep_name == name]
    if not devices:
        guard(runtime, name, lambda: runtime.register_execution_provider_library(name, plugin.get_library_path()))
        devices = [device for device in runtime.get_ep_devices() if device.ep_name == name]
    if not devices:
        raise BackendUnavailableError(
            f"{name} finds no GPU that it supports (Ampere or later, not every server chip): run 'adalink doctor'"
        )
    return devices
