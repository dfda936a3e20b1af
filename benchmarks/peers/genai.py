"""onnxruntime-genai, its own builder's models. Kinds: ``fp32``, ``int4``; with ``-lora`` an adapter is active."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og  # pyright: ignore[reportMissingImports]  # in the peers' environment alone

from benchmarks.peers import common


class GenaiPeer(common.Peer):
    """The library's own generation loop; an end token is not allowed before the last token (``min_length``)."""

    packages = ("onnxruntime-genai", "onnxruntime", "numpy")

    def __init__(self, settings: common.Settings) -> None:
        self._folder = self.folder(settings)
        config = og.Config(str(self._folder))
        options = {"intra_op_num_threads": settings.threads, "log_severity_level": 3}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._model = og.Model(config)
        self._prompt = np.array(settings.prompt, np.int32)
        self._files = sorted(self._folder.glob("*.onnx_adapter"))
        self.adapters = len(self._files)
        self._active: str | None = None
        self._generator: Any = None
        if self._files:
            self._adapters = og.Adapters(self._model)
            self.load(0)
            self._active = "0"

    @staticmethod
    def folder(settings: common.Settings) -> Path:
        """See ``common.Peer``."""
        return settings.work / "models" / f"genai-{settings.kind}"

    def prefill(self) -> None:
        """See ``common.Peer``."""
        self._start(1).append_tokens(self._prompt)

    def generate(self, new_tokens: int) -> list[int]:
        """See ``common.Peer``."""
        generator = self._start(new_tokens)
        generator.append_tokens(self._prompt)
        while not generator.is_done():
            generator.generate_next_token()
        return [int(token) for token in generator.get_sequence(0)[len(self._prompt) :]]

    def ask(self, ids: list[int]) -> None:
        """See ``common.Peer``."""
        self._prompt = np.array(ids, np.int32)

    def weight_bytes(self) -> int:
        """See ``common.Peer``."""
        return (self._folder / "model.onnx.data").stat().st_size

    def switch(self, index: int) -> None:
        """Set the active adapter of a generator; making the generator is not counted."""
        if self._generator is None:
            self._generator = self._start(1)
        self._active = str(index)
        self._generator.set_active_adapter(self._adapters, self._active)

    def load(self, index: int) -> None:
        """See ``common.Peer``."""
        self._adapters.load(str(self._files[index]), str(index))

    def disk_bytes(self) -> int:
        """See ``common.Peer``."""
        return self._files[0].stat().st_size

    def _start(self, new_tokens: int) -> og.Generator:
        parameters = og.GeneratorParams(self._model)
        length = len(self._prompt) + new_tokens
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = og.Generator(self._model, parameters)
        if self._active is not None:
            generator.set_active_adapter(self._adapters, self._active)
        return generator


if __name__ == "__main__":
    common.main(GenaiPeer)
