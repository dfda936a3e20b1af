"""Training rows and images."""
