"""llama.cpp's prebuilt library through ctypes: a model of a GGUF file, rows of a batch, its quantiser.

Run in the environment of the peers. The fields that are set here are the first ones of llama.cpp's structures; others
keep the library's defaults.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

# Of llama_context_params: n_ctx, n_batch, n_ubatch, n_seq_max.
_CONTEXT_DEFAULTS = (512, 2048, 512, 1)
# Structures that are passed by value are larger than any of llama.cpp's.
_STRUCTURE_BYTES = 1024


class _Structure(ctypes.Structure):
    _fields_ = (("numbers", ctypes.c_uint32 * (_STRUCTURE_BYTES // 4)),)


class _Batch(ctypes.Structure):
    _fields_ = (
        ("tokens", ctypes.c_int32),
        ("token", ctypes.c_void_p),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.c_void_p),
        ("n_seq_id", ctypes.c_void_p),
        ("seq_id", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
    )


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


def _swallow(level: int, text: bytes, data: int) -> None:
    """A line of llama.cpp's log."""


_SILENT = _LOG(_swallow)  # it has to live as long as the library


@functools.cache
def open_library() -> Any:
    """The library of the package ``xllamacpp``, with the types of what is called here."""
    package = importlib.util.find_spec("xllamacpp")
    if package is None or not package.submodule_search_locations:
        raise RuntimeError("the package xllamacpp is not installed: install benchmarks/peers/requirements.txt")
    folder = Path(next(iter(package.submodule_search_locations)))
    library = ctypes.CDLL(str(next(folder.glob("*.so"))))
    pointer, number = ctypes.c_void_p, ctypes.c_int32
    types: dict[str, tuple[Any, list[Any]]] = {
        "ggml_quantize_chunk": (ctypes.c_size_t, [number, pointer, pointer, *[ctypes.c_int64] * 3, pointer]),
        "llama_log_set": (None, [_LOG, pointer]),
        "llama_model_default_params": (_Structure, []),
        "llama_context_default_params": (_Structure, []),
        "llama_model_load_from_file": (pointer, [ctypes.c_char_p, _Structure]),
        "llama_model_get_vocab": (pointer, [pointer]),
        "llama_vocab_n_tokens": (number, [pointer]),
        "llama_model_free": (None, [pointer]),
        "llama_init_from_model": (pointer, [pointer, _Structure]),
        "llama_set_n_threads": (None, [pointer, number, number]),
        "llama_get_memory": (pointer, [pointer]),
        "llama_memory_clear": (None, [pointer, ctypes.c_bool]),
        "llama_decode": (number, [pointer, _Batch]),
        "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), [pointer, number]),
        "llama_free": (None, [pointer]),
    }
    for name, (result, arguments) in types.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.llama_log_set(_SILENT, None)
    library.llama_backend_init()
    return library


def quantize(values: npt.NDArray[np.float32], type_number: int, row_bytes: int) -> npt.NDArray[np.uint8]:
    """Blocks of a matrix, ``(rows, row_bytes)``, in one of ggml's types, by llama.cpp's own coder."""
    rows, columns = values.shape
    blocks = np.zeros((rows, row_bytes), np.uint8)
    written = open_library().ggml_quantize_chunk(
        type_number, values.ctypes.data, blocks.ctypes.data, 0, rows, columns, None
    )
    if written != blocks.nbytes:
        raise RuntimeError(f"ggml wrote {written} bytes of type {type_number}, expected {blocks.nbytes}")
    return blocks


class LlamaModel:
    """A model of a GGUF file."""

    def __init__(self, path: Path) -> None:
        self.library = open_library()
        self.handle = self.library.llama_model_load_from_file(
            str(path).encode(), self.library.llama_model_default_params()
        )
        if not self.handle:
            raise RuntimeError(f"llama.cpp could not open {path}")
        self.vocab_size = int(self.library.llama_vocab_n_tokens(self.library.llama_model_get_vocab(self.handle)))


class LlamaContext:
    """A KV cache of some rows of a model.

    Args:
        model: the model.
        rows: sequences that decode together.
        context: positions of each.
        threads: threads of prompts and of steps.
    """

    def __init__(self, model: LlamaModel, rows: int, context: int, threads: int) -> None:
        self._model, self._library = model, model.library
        parameters = self._library.llama_context_default_params()
        if tuple(parameters.numbers[:4]) != _CONTEXT_DEFAULTS:
            raise RuntimeError(
                f"llama_context_params begins with {parameters.numbers[:4]}, expected {_CONTEXT_DEFAULTS}: this "
                "xllamacpp has another structure; see its llama.h"
            )
        size = rows * context
        for place, value in enumerate((size, size, min(512, size), rows)):
            parameters.numbers[place] = value
        self._handle = self._library.llama_init_from_model(model.handle, parameters)
        if not self._handle:
            raise RuntimeError(f"llama.cpp made no context of {rows} rows with {context} positions")
        self._library.llama_set_n_threads(self._handle, threads, threads)

    def clear(self) -> None:
        """Forget all positions."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._handle), True)

    def close(self) -> None:
        """Free the cache."""
        self._library.llama_free(self._handle)

    def decode(
        self, inputs: npt.NDArray[Any], rows: Sequence[int], positions: Sequence[int], wanted: Sequence[int]
    ) -> npt.NDArray[np.float32]:
        """Logits ``(wanted, vocab)`` of one pass.

        Args:
            inputs: token ids ``(tokens,)``, or embeddings ``(tokens, d)`` in their place.
            rows: row of each token.
            positions: its position in the row.
            wanted: which tokens' logits are returned.
        """
        count = len(inputs)
        is_embedded = inputs.ndim == 2
        data = np.ascontiguousarray(inputs, np.float32 if is_embedded else np.int32)
        places, counts = np.array(positions, np.int32), np.ones(count, np.int32)
        flags = np.zeros(count, np.int8)
        flags[list(wanted)] = 1
        ids = np.array(rows, np.int32)
        pointers = (ctypes.c_void_p * count)(*(ids.ctypes.data + 4 * place for place in range(count)))
        batch = _Batch(
            count,
            None if is_embedded else data.ctypes.data,
            data.ctypes.data if is_embedded else None,
            places.ctypes.data,
            counts.ctypes.data,
            ctypes.cast(pointers, ctypes.c_void_p),
            flags.ctypes.data,
        )
        if code := self._library.llama_decode(self._handle, batch):
            raise RuntimeError(f"llama_decode of {count} tokens: code {code}")
        size = (self._model.vocab_size,)
        return np.stack(
            [
                np.ctypeslib.as_array(self._library.llama_get_logits_ith(self._handle, int(place)), size).copy()
                for place in wanted
            ]
        )
