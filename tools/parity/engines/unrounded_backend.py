"""A quantised engine with float32 activations, which isolates the errors of the engine itself."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from adalink.runtime.engine import Engine
from adalink.runtime.storage.embedding_table import EmbeddingTable
from adalink.runtime.storage.manifest import Base
from adalink.tools.common.forwarding_backend import ForwardingBackend


class ExactActivations(ForwardingBackend):
    """A backend whose engines do not round the inputs of quantised products.

    Attributes:
        name: name of the wrapped backend.
    """

    def open_engine(self, graph: Path, base: Base, role: str, table: EmbeddingTable) -> Engine:
        """Open the graph without ``accuracy_level``; its weights are the same file."""
        import onnx

        model = onnx.load(graph, load_external_data=False)
        for node in model.graph.node:
            for attribute in [entry for entry in node.attribute if entry.name == "accuracy_level"]:
                node.attribute.remove(attribute)
        weights = {
            entry.value
            for tensor in model.graph.initializer
            for entry in tensor.external_data
            if entry.key == "location"
        }
        with tempfile.TemporaryDirectory(prefix="adalink-exact-") as folder:
            for name in weights:
                _share(graph.with_name(name), Path(folder) / name)
            path = Path(folder) / graph.name
            path.write_bytes(model.SerializeToString())
            return self._inner.open_engine(path, base, role, table)


def _share(source: Path, target: Path) -> None:
    """The same file under another name; a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
