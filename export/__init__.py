"""Export: a checkpoint becomes a base graph and engines, an adapter becomes a task graph."""
