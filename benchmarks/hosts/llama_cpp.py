"""llama.cpp's server on a GGUF file, in a process of its own, since llama.cpp ends the process on an error."""

from __future__ import annotations

import http.client
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.process import MeasurementError
from benchmarks.serving.servers import Server, running


class LlamaCpp:
    """A running server."""

    def __init__(self, address: tuple[str, int], loras: int) -> None:
        self._address, self._loras = address, loras

    def ask(self, prompt: Sequence[int], new: int, loras: Sequence[int] = (), **settings: Any) -> dict[str, Any]:
        """Complete token ids greedily, with some of the server's LoRAs; the answer as llama.cpp gives it."""
        body = {
            "prompt": list(prompt),
            "n_predict": new,
            "temperature": 0,
            "cache_prompt": False,
            "ignore_eos": False,
            "return_tokens": True,
            "lora": [{"id": number, "scale": float(number in loras)} for number in range(self._loras)],
            **settings,
        }
        connection = http.client.HTTPConnection(*self._address, timeout=60)
        try:
            connection.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
            answer = json.loads(connection.getresponse().read())
        finally:
            connection.close()
        if "error" in answer:
            raise MeasurementError(f"llama.cpp: {answer['error']}")
        return dict(answer)

    def log_probabilities(self, prompt: Sequence[int], vocabulary: int, loras: Sequence[int] = ()) -> np.ndarray:
        """Logarithms of the probabilities of every token behind a prompt, shape ``(vocab,)``."""
        (first,) = self.ask(prompt, 1, loras, n_probs=vocabulary)["completion_probabilities"]
        values = np.full(vocabulary, np.nan)
        for entry in first["top_logprobs"]:
            values[entry["id"]] = entry["logprob"]
        assert np.isfinite(values).all()
        return values


@contextmanager
def llama_cpp(model: Path, loras: Sequence[Path], log: Path, *, context: int = 256) -> Iterator[LlamaCpp]:
    """Serve a GGUF file with keys and values in float32, and with LoRAs that requests choose by number."""
    command = [sys.executable, "-m", "benchmarks.serving.llama_cpp", "serve", "--model", str(model)]
    command += ["--slots", "1", "--threads", "1", "--context", str(context), "--exact", "--lora", *map(str, loras)]
    with running(Server("llama.cpp", "llama.cpp", tuple(command), "lora"), log) as (address, _):
        yield LlamaCpp(address, len(loras))
