"""KV cache in 8 bits: a second graph of a variant, over the same weights (docs/decisions/0026-memory.md).

``GroupQueryAttention`` keeps keys and values as int8 codes, ``round(x / scale)``, with a scale for each channel of each
head. The scales are constants of the graph: twice the largest number that a channel had on seeded token ids, divided by
127. Numbers beyond that are clipped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import numpy.typing as npt

from adalink.export.writer import open_writer
from adalink.runtime.engine import Engine, SlotEngine
from adalink.runtime.errors import ConfigError, DeploymentError, GraphError
from adalink.runtime.ort.backend import OnnxRuntimeBackend
from adalink.runtime.ort.session import NEEDS_ONNXRUNTIME
from adalink.runtime.storage.embedding_table import EmbeddingTable, open_table
from adalink.runtime.storage.manifest import Base, Manifest
from adalink.runtime.storage.variants import choose_variant
from adalink.runtime.storage.verification_cache import verify_variant

if TYPE_CHECKING:
    import onnx

DTYPE = "int8"
# The oldest ONNX Runtime whose results were compared; the operator had no such cache on CPUs before 2026.
CACHE_SINCE = "1.31"
_BACKEND = "onnxruntime-cpu"
# As in `adalink.export.tracing.graph`, which imports torch; here nothing else needs it.
_ATTENTION = ("com.microsoft", "GroupQueryAttention")
# Seeded token ids: rows, and tokens of a row. Real text has up to three times the range of these in single channels of
# values, and less than twice in nearly all; docs/decisions/0026.
_ROWS, _TOKENS, _SEED = 8, 256, 0
_HEADROOM, _MOST_CODE = 2.0, 127

Float32 = npt.NDArray[np.float32]


def export_kv_cache(
    deployment: str | Path, variant: str | None = None, *, progress: Callable[[str], None] | None = None
) -> Manifest:
    """Add to a variant of a decoder the graph whose KV cache holds int8; weights and other graphs stay as they are.

    Args:
        deployment: the deployment folder.
        variant: the variant; by default the one that runs on the CPU.
        progress: callback, called with one line per step.

    Returns:
        The deployment's manifest.

    Raises:
        ConfigError: the variant's graph has no such cache, or ONNX Runtime is too old for it.
        DeploymentError: there is no deployment, or the variant has the graph already.
        IntegrityError: a file is missing or altered.
        GraphError: the base's keys or values are no finite numbers.
    """
    import onnx

    progress = progress or (lambda line: None)
    with open_writer(deployment) as writer:
        manifest = writer.manifest
        name = choose_variant(manifest, _BACKEND, variant)
        source = manifest.variants[name]
        if DTYPE in source.kv_cache_graphs:
            raise DeploymentError(f"variant {name!r} of {writer.folder} has a graph with an {DTYPE} KV cache already")
        _check_base(manifest.base, name)
        verify_variant(writer.folder, manifest, source, full_check=False)
        graph = writer.folder / source.graph
        model = onnx.load(graph, load_external_data=False)
        nodes = [node for node in model.graph.node if (node.domain, node.op_type) == _ATTENTION]
        cache = manifest.base.cache
        if cache is None or len(nodes) != cache.layers:
            raise ConfigError(
                f"variant {name!r} of {manifest.base.name} computes attention in standard operators, whose KV cache "
                "has the base's dtype: only decoders exported with --target onnxruntime-cpu can have another"
            )
        progress(f"reading {_ROWS * _TOKENS} tokens for the ranges of keys and values")
        table = open_table(writer.folder / manifest.base.embeddings, manifest.base)
        store_in_int8(model, nodes, _scales(graph, manifest.base, table))
        added = f"{source.graph.removesuffix('.onnx')}.kv-{DTYPE}.onnx"
        writer.stage(added).write_bytes(model.SerializeToString())
        changed = msgspec.structs.replace(
            source, kv_cache_graphs={**source.kv_cache_graphs, DTYPE: added}, files=(*source.files, added)
        )
        progress("hashing and committing")
        return writer.commit(msgspec.structs.replace(manifest, variants={**manifest.variants, name: changed}))


def _check_base(base: Base, variant: str) -> None:
    import onnxruntime

    from adalink.runtime.ort.session import is_older

    if base.kind != "decoder" or base.embedding_dtype != "float32":
        raise ConfigError(
            f"{base.name} is {base.kind} in {base.embedding_dtype}: an {DTYPE} KV cache is for decoders in float32, "
            "quantised or not; leave it out"
        )
    if base.vision is not None and base.vision.patches is not None:
        raise ConfigError(
            f"positions of {base.name} follow the grid of an image, for which no {DTYPE} KV cache of variant "
            f"{variant!r} was measured: leave it out"
        )
    if is_older(onnxruntime.__version__, CACHE_SINCE):
        raise ConfigError(
            f"ONNX Runtime {onnxruntime.__version__} has no {DTYPE} KV cache that was measured: install {CACHE_SINCE} "
            "or newer"
        )


def _scales(graph: Path, base: Base, table: EmbeddingTable) -> dict[str, Float32]:
    """By name of a cache input, its scales with shape ``(1, kv_heads, 1, head_dim)``; raises ``GraphError``."""
    assert base.cache is not None
    tokens = min(_TOKENS, base.max_positions or _TOKENS)
    rows = np.random.default_rng(_SEED).integers(0, base.vocab_size, (_ROWS, tokens))
    largest: Float32 = np.zeros((2 * base.cache.layers, base.cache.kv_heads, base.cache.head_dim), np.float32)
    with closing(OnnxRuntimeBackend(_BACKEND, None).open_engine(graph, base, "base", table)) as engine:
        slots: Engine = engine
        assert isinstance(slots, SlotEngine)
        for ids in rows:
            state = slots.open_slots(1, tokens)
            state.begin(None)
            feeds = {"inputs_embeds": table.take(ids)[None], "attention_mask": np.ones((1, tokens), np.int64)}
            state.extend(feeds, 0, tokens)
            np.maximum(largest, np.abs(state.states(0, tokens)).max(axis=2), out=largest)
            state.close()
    names = [past for past, _ in base.cache.names()]
    if bad := [name for name, channels in zip(names, largest, strict=True) if not np.isfinite(channels).all()]:
        raise GraphError(
            f"{base.name} has keys or values on seeded tokens that are no finite numbers, in {bad[0]}: there is no "
            f"scale for an {DTYPE} KV cache; check the base with 'adalink verify'"
        )
    # A channel that was always 0 still needs a scale.
    scales = np.maximum(largest, np.float32(1e-6)) * np.float32(_HEADROOM / _MOST_CODE)
    return {name: scales[index][None, :, None] for index, name in enumerate(names)}


def store_in_int8(model: onnx.ModelProto, nodes: list[onnx.NodeProto], scales: Mapping[str, Float32]) -> None:
    """Let the attention nodes of a graph keep keys and values in int8, in place.

    Args:
        model: the graph.
        nodes: its attention nodes.
        scales: by name of a cache input, its scales with shape ``(1, kv_heads, 1, head_dim)``.
    """
    from onnx import TensorProto, helper, numpy_helper

    settings = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
    for node in nodes:
        past = node.input[3:5]
        # Behind the inputs for position ids, a bias and a sink, which stay absent.
        node.input.extend([""] * (12 - len(node.input)))
        for name in past:
            scale = f"{name}.scale"
            model.graph.initializer.append(numpy_helper.from_array(scales[name], scale))
            node.input.append(scale)
        kept = [attribute for attribute in node.attribute if attribute.name not in settings]
        del node.attribute[:]
        node.attribute.extend([*kept, *(helper.make_attribute(key, value) for key, value in settings.items())])
    for value in (*model.graph.input, *model.graph.output):
        if value.name.startswith(("past_key_values.", "present.")):
            value.type.tensor_type.elem_type = TensorProto.INT8
    # Types between the nodes are inferred anew.
    del model.graph.value_info[:]
    entries = {entry.key: entry.value for entry in model.metadata_props}
    helper.set_model_props(model, {**entries, NEEDS_ONNXRUNTIME: CACHE_SINCE})
