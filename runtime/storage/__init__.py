"""Files on disk: adapters, manifests, tensors, digests."""
