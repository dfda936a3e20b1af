"""NVIDIA GPUs as the driver reports them; needs no package."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_NAME_BYTES = 256


@dataclass(frozen=True)
class Gpu:
    """One device, in the driver's order.

    Attributes:
        name: product name.
        capability: compute capability, such as ``"sm86"``.
        memory_bytes: device memory.
    """

    name: str
    capability: str
    memory_bytes: int


@dataclass(frozen=True)
class Gpus:
    """GPUs and driver of this machine.

    Attributes:
        devices: the GPUs; empty without a driver.
        driver: newest CUDA version that the driver supports, such as ``"13.0"``; ``None`` without a driver.
        reason: why there is no device; empty if there is one.
    """

    devices: tuple[Gpu, ...]
    driver: str | None
    reason: str


def find_gpus() -> Gpus:
    """Query the driver, which this initialises in the process."""
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return Gpus((), None, f"the NVIDIA driver ({library}) is not installed")
    if code := driver.cuInit(0):
        return Gpus((), None, f"the NVIDIA driver refuses to start (cuInit gave {code})")
    number = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(number))
    version = f"{number.value // 1000}.{number.value % 1000 // 10}"
    driver.cuDeviceGetCount(ctypes.byref(number))
    devices = tuple(_describe(driver, index) for index in range(number.value))
    return Gpus(devices, version, "" if devices else "the driver sees no device")


def _describe(driver: ctypes.CDLL, index: int) -> Gpu:
    device, number = ctypes.c_int(), ctypes.c_int()
    name, memory = ctypes.create_string_buffer(_NAME_BYTES), ctypes.c_size_t()
    driver.cuDeviceGet(ctypes.byref(device), index)
    driver.cuDeviceGetName(name, _NAME_BYTES, device)
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    capability = []
    for attribute in (_MAJOR, _MINOR):
        driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
        capability.append(number.value)
    return Gpu(name.value.decode("utf-8", "replace"), f"sm{capability[0]}{capability[1]}", memory.value)
