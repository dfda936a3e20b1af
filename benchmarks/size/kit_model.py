"""The kit's side of the comparison of sizes: a deployment of one variant, without an end token, with example tasks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec

from adalink.export.adapter.export import export_adapters
from adalink.runtime.storage.manifest import MANIFEST_FILE
from adalink.runtime.storage.manifest_io import encode_manifest, read_manifest
from benchmarks.size.example_rows import ADAPTERS
from examples.make_data import TASKS


def finish(deployment: Path, *, has_tasks: bool) -> int:
    """Deploy the example tasks, if the base is theirs, and take the end token out, so that no generation ends early.

    Returns:
        Bytes of the base as it ships, without tasks.
    """
    manifest = read_manifest(deployment)
    size = sum(record.size_bytes for record in manifest.files.values())
    size += (deployment / MANIFEST_FILE).stat().st_size
    if has_tasks:
        _deploy_examples(deployment)
        manifest = read_manifest(deployment)
    endless = msgspec.structs.replace(manifest.base, eos_token_ids=(), generation=None)
    (deployment / MANIFEST_FILE).write_bytes(encode_manifest(msgspec.structs.replace(manifest, base=endless)))
    return size


def _deploy_examples(deployment: Path) -> None:
    """Deploy the tasks as if they were trained for this base: the same model in other bits has another fingerprint."""
    base, copies = read_manifest(deployment).base, deployment.with_name(f".{deployment.name}-adapters")
    shutil.rmtree(copies, ignore_errors=True)
    try:
        for name in TASKS:
            shutil.copytree(ADAPTERS / name, copies / name)
            path = copies / name / "adapter_config.json"
            config = json.loads(path.read_text(encoding="utf-8"))
            config |= {"base_fingerprint": base.fingerprint, "tokenizer_digest": base.tokenizer_digest}
            path.write_text(json.dumps(config), encoding="utf-8")
        export_adapters({name: copies / name for name in TASKS}, deployment)
    finally:
        shutil.rmtree(copies, ignore_errors=True)
