"""What the demo has done before, so that a second run does only what has changed."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from adalink.runtime.errors import DeploymentError
from adalink.runtime.storage.digest import digest_bytes, digest_file
from adalink.runtime.storage.manifest import MANIFEST_FILE
from adalink.tools.common.report_file import write_json

_STATE_FILE = "demo.json"
# Raised when the same version of the kit exports the same model in another way: 2, with the tokenizer that it names.
_FORM = "2"
_WEIGHT_SUFFIXES = (".gguf", ".safetensors", ".json")


class DemoState:
    """``demo.json`` beside the deployment: which model was exported, and the last verification with its key.

    A deployment's manifest holds the digest of every file, so the manifest's own digest stands for all of them.
    """

    def __init__(self, folder: Path, model: Path, *, fresh: bool = False) -> None:
        self._path = folder / _STATE_FILE
        self._deployment = folder / "deployment"
        self._model_digest = _digest_model(model)
        try:
            content = {} if fresh else json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            content = {}
        self._content: dict[str, Any] = content if isinstance(content, dict) else {}

    def holds_base(self) -> bool:
        """Whether the deployment's base was exported from this model by this version of the kit."""
        return self._content.get("base") == self._base_key() and (self._deployment / MANIFEST_FILE).is_file()

    def begin(self) -> None:
        """Make room for a new deployment; raises ``DeploymentError`` for a folder that no demo has made."""
        if self._deployment.exists():
            if not self._path.is_file():
                raise DeploymentError(
                    f"{self._deployment} is there and no demo made it: choose another folder with --out"
                )
            shutil.rmtree(self._deployment)
        self._content = {}
        write_json(self._path, self._content)

    def set_base(self) -> None:
        """Note that the base was exported now; an older verification no longer counts."""
        self._content = {"base": self._base_key()}
        write_json(self._path, self._content)

    def verification(self) -> dict[str, Any] | None:
        """The stored parity report, if it is of these very files, this model and this version of the kit."""
        stored = self._content.get("verification")
        return stored["report"] if isinstance(stored, dict) and stored.get("key") == self._verification_key() else None

    def set_verification(self, report: dict[str, Any]) -> None:
        """Store a parity report that was made now."""
        self._content["verification"] = {"key": self._verification_key(), "report": report}
        write_json(self._path, self._content)

    def _base_key(self) -> dict[str, str]:
        return {"model": self._model_digest, "kit_version": version("adalink-kit"), "form": _FORM}

    def _verification_key(self) -> dict[str, str]:
        return {**self._base_key(), "manifest": digest_file(self._deployment / MANIFEST_FILE)}


def _digest_model(model: Path) -> str:
    """Digest of a model's files: of one GGUF file, or of all weights and settings of a folder."""
    if model.is_file():
        return digest_file(model)
    files = sorted(path for path in model.iterdir() if path.suffix in _WEIGHT_SUFFIXES)
    return digest_bytes("".join(f"{path.name} {digest_file(path)}\n" for path in files).encode())
