"""One command for a machine with an NVIDIA GPU and no network: every untried path of the kit, in twelve minutes.

``python -m benchmarks.gpu_proof --wheels DIR --out DIR --minutes 12``. Each step runs in a process of its own with a
limit, so that a crash or a hang costs one step. ``schedule.py`` has the steps, in order of value.

The driver runs before anything is installed: ``__main__``, ``schedule``, ``process``, ``record``, ``wheels`` and
``table`` use the standard library alone.
"""
