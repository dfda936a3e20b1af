"""A deployment as a folder for browsers and Node."""
