"""Steps of the proof, each a module with ``run(record, plan)``."""
