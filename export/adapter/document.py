"""``export_prefix``: the keys and values of a text as a task, so that prompts about it read the text no more."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from adalink.export.adapter.export import check_free, export_adapters
from adalink.runtime.deployment import Deployment
from adalink.runtime.errors import DataError
from adalink.runtime.storage.adapter import Adapter, AdapterConfig, make_adapter
from adalink.runtime.storage.kv_prefix_spec import KV_PREFIX_NAME, KvPrefixSpec
from adalink.runtime.storage.manifest import Manifest
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.runtime.storage.manifest_validation import check_task_name
from adalink.runtime.storage.tokenizer_digest import deployed_tokenizer_digest
from adalink.runtime.storage.variants import choose_variant, variant_digest

BACKEND = "onnxruntime-cpu"


def export_prefix(
    deployment: str | Path,
    text: str,
    name: str,
    *,
    variant: str | None = None,
    dtype: str | None = None,
    replace: bool = False,
) -> Manifest:
    """Compute the keys and values of a text with the deployment's own engine, and add them as a task.

    A prompt of the task goes on from the text: it gives what the tokens of both give together, but that penalties do
    not count those of the text. The task is for this variant alone, since others round otherwise.

    Args:
        deployment: the deployment folder.
        text: the text.
        name: name of the task.
        variant: the variant; by default the one that runs on the CPU.
        dtype: one of ``adalink.runtime.storage.kv_prefix_spec.KV_PREFIX_DTYPES``, in which the file holds them; by
            default the base's, which loses nothing. Half of float32's size is rounded.
        replace: whether a task of that name may be there already.

    Returns:
        The deployment's manifest.

    Raises:
        AdapterError: a number is beyond ``dtype``.
        BackendError: no variant runs on the CPU, or not the one that was asked for.
        ContractError: the base takes no KV prefix, or the text fills all its positions.
        DataError: the text is empty.
        DeploymentError: there is no deployment, or the name is taken or unusable.
        RequestError: the text is too long.
    """
    check_task_name(name)
    if not text.strip():
        raise DataError("the text of a KV prefix is empty: give it some")
    manifest = read_manifest(Path(deployment))
    check_free(name, manifest, deployment, replace=replace)  # a long text takes its time
    form = choose_variant(manifest, BACKEND, variant)
    with Deployment.open(deployment, BACKEND, variant=form) as opened:
        states = opened.read_states(text)
        adapter = _adapter(opened, states, dtype or opened.manifest.base.embedding_dtype)
    return export_adapters({name: adapter}, deployment, replace=replace)


def _adapter(opened: Deployment, states: np.ndarray, dtype: str) -> Adapter:
    """An adapter that is a KV prefix alone; ``states`` has shape ``(2 * layers, kv_heads, n, head_dim)``."""
    manifest, base = opened.manifest, opened.manifest.base
    config = AdapterConfig(
        base_model_name_or_path=base.name,
        base_fingerprint=base.fingerprint,
        hidden_size=base.hidden_size,
        tokenizer_digest=deployed_tokenizer_digest(opened.path, manifest),
        rank=0,
        activation="identity",
        bias=False,
        scope="all",
        modalities=("text",),
        kv_prefix=KvPrefixSpec(
            tokens=states.shape[2], dtype=dtype, variant_digest=variant_digest(manifest, opened.variant)
        ),
    )
    with np.errstate(over="ignore"):
        rounded = states.astype(dtype).astype(np.float32)
    return make_adapter(config, {KV_PREFIX_NAME: rounded.reshape(-1, 2, *states.shape[1:])}, "the text's KV prefix")
