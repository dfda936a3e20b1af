"""Receipt: evidence that no engine was rebuilt and no byte of the base changed."""

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
    """Evidence that no engine was rebuilt and no byte of the base changed.

    Attributes:
        engine_builds: engines that this deployment has opened; one for each base graph.
        expected_builds: number of base graphs.
        builder_calls: builder calls of this process (`adalink.runtime.builds`).
        digests: digest of each file of the base, read from disk now.
        unchanged: whether they equal the manifest's digests.
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
