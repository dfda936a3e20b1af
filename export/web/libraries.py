"""JavaScript libraries of a folder for the web: the few files of npm packages that a page loads."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from adalink.export.web.place import LIBRARIES
from adalink.runtime.errors import ConfigError

# Versions that the tests run.
PACKAGES = {"onnxruntime-web": "1.30.0", "@huggingface/tokenizers": "0.2.0"}
INSTALL = "npm install " + " ".join(f"{name}@{version}" for name, version in PACKAGES.items())
_ENTRIES = {
    "onnxruntime-web": ("ort.wasm.min.mjs", "ort.webgpu.min.mjs"),
    "@huggingface/tokenizers": ("tokenizers.min.mjs",),
}
# A module that loads a WebAssembly file of its own name.
_COMPANION = re.compile(rb"ort-wasm[\w.-]+\.mjs")


def copy_libraries(modules: Path, staging: Path) -> tuple[str, ...]:
    """Copy what a page loads, and what that loads.

    Args:
        modules: a folder ``node_modules``.
        staging: the folder that is written; they go into ``lib``.

    Returns:
        Their paths in it.

    Raises:
        ConfigError: a package is not there, or not as these versions are.
    """
    (staging / LIBRARIES).mkdir()
    for package, entries in _ENTRIES.items():
        source = modules / package / "dist"
        for name in entries:
            _copy(source / name, staging, modules)
            for companion in sorted({found.decode() for found in _COMPANION.findall((source / name).read_bytes())}):
                for path in (source / companion, (source / companion).with_suffix(".wasm")):
                    _copy(path, staging, modules)
    return tuple(sorted(f"{LIBRARIES}/{path.name}" for path in (staging / LIBRARIES).iterdir()))


def _copy(source: Path, staging: Path, modules: Path) -> None:
    if not source.is_file():
        raise ConfigError(f"{source} is not there: in the folder above {modules}, run: {INSTALL}")
    shutil.copyfile(source, staging / LIBRARIES / source.name)
