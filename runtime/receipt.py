"""The receipt: the record that nothing was rebuilt and no byte of the base changed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from adalink.runtime.builds import builder_calls
from adalink.runtime.storage.digest import digest_file
from adalink.runtime.storage.integrity import locate, reading
from adalink.runtime.storage.manifest import Manifest


@dataclass(frozen=True)
class Receipt:
    """The record that nothing was rebuilt.

    Attributes:
        engine_builds: engines opened by this deployment since it was opened; one for each base graph, made then.
        expected_builds: number of base graphs.
        builder_calls: how often this process has asked a builder of compiled engines for one, ever.
        digests: digest of each file of the base, read from the disk now.
        unchanged: whether those are the digests of the manifest.
    """

    engine_builds: int
    expected_builds: int
    builder_calls: int
    digests: dict[str, str]
    unchanged: bool


def make_receipt(
    folder: Path, manifest: Manifest, paths: Iterable[str], engine_builds: int, expected_builds: int
) -> Receipt:
    """Read ``paths`` of a deployment again and compare them with its manifest.

    Raises:
        IntegrityError: a file is gone, unreadable, or a link out of the deployment.
    """
    digests = {}
    for relative in paths:
        path = locate(folder, relative)
        with reading(path):
            digests[relative] = digest_file(path)
    unchanged = all(digest == manifest.files[path].sha256 for path, digest in digests.items())
    return Receipt(engine_builds, expected_builds, builder_calls(), digests, unchanged)
