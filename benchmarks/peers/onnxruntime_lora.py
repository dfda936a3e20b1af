"""ONNX Runtime's own LoRA adapters: ``LoraAdapter`` and ``RunOptions.add_active_adapter``.

Kinds: ``base`` (the graph of onnxruntime-genai's builder), ``lora`` (the same with LoRA inputs, an adapter active) and
``merged`` (a whole engine for each task, in the manner of an optimum export of a merged model).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from benchmarks.peers import common


class OrtPeer(common.Peer):
    """A greedy loop whose KV cache stays in ONNX Runtime's own tensors; adapters do not work with IO binding."""

    packages = ("onnxruntime", "numpy")

    def __init__(self, settings: common.Settings) -> None:
        self._threads = settings.threads
        self._folder = self.folder(settings)
        self._merged = settings.kind == "merged"
        self._prompt = np.array([settings.prompt], np.int64)
        self._loaded: dict[int, Any] = {}
        self._run_options: ort.RunOptions | None = None
        self.adapters = len(list(self._folder.glob("*/model.onnx" if self._merged else "*.onnx_adapter")))
        if not self._merged:
            self._session = self._open(self._folder)
        if self.adapters:
            self.load(0)
            self.switch(0)
        inputs = {node.name: node for node in self._session.get_inputs()}
        self._past = [name for name in inputs if name.startswith("past_key_values.")]
        _, heads, _, size = inputs[self._past[0]].shape
        # The builder leaves the width of a head open; of this model it is the width over the query heads.
        size = size if isinstance(size, int) else _head_size(self._folder)
        self._empty = np.zeros((1, heads, 0, size), np.float32)
        self._outputs = ["logits", *(name.replace("past_key_values", "present") for name in self._past)]

    @staticmethod
    def folder(settings: common.Settings) -> Path:
        """See ``common.Peer``."""
        names = {"base": "genai-fp32", "lora": "genai-fp32-lora", "merged": "merged"}
        return settings.work / "models" / names[settings.kind]

    def prefill(self) -> None:
        """See ``common.Peer``."""
        self._step(self._prompt, self._prompt.shape[1], None)

    def generate(self, new_tokens: int) -> list[int]:
        """See ``common.Peer``."""
        tokens: list[int] = []
        ids, cache, length = self._prompt, None, self._prompt.shape[1]
        for _ in range(new_tokens):
            logits, cache = self._step(ids, length, cache)
            tokens.append(int(logits[0, -1].argmax()))
            ids, length = np.array([tokens[-1:]], np.int64), length + 1
        return tokens

    def weight_bytes(self) -> int:
        """See ``common.Peer``."""
        return next(iter(sorted(self._folder.rglob("model.onnx.data")))).stat().st_size

    def switch(self, index: int) -> None:
        """Choose the run options with that adapter, or that task's engine."""
        if self._merged:
            self._session = self._loaded[index]
            return
        options = ort.RunOptions()
        options.add_active_adapter(self._loaded[index])
        self._run_options = options

    def load(self, index: int) -> None:
        """Read an ``.onnx_adapter`` file, or open that task's engine."""
        if self._merged:
            self._loaded[index] = self._open(self._folder / str(index))
            return
        adapter = ort.LoraAdapter()
        adapter.Load(str(self._folder / f"{index}.onnx_adapter"))
        self._loaded[index] = adapter

    def disk_bytes(self) -> int:
        """See ``common.Peer``."""
        if self._merged:
            return sum(path.stat().st_size for path in (self._folder / "0").glob("model.onnx*"))
        return (self._folder / "0.onnx_adapter").stat().st_size

    def _open(self, folder: Path) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 3
        return ort.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])

    def _step(self, ids: Any, total: int, cache: list[Any] | None) -> tuple[Any, list[Any]]:
        make = ort.OrtValue.ortvalue_from_numpy
        feeds = {"input_ids": make(ids), "attention_mask": make(np.ones((1, total), np.int64))}
        if cache is None:
            cache = [make(self._empty)] * len(self._past)
        feeds.update(zip(self._past, cache, strict=True))
        outputs = self._session.run_with_ort_values(self._outputs, feeds, self._run_options)
        return outputs[0].numpy(), outputs[1:]


def _head_size(folder: Path) -> int:
    config = next(iter(sorted(folder.rglob("genai_config.json"))))
    return int(json.loads(config.read_text(encoding="utf-8"))["model"]["decoder"]["head_size"])


if __name__ == "__main__":
    common.main(OrtPeer)
