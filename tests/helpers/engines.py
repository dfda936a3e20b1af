"""TensorRT-RTX, which builds engines without a GPU; a module that imports this is skipped where it is not installed."""

from __future__ import annotations

import pytest

from adalink.runtime.profile import Profile, ShapeRange

pytest.importorskip(
    "tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed: pip install 'adalink-kit[tensorrt-rtx]'"
)

RTX, SM86 = "tensorrt-rtx", ("sm86",)
PROFILE = Profile(batch=ShapeRange(1, 2, 4), seq=ShapeRange(1, 8, 16), past=ShapeRange(0, 12, 39))
