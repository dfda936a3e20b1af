"""Storage: adapters, manifests, tensors, digests and caches on disk."""
