"""Generation: decode loop, sampling, speculative decoding, prefix cache."""
