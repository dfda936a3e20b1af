"""llama.cpp's model and context: weights of a GGUF file, and a KV cache with a fixed number of sequences.

llama.cpp ends the process on a fault of its caller's. So what it takes is checked here before each call.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from adalink.runtime.errors import BackendError, BackendUnavailableError, GraphError, RequestError
from adalink.runtime.llama_cpp.library import open_library, said_last
from adalink.runtime.llama_cpp.structures import F32, Batch

Float32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

# Tokens of a call, and of a pass over the weights.
BATCH_TOKENS, PASS_TOKENS = 2048, 512
# llama.cpp's own limit, and what it rounds the positions of a sequence up to.
MOST_SEQUENCES, POSITIONS_STEP = 256, 256
# ``LLAMA_FTYPE_ALL_F32``, and the mark of a type that the file does not say.
_ALL_FLOAT32, _GUESSED = 0, 1024
_NO_FLASH_ATTENTION = 0


class LlamaModel:
    """The weights of a GGUF file.

    Attributes:
        library: llama.cpp's library.
        handle: its model.
        vocab_size: columns of the logits.
        width: numbers of an embedding.
        is_float32: whether all its matrices are float32.
    """

    def __init__(self, path: Path, gpu_layers: int = 0) -> None:
        """Load a file.

        Args:
            path: the file.
            gpu_layers: layers whose weights go to a GPU, in a llama.cpp that was built for one.

        Raises:
            BackendUnavailableError: there is no library, or layers are to go to a GPU that it does not know.
            BackendError: llama.cpp cannot load the file.
            GraphError: it is no decoder with a KV cache.
        """
        self.library = open_library()
        if gpu_layers and not self.library.llama_supports_gpu_offload():
            raise BackendUnavailableError(
                f"gpu_layers is {gpu_layers}, but the installed llama.cpp was built for the CPU alone: leave it out, "
                "or install an xllamacpp for your GPU"
            )
        params = self.library.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        self.handle = self.library.llama_model_load_from_file(os.fsencode(path), params)
        if not self.handle:
            raise BackendError(f"{path}: llama.cpp cannot load it: {said_last()}")
        kinds = {"has_encoder": "an encoder", "is_recurrent": "recurrent", "is_hybrid": "recurrent in part"}
        for question, kind in kinds.items():
            if getattr(self.library, f"llama_model_{question}")(self.handle):
                self.close()
                raise GraphError(f"{path}: the model is {kind}, and the kit runs decoders with attention alone")
        self.vocab_size = int(self.library.llama_vocab_n_tokens(self.library.llama_model_get_vocab(self.handle)))
        self.width = int(self.library.llama_model_n_embd_inp(self.handle))
        self.is_float32 = self.library.llama_model_ftype(self.handle) & ~_GUESSED == _ALL_FLOAT32

    def close(self) -> None:
        """Free the weights; contexts first."""
        if self.handle:
            self.library.llama_model_free(self.handle)
            self.handle = None


class LlamaContext:
    """A KV cache of a model; for one thread at a time.

    Attributes:
        sequences: how many sequences it has.
        capacity: positions of each.
    """

    def __init__(self, model: LlamaModel, sequences: int, capacity: int, threads: int, cache_type: int) -> None:
        """Take the memory.

        Args:
            model: the model.
            sequences: how many sequences.
            capacity: positions of each, at least.
            threads: threads of prompts and of steps.
            cache_type: ggml's type of keys and values.

        Raises:
            RequestError: there is no memory for it, or there would be too many sequences.
            BackendError: llama.cpp made another context than it was asked for.
        """
        if sequences > MOST_SEQUENCES:
            raise RequestError(f"llama.cpp decodes {MOST_SEQUENCES} sequences at most, asked for {sequences}")
        self.sequences, self.capacity = sequences, -(-capacity // POSITIONS_STEP) * POSITIONS_STEP
        self._model, self._library = model, model.library
        params = self._library.llama_context_default_params()
        params.n_ctx = sequences * self.capacity
        batch = min(BATCH_TOKENS, params.n_ctx)
        params.n_batch, params.n_ubatch, params.n_seq_max = batch, min(PASS_TOKENS, batch), sequences
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = cache_type
        # One pool of positions: what a sequence holds can then go to a context with another number of sequences.
        params.kv_unified = True
        if cache_type == F32:  # flash attention would round keys and values to half precision
            params.flash_attn_type = _NO_FLASH_ATTENTION
        self._handle = self._library.llama_init_from_model(model.handle, params)
        if not self._handle:
            raise RequestError(
                f"llama.cpp made no KV cache of {sequences} rows of {self.capacity} positions: {said_last()}; send "
                "fewer rows, shorter prompts, or ask for fewer new tokens"
            )
        self._check((sequences, sequences * self.capacity, batch, min(PASS_TOKENS, batch), threads))
        self._memory = self._library.llama_get_memory(self._handle)

    def _check(self, asked: tuple[int, ...]) -> None:
        """What was set is what llama.cpp read; raises ``BackendError``."""
        names = ("llama_n_seq_max", "llama_n_ctx_seq", "llama_n_batch", "llama_n_ubatch", "llama_n_threads")
        received = tuple(int(getattr(self._library, name)(self._handle)) for name in names)
        if received != asked:
            self.close()
            raise BackendError(
                f"llama.cpp made a context with {dict(zip(names, received, strict=True))}, expected {asked}: this "
                "version of it is not known; install the xllamacpp that the kit's extra names"
            )

    def decode(
        self, embeds: npt.NDArray[Any], sequences: Sequence[int], positions: Sequence[int], wanted: Sequence[int]
    ) -> Float32:
        """Append tokens to sequences in one call.

        Args:
            embeds: embeddings, float32 with shape ``(tokens, d)``, or token ids ``(tokens,)``.
            sequences: sequence of each token.
            positions: its position there, which is the number of positions before it.
            wanted: which tokens' logits are returned, in rising order, at least one.

        Returns:
            Logits, ``(len(wanted), vocab)``; the caller's own.

        Raises:
            BackendError: llama.cpp refuses.
        """
        count, is_embedded = len(embeds), embeds.ndim == 2
        data = np.ascontiguousarray(embeds, np.float32 if is_embedded else np.int32)
        places, counts = np.array(positions, np.int32), np.ones(count, np.int32)
        ids, flags = np.array(sequences, np.int32), np.zeros(count, np.int8)
        is_sound = (
            0 < count <= BATCH_TOKENS
            and len(places) == len(ids) == count
            and len(wanted) > 0
            and (not is_embedded or data.shape[1] == self._model.width)
            and 0 <= ids.min() <= ids.max() < self.sequences
            and 0 <= places.min() <= places.max() < self.capacity
        )
        if not is_sound:
            raise BackendError(
                f"inputs of shape {data.shape} at {len(places)} positions of {len(ids)} sequences do not fit "
                f"{self.sequences} sequences of {self.capacity} positions, {BATCH_TOKENS} of them in a call"
            )
        flags[list(wanted)] = 1
        pointers = ids.ctypes.data + 4 * np.arange(count, dtype=np.uintp)
        arrays = (places, counts, pointers, flags)
        inputs = (None, data.ctypes.data) if is_embedded else (data.ctypes.data, None)
        code = self._library.llama_decode(self._handle, Batch(count, *inputs, *(one.ctypes.data for one in arrays)))
        if code:
            raise BackendError(f"llama.cpp refused {count} positions with code {code}: {said_last()}")
        pointer = self._library.llama_get_logits(self._handle)
        return np.ctypeslib.as_array(pointer, (len(wanted), self._model.vocab_size)).copy()

    def cut(self, sequence: int, length: int = 0) -> None:
        """Forget a sequence's positions from ``length`` on; raises ``BackendError``."""
        if not self._library.llama_memory_seq_rm(self._memory, sequence, length, -1):
            raise BackendError(f"llama.cpp cannot cut a sequence to {length} positions")

    def copy(self, sequence: int, to: int, length: int) -> None:
        """Give a sequence without positions the first ``length`` of another; raises ``BackendError``."""
        self._library.llama_memory_seq_cp(self._memory, sequence, to, 0, length)
        if self.length(to) != length:
            raise BackendError(f"llama.cpp copied {self.length(to)} positions of a sequence, expected {length}")

    def save(self, sequence: int) -> Bytes:
        """A copy of a sequence's keys and values, as llama.cpp writes them."""
        size = self._library.llama_state_seq_get_size(self._handle, sequence)
        data = np.empty(size, np.uint8)
        written = self._library.llama_state_seq_get_data(self._handle, data.ctypes.data, size, sequence)
        if written != size:
            raise BackendError(f"llama.cpp wrote {written} of {size} bytes of a sequence: {said_last()}")
        return data

    def load(self, sequence: int, data: Bytes, length: int) -> None:
        """Give a sequence the keys and values of ``save``.

        Args:
            sequence: a sequence without positions.
            data: what was saved.
            length: how many of its positions are kept.

        Raises:
            BackendError: llama.cpp refuses, or the sequence has fewer positions.
        """
        read = self._library.llama_state_seq_set_data(self._handle, data.ctypes.data, data.nbytes, sequence)
        if read != data.nbytes:
            raise BackendError(f"llama.cpp read {read} of {data.nbytes} bytes of a sequence: {said_last()}")
        self.cut(sequence, length)
        if self.length(sequence) != length:
            raise BackendError(f"llama.cpp restored {self.length(sequence)} positions, expected {length}")

    def length(self, sequence: int) -> int:
        """Positions of a sequence."""
        return int(self._library.llama_memory_seq_pos_max(self._memory, sequence)) + 1

    def close(self) -> None:
        """Free the memory; the last call."""
        if self._handle:
            self._library.llama_free(self._handle)
            self._handle = ctypes.c_void_p()
