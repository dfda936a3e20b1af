"""A working copy of a deployment in which one file at a time is exchanged, sealed again or not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from fuzz.outcomes import require

from adalink.runtime.deployment import Deployment
from adalink.runtime.errors import AdaLinkError
from adalink.runtime.storage.adapter import read_adapter
from adalink.runtime.storage.digest import digest_bytes
from adalink.runtime.storage.manifest import MANIFEST_FILE
from adalink.runtime.storage.manifest_io import read_manifest

IDS = [[5, 6, 7, 8, 9]]


def seal_text(text: bytes) -> bytes:
    """A manifest with the digest of what it says: the text as it is, whether or not it makes sense."""
    mark = b'"digest": ""'
    place = text.find(mark)
    if place < 0:
        return text
    at = place + len(mark) - 1
    return text[:at] + digest_bytes(text).encode() + text[at:]


def manifest_text(manifest: Mapping[str, Any]) -> bytes:
    return json.dumps({**manifest, "digest": ""}, indent=2, sort_keys=True).encode()


class Deployed:
    """A working copy, and what is asked of it: the same each time, so that results can be compared.

    Attributes:
        folder: the working copy.
        files: paths of its files, sorted.
    """

    def __init__(self, source: Path, work: Path) -> None:
        self.folder = work
        if not work.exists():
            shutil.copytree(source, work, ignore=shutil.ignore_patterns(".lock"))
        self.files = sorted(read_manifest(work).files)
        self.manifest_bytes = (work / MANIFEST_FILE).read_bytes()

    def manifest(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.manifest_bytes)
        return found

    @contextmanager
    def exchanged(self, files: Mapping[str, bytes], *, is_sealed: bool) -> Iterator[Path]:
        """Exchange files, and put the old ones back afterwards; renamed in, since a file may be mapped still."""
        before = {path: (self.folder / path).read_bytes() for path in files}
        try:
            for path, data in files.items():
                _put(self.folder / path, data)
            if is_sealed:
                _put(self.folder / MANIFEST_FILE, self._sealed(files))
            yield self.folder
        finally:
            for path, data in (before | {MANIFEST_FILE: self.manifest_bytes}).items():
                _put(self.folder / path, data)

    def _sealed(self, files: Mapping[str, bytes]) -> bytes:
        manifest = self.manifest()
        for path, data in files.items():
            manifest["files"][path] = {"sha256": digest_bytes(data), "size_bytes": len(data)}
            task = path.split("/")[1] if path.startswith("tasks/") else None
            if task is not None:
                try:
                    manifest["tasks"][task]["adapter_digest"] = read_adapter(self.folder / "tasks" / task).digest
                except AdaLinkError:
                    continue  # no adapter any more: the old digest stays
        return seal_text(manifest_text(manifest))


def _put(path: Path, data: bytes) -> None:
    draft = path.with_name(f".{path.name}.draft")
    draft.write_bytes(data)
    draft.replace(path)


def ask(folder: Path, images: list[Any] | None = None) -> dict[str, Any]:
    """Open a deployment and ask it for logits and a few tokens, with each task, in chat, and behind an image."""
    found: dict[str, Any] = {}
    with Deployment.open(folder, threads=1, full_check=True) as opened:
        vocabulary = opened.manifest.base.vocab_size
        for task in (None, *opened.tasks[:4]):
            logits = opened.run(input_ids=IDS, tasks=task)["logits"]
            require(logits.shape == (1, len(IDS[0]), vocabulary), f"logits of shape {logits.shape}")
            found[f"logits {task}"] = np.asarray(logits)
        if opened.manifest.base.tokenizer is not None:
            prompts = ["abc"] if images is None else ["@a"]
            row = opened.generate(prompts, images=images and [images], max_new_tokens=3)[0]
            require(len(row.token_ids) <= 3, f"{len(row.token_ids)} tokens of 3")
            require(all(0 <= token < vocabulary for token in row.token_ids), f"tokens {row.token_ids}")
            found["generated"] = row.text, list(row.token_ids)
            if opened.manifest.base.chat_template is not None and images is None:
                found["chat"] = opened.generate(["Hi there"], chat=True, max_new_tokens=2)[0].text
    return found
