"""ONNX Runtime session of a task graph or bank graph, in any dtype, for the checks at export."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from adalink.export.adapter.error_bound import Float64
from adalink.export.adapter.nodes import INPUT_NAME, OUTPUT_NAME, edge_type
from adalink.runtime.ort.errors import guard
from adalink.runtime.ort.open_session import open_session


class OpenGraph:
    """A task graph or bank graph in a session of one thread.

    Attributes:
        metadata: metadata properties of the graph.
    """

    def __init__(self, graph: bytes, dtype: str) -> None:
        import ml_dtypes
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self._ort = ort
        self._session = open_session(ort, "graph", graph, options)
        self._numpy_dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        self._element = edge_type(dtype)
        self.metadata: dict[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)

    def run(
        self, embeds: npt.NDArray[np.floating[Any]], other_inputs: Mapping[str, npt.NDArray[Any]], soft_tokens: int = 0
    ) -> Float64:
        """Run the graph; buffers are bound as raw bits, since numpy itself has no bfloat16.

        Args:
            embeds: shape ``(batch, seq, d)``, exact in the graph's dtype.
            other_inputs: the other inputs by name.
            soft_tokens: positions that the graph prepends.

        Returns:
            ``adapted_embeds`` with shape ``(batch, soft_tokens + seq, d)``.
        """
        bits = np.dtype(f"u{self._numpy_dtype.itemsize}")
        batch, seq, width = embeds.shape
        typed_embeds = np.ascontiguousarray(embeds.astype(self._numpy_dtype))
        received = np.empty((batch, soft_tokens + seq, width), self._numpy_dtype)
        binding = self._session.io_binding()
        value_of = self._ort.OrtValue.ortvalue_from_numpy_with_onnx_type
        binding.bind_ortvalue_input(INPUT_NAME, value_of(typed_embeds.view(bits), self._element))
        for name, value in other_inputs.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(value))
        binding.bind_ortvalue_output(OUTPUT_NAME, value_of(received.view(bits), self._element))
        guard(self._ort, "graph", lambda: self._session.run_with_iobinding(binding))
        return received.astype(np.float64)
