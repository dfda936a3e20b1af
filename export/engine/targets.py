"""Target GPUs of an engine, and whether this machine can build for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from adalink.runtime.device.gpus import find_gpus
from adalink.runtime.errors import BackendUnavailableError, ConfigError
from adalink.runtime.trt.api import Api

CURRENT, PORTABLE = "current", "portable"
# TensorRT-RTX has no float32 products for Turing. Every task and every float32 base needs them.
_WITHOUT_FLOAT32 = ("sm75",)


def resolve_target(api: Api, names: Sequence[str]) -> tuple[tuple[str, ...], Callable[[Any], None]]:
    """Resolve target names.

    TensorRT measures kernels on the GPU that it builds for. It takes ``"current"`` or ``"portable"`` (Ampere and
    later, at some cost in speed) and needs a GPU. TensorRT-RTX compiles without measuring. It takes any of its compute
    capabilities, or ``"portable"`` for all that compute in float32, and needs a GPU only for ``"current"``.

    Returns:
        The target for the engine's record, and a function that sets it on a builder's config.

    Raises:
        ConfigError: the library cannot build for that target.
        BackendUnavailableError: it needs a GPU, and there is none.
    """
    names = tuple(dict.fromkeys(names))
    if not names or (len(names) > 1 and {CURRENT, PORTABLE} & set(names)):
        raise ConfigError(f"target is {', '.join(names) or 'empty'}, expected {_choices(api)}")
    if unknown := [name for name in names if name not in (CURRENT, PORTABLE, *api.targets)]:
        reason = (
            "" if api.is_rtx else ": TensorRT measures on the GPU that it builds for; tensorrt-rtx builds for others"
        )
        raise ConfigError(f"target is {unknown[0]!r}, expected {_choices(api)} for {api.backend}{reason}")
    if not api.is_rtx or names == (CURRENT,):
        gpus = find_gpus()
        if not gpus.devices:
            repair = (
                f"say what to build for with --target, {_choices(api, without=CURRENT)}"
                if api.is_rtx
                else "run this on the machine that will run the engine, or build with --backend tensorrt-rtx"
            )
            raise BackendUnavailableError(
                f"backend {api.backend!r} builds for target {', '.join(names)!r} on a GPU only, and {gpus.reason}: "
                f"{repair}"
            )
    if not api.is_rtx:
        return names, api.set_portable if names == (PORTABLE,) else lambda config: None
    float32_targets = tuple(name for name in api.targets if name not in _WITHOUT_FLOAT32)
    targets = float32_targets if names == (PORTABLE,) else names
    return targets, lambda config: api.set_targets(config, targets)


def _choices(api: Api, without: str = "") -> str:
    single = [name for name in (CURRENT, PORTABLE) if name != without]
    if not api.targets:
        return " or ".join(single)
    return f"any of {', '.join(api.targets)}, or {' or '.join(single)}"
