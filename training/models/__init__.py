"""Loading base models and what is particular to each."""
