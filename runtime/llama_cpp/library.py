"""llama.cpp's library, as the package ``xllamacpp`` brings it: opened once, its structures checked, its log kept."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections import deque
from pathlib import Path
from typing import Any

from adalink.runtime.errors import BackendUnavailableError
from adalink.runtime.extras import install_command
from adalink.runtime.llama_cpp.structures import Batch, ContextParams, ModelParams, check_defaults

PACKAGE = "xllamacpp"
_POINTER, _NUMBER, _COUNT, _SIZE = ctypes.c_void_p, ctypes.c_int32, ctypes.c_uint32, ctypes.c_size_t
_TEXT, _FLOATS = ctypes.c_char_p, ctypes.POINTER(ctypes.c_float)
_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
# Result and arguments of what the kit calls.
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "ggml_quantize_chunk": (_SIZE, [_NUMBER, _POINTER, _POINTER, *[ctypes.c_int64] * 3, _POINTER]),
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [_LOG, _POINTER]),
    "llama_version": (_TEXT, []),
    "llama_supports_gpu_offload": (ctypes.c_bool, []),
    "llama_model_default_params": (ModelParams, []),
    "llama_model_load_from_file": (_POINTER, [_TEXT, ModelParams]),
    "llama_model_free": (None, [_POINTER]),
    "llama_model_ftype": (_NUMBER, [_POINTER]),
    "llama_model_get_vocab": (_POINTER, [_POINTER]),
    "llama_model_has_encoder": (ctypes.c_bool, [_POINTER]),
    "llama_model_is_hybrid": (ctypes.c_bool, [_POINTER]),
    "llama_model_is_recurrent": (ctypes.c_bool, [_POINTER]),
    "llama_model_n_embd_inp": (_NUMBER, [_POINTER]),
    "llama_vocab_n_tokens": (_NUMBER, [_POINTER]),
    "llama_context_default_params": (ContextParams, []),
    "llama_init_from_model": (_POINTER, [_POINTER, ContextParams]),
    "llama_free": (None, [_POINTER]),
    "llama_n_batch": (_COUNT, [_POINTER]),
    "llama_n_ubatch": (_COUNT, [_POINTER]),
    "llama_n_ctx_seq": (_COUNT, [_POINTER]),
    "llama_n_seq_max": (_COUNT, [_POINTER]),
    "llama_n_threads": (_NUMBER, [_POINTER]),
    "llama_decode": (_NUMBER, [_POINTER, Batch]),
    "llama_get_logits": (_FLOATS, [_POINTER]),
    "llama_get_memory": (_POINTER, [_POINTER]),
    "llama_memory_seq_cp": (None, [_POINTER, _NUMBER, _NUMBER, _NUMBER, _NUMBER]),
    "llama_memory_seq_rm": (ctypes.c_bool, [_POINTER, _NUMBER, _NUMBER, _NUMBER]),
    "llama_memory_seq_pos_max": (_NUMBER, [_POINTER, _NUMBER]),
    "llama_state_seq_get_size": (_SIZE, [_POINTER, _NUMBER]),
    "llama_state_seq_get_data": (_SIZE, [_POINTER, _POINTER, _SIZE, _NUMBER]),
    "llama_state_seq_set_data": (_SIZE, [_POINTER, _POINTER, _SIZE, _NUMBER]),
}
_WARNING = 3
# Lines of a message: the cause comes before what it led to.
_TOLD = 3
_lines: deque[str] = deque(maxlen=8)


def _keep(level: int, text: bytes, _: int) -> None:
    """Keep what llama.cpp says of faults, and print nothing."""
    if level >= _WARNING and (line := text.decode("utf-8", "replace").strip()):
        _lines.append(line)


_LOGGER = _LOG(_keep)  # it has to live as long as the library


def said_last() -> str:
    """What llama.cpp has told last of a fault, for messages; told once, since the next fault is another one."""
    lines = list(_lines)[-_TOLD:]
    _lines.clear()
    return "; ".join(lines) or "it does not say why"


@functools.cache
def open_library() -> Any:
    """The library, ready to be called.

    Raises:
        BackendUnavailableError: the package is missing, or its library cannot be loaded or has other structures than
            this kit knows.
    """
    path = _find()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise BackendUnavailableError(
            f"{path} cannot be loaded: {error}: install the version that {install_command('llama-cpp')} takes"
        ) from error
    for name, (result, arguments) in _FUNCTIONS.items():
        try:
            function = getattr(library, name)
        except AttributeError as error:
            raise BackendUnavailableError(
                f"{PACKAGE} has a llama.cpp without {name}: install the version that {install_command('llama-cpp')} "
                "takes"
            ) from error
        function.restype, function.argtypes = result, arguments
    library.llama_log_set(_LOGGER, None)
    version = library.llama_version().decode()
    check_defaults(library.llama_model_default_params(), version)
    check_defaults(library.llama_context_default_params(), version)
    library.llama_backend_init()
    return library


def _find() -> Path:
    """The library's file; the package itself is not imported."""
    package = importlib.util.find_spec(PACKAGE)
    folders = [] if package is None else [Path(folder) for folder in package.submodule_search_locations or ()]
    files = [path for folder in folders for pattern in ("*.so", "*.pyd") for path in sorted(folder.glob(pattern))]
    if not files:
        raise BackendUnavailableError(
            f"backend llama.cpp needs {PACKAGE}, which is not installed: {install_command('llama-cpp')}"
        )
    return files[0]
