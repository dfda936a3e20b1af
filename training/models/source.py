"""Where a base is: a Hugging Face folder, a GGUF file or a hub id. Pickled checkpoints are refused here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from adalink.runtime.errors import ModelError
from adalink.runtime.near_names import did_you_mean
from adalink.training.models.hub import check_hub
from adalink.training.models.hub_access import download_options, hub_revision
from adalink.training.models.weight_files import INDEX_FILE, PICKLED_SUFFIXES, check_pointers

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Source:
    """Location of a base: ``origin`` for transformers, and ``gguf_file`` inside it for that format."""

    origin: str
    gguf_file: str | None = None

    @property
    def gguf_path(self) -> Path | None:
        """The GGUF file; ``None`` for another kind."""
        return None if self.gguf_file is None else Path(self.origin) / self.gguf_file

    def options(self) -> dict[str, str | bool]:
        """Arguments of transformers' loaders."""
        # Never run a checkpoint's own code; without this setting transformers may ask on a terminal.
        options: dict[str, str | bool] = {"trust_remote_code": False, **download_options(self.origin)}
        return options if self.gguf_file is None else {**options, "gguf_file": self.gguf_file}


def find_source(spec: str | Path) -> Source:
    """Resolve ``spec``.

    Raises:
        ModelError: there is no such file or folder and no such hub id in reach, or the checkpoint cannot be loaded
            without unpickling.
    """
    path = Path(spec).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(
                f"base model {path.name} is a {path.suffix or 'plain'} file; expected a .gguf file, a model folder or "
                "a hub id"
            )
        check_pointers(path, path.name)
        return Source(str(path.parent), path.name)
    if path.is_dir():
        return _find_in_folder(path)
    if not _HUB_ID.fullmatch(str(spec)):
        beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ModelError(
            f"base model {spec}: there is no such file or folder here, and it is no hub id, which is "
            f"org/name{did_you_mean(path.name, beside)}"
        )
    check_hub(str(spec), hub_revision())
    return Source(str(spec))


def gguf_file(spec: str | Path) -> Path | None:
    """The GGUF file that a base is loaded from; ``None`` for another kind. Raises ``ModelError`` as ``load_base``."""
    return find_source(spec).gguf_path


def display_name(spec: str | Path) -> str:
    """Display name of a base: folder name or file stem of a local one, else the hub id; never a machine's path.

    A folder with one GGUF file and no other model has the name of that file.
    """
    path = Path(spec).expanduser()
    if path.is_dir():
        ggufs = list(path.glob("*.gguf"))
        is_gguf = len(ggufs) == 1 and not (path / "config.json").exists()
        return ggufs[0].stem if is_gguf else path.resolve().name
    if path.is_file() or path.suffix == ".gguf":
        return path.stem
    return str(spec) if _HUB_ID.fullmatch(str(spec)) else path.name


def _find_in_folder(folder: Path) -> Source:
    check_pointers(folder, display_name(folder))
    files = sorted(path.name for path in folder.iterdir() if path.is_file())
    ggufs = [name for name in files if name.endswith(".gguf")]
    if "config.json" in files and any(name.endswith(".safetensors") or name == INDEX_FILE for name in files):
        return Source(str(folder))
    if len(ggufs) == 1:
        return Source(str(folder), ggufs[0])
    if len(ggufs) > 1:
        raise ModelError(
            f"base model folder {folder.name} holds {len(ggufs)} GGUF files; name one of them: {', '.join(ggufs)}"
        )
    if pickled := [name for name in files if name.endswith(PICKLED_SUFFIXES)]:
        raise ModelError(
            f"base model folder {folder.name} has only pickled weights ({pickled[0]}), which can run code and are "
            "never loaded; convert them with save_pretrained(folder) to safetensors"
        )
    raise ModelError(
        f"base model folder {folder.name} is not a model: expected config.json and *.safetensors, or one .gguf file; "
        f"found {', '.join(files[:5]) or 'nothing'}"
    )
