"""Research, not part of the wheel: AdaLink compared with other methods of adaptation (``python -m studies``).

- ``files/``: the study files (TOML); ``results/``: a folder a study with its summary, page, plots and packed runs.
- ``commands``: the command line. ``plan``: the runs of a study. ``schedule``: doing them. ``run_store``: keeping them.
- ``experiment/``: one run: data, methods, training, scoring. ``report/``: statistics, tables, plots and pages.
"""
