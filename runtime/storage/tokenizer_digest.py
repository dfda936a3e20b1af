"""Digest of a tokenizer: it tells which tokens an adapter was trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from adalink.runtime.errors import IntegrityError
from adalink.runtime.storage.decoding import decode_json
from adalink.runtime.storage.digest import digest_bytes
from adalink.runtime.storage.integrity import read_verified

if TYPE_CHECKING:
    from pathlib import Path

    from adalink.runtime.storage.manifest import Manifest

# Padding and truncation are the caller's; the version is that of the format.
_NO_MATTER = ("version", "padding", "truncation")


def tokenizer_digest(content: str | bytes) -> str:
    """Digest of a ``tokenizer.json``, the same whatever release of ``tokenizers`` wrote it.

    It is that of the content with sorted keys, merges as pairs, and without padding, truncation, and fields that are
    null, false or empty: a later release writes new fields at such defaults.

    Raises:
        IntegrityError: it is no JSON object.
    """
    try:
        fields = decode_json(content, dict[str, Any])
    except msgspec.DecodeError as error:
        raise IntegrityError(f"tokenizer.json: {error}; export the base again") from error
    plain = _plain({name: value for name, value in fields.items() if name not in _NO_MATTER})
    return digest_bytes(msgspec.json.encode(plain, order="sorted"))


def deployed_tokenizer_digest(folder: Path, manifest: Manifest) -> str:
    """Digest of a deployment's tokenizer, from its file where an older kit wrote the manifest; empty without one.

    Raises:
        IntegrityError: the file is missing or altered.
    """
    base = manifest.base
    if base.tokenizer_digest or base.tokenizer is None:
        return base.tokenizer_digest
    return tokenizer_digest(read_verified(folder, manifest, base.tokenizer))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        items = ((name, _merges(item) if name == "merges" else _plain(item)) for name, item in value.items())
        return {name: item for name, item in items if not (item is None or item is False or item in ([], {}))}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _merges(merges: Any) -> Any:
    """Merges as pairs; releases before 0.20 wrote each as one text."""
    if not isinstance(merges, list):
        return merges
    return [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in merges]
