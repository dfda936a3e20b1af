"""Reading and writing ``manifest.json``: encoded with its digest, decoded and validated."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from adalink.runtime.errors import DeploymentError, ManifestError
from adalink.runtime.storage.decoding import decode_json
from adalink.runtime.storage.digest import digest_bytes
from adalink.runtime.storage.manifest import MANIFEST_FILE, READABLE_VERSIONS, SCHEMA_VERSION, Manifest
from adalink.runtime.storage.manifest_validation import check_manifest
from adalink.runtime.storage.stamp import open_regular

_MAX_MANIFEST_BYTES = 64 << 20
# The digest's line in the indented encoding; only top-level fields are indented by two.
_NO_DIGEST = b'\n  "digest": ""'


def encode_manifest(manifest: Manifest) -> bytes:
    """Validate and encode ``manifest`` with its digest; raises ``ManifestError``."""
    check_manifest(manifest)
    data = _canonical(msgspec.structs.replace(manifest, digest=""))
    return data.replace(_NO_DIGEST, _NO_DIGEST[:-1] + digest_bytes(data).encode() + b'"', 1)


def decode_manifest(data: bytes, origin: str = MANIFEST_FILE) -> Manifest:
    """Decode and validate a manifest; raises ``ManifestError`` with the path of the wrong field."""
    if len(data) > _MAX_MANIFEST_BYTES:
        raise ManifestError(f"{origin} has {len(data)} bytes, expected at most {_MAX_MANIFEST_BYTES}: not a manifest")
    try:
        version = decode_json(data, _VersionOnly).schema_version
    except msgspec.DecodeError as error:
        raise _manifest_error(origin, error) from error
    if version not in READABLE_VERSIONS:
        age, repair = ("newer", "upgrade adalink-kit") if version > SCHEMA_VERSION else ("older", "export it again")
        raise ManifestError(
            f"{origin}: $.schema_version is {version}, this kit reads {READABLE_VERSIONS[0]} to {SCHEMA_VERSION}: the "
            f"deployment was written by a kit that is {age}; {repair}",
            field="$.schema_version",
        )
    try:
        manifest = decode_json(data, Manifest)
    except msgspec.DecodeError as error:
        raise _manifest_error(origin, error) from error
    check_manifest(manifest, origin)
    if digest_bytes(data.replace(manifest.digest.encode(), b"", 1)) != manifest.digest:
        raise ManifestError(
            f"{origin}: $.digest is {manifest.digest!r}, not the digest of what the manifest says: it was altered "
            "after it was written; export the deployment again or restore it from a good copy",
            field="$.digest",
        )
    return manifest


def read_manifest(folder: Path, *, follow_links: bool = True) -> Manifest:
    """Read a deployment's manifest.

    Args:
        folder: the deployment.
        follow_links: whether ``manifest.json`` may be a link.

    Raises:
        DeploymentError: there is no such folder, or it holds no manifest.
        ManifestError: the manifest is wrong.
    """
    path = folder / MANIFEST_FILE
    try:
        with open_regular(path, follow_links=follow_links) as stream:
            data = stream.read(_MAX_MANIFEST_BYTES + 1)
    except FileNotFoundError as error:
        what = "holds no manifest.json" if folder.is_dir() else "does not exist"
        raise DeploymentError(
            f"deployment {folder} {what}: make one with 'adalink export base MODEL --out {folder}', and run that again "
            "if an export was interrupted"
        ) from error
    except OSError as error:
        raise DeploymentError(f"deployment {folder}: cannot read {MANIFEST_FILE}: {error.strerror}") from error
    return decode_manifest(data, origin=str(path))


def _canonical(manifest: Manifest) -> bytes:
    return msgspec.json.format(msgspec.json.encode(manifest, order="sorted"), indent=2) + b"\n"


class _VersionOnly(msgspec.Struct):
    schema_version: int


def _manifest_error(origin: str, error: Exception) -> ManifestError:
    """Convert msgspec's error, with the path of the wrong field."""
    field_path = re.search(r"`(\$[^`]*)`$", str(error))
    field = field_path.group(1) if field_path else "$"
    missing = re.search(r"missing required field `([^`]+)`", str(error))
    if missing:
        field = f"{field}.{missing.group(1)}"
    return ManifestError(f"{origin}: {field}: {error}; export the deployment again", field=field)
