"""Four classifiers of different kinds on one encoder, beside the other ways to have them."""
