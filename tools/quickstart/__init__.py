"""``adalink quickstart``: from rows and a model to a measured task, by the other verbs."""
