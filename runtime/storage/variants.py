"""Choice of the base variant for a backend."""

from __future__ import annotations

from adalink.runtime.errors import BackendError
from adalink.runtime.near_names import did_you_mean
from adalink.runtime.storage.digest import digest_bytes
from adalink.runtime.storage.manifest import Manifest, Variant

# Backends that run a compiled plan, not a graph.
COMPILED_BACKENDS = ("tensorrt", "tensorrt-rtx")


def choose_variant(manifest: Manifest, backend: str, name: str | None = None) -> str:
    """Name of the variant that a backend runs.

    The default is a variant that is not quantised, preferably exported for this backend. If all are quantised, it is
    the one with the most bits. So a quantised variant is never chosen while an unquantised one exists.

    Args:
        manifest: the deployment's manifest.
        backend: name of the backend.
        name: the requested variant.

    Raises:
        BackendError: there is no such variant, or none for this backend.
    """
    variants = manifest.variants
    if name is not None and name not in variants:
        raise BackendError(
            f"this deployment has no base variant {name!r}, only {', '.join(sorted(variants))}: choose one of them, or "
            f"add it with 'adalink export base MODEL --out DIR' and --target or --quantize {name}"
            f"{did_you_mean(name, variants)}"
        )
    if name is not None:
        if backend not in (served := variants[name].backends):
            raise BackendError(
                f"variant {name!r} is for {' or '.join(served)}, not for {backend}: choose that backend, or another "
                "variant"
            )
        return name
    serving = [key for key, variant in variants.items() if backend in variant.backends]
    if not serving:
        served_here = sorted({entry for variant in variants.values() for entry in variant.backends})
        target = backend if backend in ("onnxruntime-cpu", "onnxruntime-cuda") else "portable"
        what, command = "base graph", f"base MODEL --out DIR --target {target}"
        if backend == "llama.cpp":
            what, command = "GGUF file", "base MODEL.gguf --out DIR --target llama.cpp"
        if backend in COMPILED_BACKENDS:
            what, command = "engine", f"engine DIR --backend {backend}"
        raise BackendError(
            f"this deployment has no {what} for {backend}, only for {', '.join(served_here) or 'none'}: "
            f"choose a backend that it is for, or add one with 'adalink export {command}'"
        )

    def preference(key: str) -> tuple[int, bool, str]:
        """Smaller is better."""
        quantization = variants[key].quantization
        bits = 32 if quantization is None else quantization.bits
        return -bits, variants[key].target != backend, key

    return min(serving, key=preference)


def choose_graph(manifest: Manifest, variant: Variant, kv_cache_dtype: str | None) -> str:
    """Path of the base graph of a variant whose KV cache has a dtype; ``None`` is the base's own.

    Raises:
        BackendError: the variant has no such graph.
    """
    own = manifest.base.embedding_dtype
    if kv_cache_dtype is None or (kv_cache_dtype == own and manifest.base.kind == "decoder"):
        return variant.graph
    if manifest.base.kind != "decoder":
        raise BackendError(
            f"kv_cache_dtype is {kv_cache_dtype!r}, but {manifest.base.name} is {manifest.base.kind}, not a decoder: "
            "leave it out"
        )
    graph = variant.kv_cache_graphs.get(kv_cache_dtype)
    if graph is None:
        dtypes = ", ".join((own, *variant.kv_cache_graphs))
        raise BackendError(
            f"kv_cache_dtype is {kv_cache_dtype!r}, but {variant.graph} has no such KV cache, only {dtypes}: leave it "
            "out, or add the graph with 'adalink export kv-cache DIR' and --variant"
        )
    return graph


def variant_digest(manifest: Manifest, variant: Variant) -> str:
    """Digest of the numbers of a base variant: of its files, but for graphs with another KV cache.

    Keys and values that one variant computed are of no use to another, which rounds otherwise.
    """
    own = set(variant.files) - set(variant.kv_cache_graphs.values())
    digests = sorted(manifest.files[path].sha256 for path in own)
    return digest_bytes("\n".join(digests).encode())
