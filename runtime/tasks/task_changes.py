"""Changes of a deployment's tasks between two manifests of the same base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from adalink.runtime.errors import ContractError
from adalink.runtime.storage.manifest import Manifest, Task, Variant


@dataclass(frozen=True)
class Reload:
    """What ``Deployment.reload`` changed: names of tasks, sorted.

    Attributes:
        added: tasks that are new.
        replaced: tasks with another adapter, or other files of the same one, than before.
        removed: tasks that are gone.
    """

    added: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()


def is_replaced(name: str, old: Manifest, new: Manifest) -> bool:
    """Whether a task of two manifests has other settings or files in the second; not if one lacks it."""
    before, after = old.tasks.get(name), new.tasks.get(name)
    if before is None or after is None:
        return False
    return before != after or any(old.files[path] != new.files[path] for path in after.files)


def compare_tasks(before: Mapping[str, object], after: Mapping[str, object], old: Manifest, new: Manifest) -> Reload:
    """What changes from the tasks ``before`` to those ``after``.

    Args:
        before: tasks by name; those of the deployment are ``Task``, others are not of a manifest.
        after: likewise.
        old: manifest of the tasks before.
        new: manifest of those after.
    """
    replaced = [
        name
        for name in before.keys() & after.keys()
        if before[name] is not after[name] and (not isinstance(before[name], Task) or is_replaced(name, old, new))
    ]
    return Reload(
        added=tuple(sorted(after.keys() - before.keys())),
        replaced=tuple(sorted(replaced)),
        removed=tuple(sorted(before.keys() - after.keys())),
    )


def check_same_base(folder: Path, opened: Manifest, manifest: Manifest, variant: Variant) -> None:
    """Check that a manifest has the base, and the variant of it, that an open deployment runs.

    Args:
        folder: the deployment.
        opened: the manifest that it was opened with.
        manifest: the manifest on the disk.
        variant: the variant that its engine runs.

    Raises:
        ContractError: base, variant, or a digest of their files differ.
    """
    difference = _difference(opened, manifest, variant)
    if difference:
        raise ContractError(
            f"deployment {folder}: the base on the disk is not the one that is open: {difference}. Only tasks can be "
            "reloaded; nothing was changed: open the deployment again"
        )


def _difference(opened: Manifest, manifest: Manifest, variant: Variant) -> str:
    """The first difference of the base; empty if there is none.

    Another variant that comes or goes may move the embedding table. The open one has the same rows still.
    """
    before, after = msgspec.structs.asdict(opened.base), msgspec.structs.asdict(manifest.base)
    has_moved = before["embeddings"] != after["embeddings"]
    for name in ("fingerprint", *before):
        if before[name] != after[name] and not (has_moved and name in ("embeddings", "table")):
            return f"{name} is {after[name]!r:.100}, expected {before[name]!r:.100}"
    if not any(_runs(variant, other) for other in manifest.variants.values()):
        return f"it has no variant with the graph {variant.graph}, or that variant has other files"
    alone = msgspec.structs.replace(opened, variants={"open": variant}, tasks={})
    moved = {opened.base.embeddings} - {*variant.files} if has_moved else set()
    for path in sorted(alone.paths_in_use() - moved):
        if opened.files[path] != manifest.files[path]:
            return f"{path} has digest {manifest.files[path].sha256}, expected {opened.files[path].sha256}"
    return ""


def _runs(variant: Variant, other: Variant) -> bool:
    """Whether a variant on the disk is the one that is open; graphs with another KV cache may have joined it."""
    alike = msgspec.structs.replace(other, kv_cache_graphs=variant.kv_cache_graphs, files=variant.files)
    return alike == variant and set(variant.files) <= set(other.files)
