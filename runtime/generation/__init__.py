"""Generation: requests in one running batch, speculative decoding, prefix cache."""
