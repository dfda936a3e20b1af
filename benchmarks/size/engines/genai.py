"""onnxruntime-genai on a model of its own builder; for a task, ONNX Runtime on such a graph without embeddings."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.size.accuracy import HostEmbedder, Row
from benchmarks.size.engines.common import Engine, Settings, main


class GenaiEngine(Engine):
    """The library's own loop; an end token is not allowed before the last token (``min_length``)."""

    packages = ("onnxruntime-genai", "onnxruntime", "numpy")

    def __init__(self, settings: Settings) -> None:
        import onnxruntime_genai as og  # pyright: ignore[reportMissingImports]  # in the peers' environment alone

        config = og.Config(str(settings.model))
        options = {"intra_op_num_threads": settings.threads, "log_severity_level": 3}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._library, self._model = og, og.Model(config)

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        """See ``Engine``."""
        parameters = self._library.GeneratorParams(self._model)
        length = len(prompts[0])
        total = length + new_tokens
        parameters.set_search_options(batch_size=len(prompts), max_length=total, min_length=total, do_sample=False)
        generator = self._library.Generator(self._model, parameters)
        generator.append_tokens(np.array(prompts, np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        return [[int(token) for token in generator.get_sequence(row)[length:]] for row in range(len(prompts))]

    def logits(self, task: str, row: Row) -> npt.NDArray[np.float32]:
        """Not with this library: its graph takes tokens. See ``EmbeddedGraph``."""
        raise NotImplementedError


class EmbeddedGraph(Engine):
    """The builder's graph without embeddings, by ONNX Runtime, fed adapted embeddings."""

    def __init__(self, settings: Settings) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = settings.threads
        self._session = onnxruntime.InferenceSession(settings.model / "model.onnx", options, ["CPUExecutionProvider"])
        assert settings.table is not None
        assert settings.adapters is not None
        config = json.loads((settings.model / "genai_config.json").read_text(encoding="utf-8"))
        self._head_size = int(config["model"]["decoder"]["head_size"])
        self._embed = HostEmbedder.read(np.load(settings.table, mmap_mode="r"), settings.adapters)

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        """Not with this graph: see ``GenaiEngine``."""
        raise NotImplementedError

    def logits(self, task: str, row: Row) -> npt.NDArray[np.float32]:
        """See ``Engine``."""
        count = len(row.ids)
        feeds: dict[str, Any] = {
            "inputs_embeds": self._embed(task, row.ids)[None],
            "attention_mask": np.ones((1, count), np.int64),
        }
        for node in self._session.get_inputs():
            if node.name == "position_ids":
                feeds[node.name] = np.arange(count)[None]
            elif node.name.startswith("past_key_values"):
                feeds[node.name] = np.zeros((1, node.shape[1], 0, self._head_size), np.float32)
        (scores,) = self._session.run(["logits"], feeds)
        return np.asarray(scores[0][list(row.positions)], np.float32)


def open_engine(settings: Settings) -> Engine:
    """The graph for tasks, or the library without any."""
    return GenaiEngine(settings) if settings.adapters is None else EmbeddedGraph(settings)


if __name__ == "__main__":
    main(open_engine)
