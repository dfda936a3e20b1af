"""Blocks of GGUF files against gguf-py, the format's own package, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

from adalink.runtime.storage.gguf_blocks import BLOCK_TYPES


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_blocks_are_dequantised_as_by_gguf_py(name: str) -> None:
    """Any bytes are blocks: every bit of scales and weights is tried, infinite scales too."""
    blocks, kind = BLOCK_TYPES[name], GGMLQuantizationType[name]
    assert (blocks.kind, (blocks.weights, blocks.size_bytes)) == (kind.value, GGML_QUANT_SIZES[kind])
    data = np.random.default_rng(blocks.kind).integers(0, 256, (300, 3 * blocks.size_bytes), dtype=np.uint8)
    ids = np.array([[7, 7], [299, 0]])  # looked up one by one, in any order and shape
    with np.errstate(all="ignore"):
        received, expected = blocks.rows(data), dequantize(data, kind)
        assert blocks.rows(data.take(ids, axis=0)).tobytes() == received[ids].tobytes()
    assert received.dtype == np.float32
    numbers = ~np.isnan(expected)
    assert numbers.mean() > 0.8
    np.testing.assert_array_equal(np.isnan(received), ~numbers)
    np.testing.assert_array_equal(received.view(np.uint32)[numbers], expected.view(np.uint32)[numbers])
