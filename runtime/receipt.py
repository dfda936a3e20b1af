"""Receipt: evidence that no engine was rebuilt, and no byte of the base or of a loaded task changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from adalink.runtime.builds import builder_calls
from adalink.runtime.storage.digest import digest_stream
from adalink.runtime.storage.integrity import locate, reading
from adalink.runtime.storage.manifest import Manifest
from adalink.runtime.storage.stamp import open_regular


@dataclass(frozen=True)
class Receipt:
    """Evidence that no engine was rebuilt, and no byte of the base or of a loaded task changed.

    Attributes:
        engine_builds: engines that this deployment has opened; one for each base graph.
        expected_builds: number of base graphs.
        builder_calls: builder calls of this process (`adalink.runtime.builds`).
        digests: digest of each file of the base, read from disk now.
        unchanged: whether they and the loaded tasks' equal the manifest's digests.
        task_digests: digest of each file of each loaded task, read from disk now. A task that another process has
            removed or replaced since runs on as it was loaded: its files that are gone have the digest of that time.
            Adapters of ``add_task`` lie outside the deployment and are not among them.
    """

    engine_builds: int
    expected_builds: int
    builder_calls: int
    digests: dict[str, str]
    unchanged: bool
    task_digests: dict[str, str] = field(default_factory=dict)


def make_receipt(
    folder: Path,
    manifest: Manifest,
    paths: Iterable[str],
    engine_builds: int,
    expected_builds: int,
    tasks: Mapping[str, Sequence[str]] | None = None,
) -> Receipt:
    """Read files of a deployment again and compare them with its manifest.

    Args:
        folder: the deployment.
        manifest: its manifest, as it was when the deployment was opened or last reloaded.
        paths: files of the base.
        engine_builds: see ``Receipt``.
        expected_builds: see ``Receipt``.
        tasks: files of each loaded task.

    Raises:
        IntegrityError: a file is gone, unreadable, or a link out of the deployment.
    """
    digests = _digests(folder, paths)
    loaded = [path for files in (tasks or {}).values() for path in files]
    task_digests = {path: manifest.files[path].sha256 for path in loaded if not (folder / path).exists()}
    task_digests |= _digests(folder, (path for path in loaded if path not in task_digests))
    unchanged = all(manifest.files[path].sha256 == digest for path, digest in (digests | task_digests).items())
    return Receipt(engine_builds, expected_builds, builder_calls(), digests, unchanged, task_digests)


def _digests(folder: Path, paths: Iterable[str]) -> dict[str, str]:
    digests = {}
    for relative in dict.fromkeys(paths):
        path = locate(folder, relative)
        with reading(path), open_regular(path) as stream:
            digests[relative] = digest_stream(stream)
    return digests
