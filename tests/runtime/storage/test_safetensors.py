"""Reading safetensors without copying: against the format's own library, and every way a file can be wrong."""

from __future__ import annotations

import json
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from helpers.runtime import random_adapter
from safetensors.numpy import save
from safetensors.torch import save as save_torch

from adalink.runtime.storage.adapter import encode_adapter
from adalink.runtime.storage.safetensors import view_tensors


def as_bytes(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def test_the_librarys_files_are_read_to_the_last_bit() -> None:
    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.float16, np.float64):
        tensors = {f"t{size}": rng.normal(size=(size, 3)).astype(dtype) for size in (1, 7, 16)}
        found = view_tensors(as_bytes(save(tensors, metadata={"a": "b"})))
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].dtype == np.float32
            np.testing.assert_array_equal(found[name], tensor.astype(np.float32))
    wide = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = view_tensors(as_bytes(save_torch({"t": wide})))
    np.testing.assert_array_equal(
        found["t"], wide.view(torch.int16).numpy().view(ml_dtypes.bfloat16).astype(np.float32)
    )


def test_tensors_are_views_and_the_kits_own_files_align_them() -> None:
    for rank in (1, 4, 16):
        settings: dict[str, Any] = {"rank": rank, "activation": "gelu", "bias": rank == 4, "scope": "all"}
        _, data = encode_adapter(random_adapter("sha256:" + "5a" * 32, 48, rank, **settings))
        space = np.zeros(len(data) + 64, np.uint8)
        start = -space.ctypes.data % 64
        memory = space[start : start + len(data)]
        memory[:] = as_bytes(data)
        tensors = view_tensors(memory)
        assert all(np.shares_memory(tensor, memory) for tensor in tensors.values())
        assert min(tensor.ctypes.data for tensor in tensors.values()) % 64 == 0


def spoilt(change: Any) -> bytes:
    data = save({"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float32)})
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[start:]


def test_a_hole_an_overlap_or_another_dtype_is_refused() -> None:
    view_tensors(as_bytes(spoilt(lambda header: None)))
    for change, wording in (
        (lambda header: header["b"].update(data_offsets=[20, 36]), "'b' begins at 20, the one before it ends at 24"),
        (lambda header: header["b"].update(data_offsets=[28, 40]), "'b' begins at 28"),
        (lambda header: header["a"].update(shape=[2, 4]), r"'a' has 24 bytes, which are not F32 of shape \[2, 4\]"),
        (lambda header: header["a"].update(shape=[-2, -3]), "expected a list of sizes"),
        (lambda header: header["a"].update(shape=[True, 6]), "expected a list of sizes"),
        (lambda header: header["a"].update(shape=[10**30]), "are not F32 of shape"),
        (lambda header: header["a"].update(shape=[1] * 70), "are not F32 of shape"),
        (lambda header: header["a"].update(dtype="I32"), "'a' has dtype 'I32', expected one of F64, F32"),
        (lambda header: header["a"].update(dtype=[]), r"'a' has dtype \[\], expected one of F64, F32"),
        (lambda header: header["a"].update(dtype={}), "'a' has dtype {}"),
        (lambda header: header["a"].update(data_offsets=[False, 24]), "no data_offsets"),
        (lambda header: header.update(a=[0, 24]), "no data_offsets"),
        (lambda header: header["a"].update(data_offsets="ab"), "no data_offsets"),
        (lambda header: header.pop("b"), "end at 24, the file has 40|end at .*, the file has"),
    ):
        with pytest.raises(ValueError, match=wording):
            view_tensors(as_bytes(spoilt(change)))
    for data, wording in (
        (b"", "has 0 bytes"),
        (b"\xff" * 8, "header claims"),
        (b"\2" + b"\0" * 7 + b"[]", "not a JSON object"),
        (b"\2" + b"\0" * 7 + b"{x", "Expecting"),
        ((200_000).to_bytes(8, "little") + b"[" * 200_000, "nested too deeply"),
    ):
        with pytest.raises(ValueError, match=wording):
            view_tensors(as_bytes(data))
