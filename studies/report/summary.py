"""The summary of a study: figures of every cell over its seeds, and methods compared seed by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from studies.experiment.settings import Study, describe_method
from studies.plan import Cell, count_open
from studies.report.statistics import DRAWS, EXACT_PAIRS, mean_and_deviation, sign_flip_test, t_interval

SCORING = (
    "No text is generated. A decoder answers with the label whose text has the highest log-likelihood after the prompt "
    "(the sum over its tokens, no end token), an encoder with the label whose text the untouched encoder embeds "
    "nearest by the cosine. Of several learning rates one was chosen on validation rows, with a seed of its own."
)
PAIRED = (
    "Differences are accuracy minus that of the method compared with, for the same seed (same training rows, same "
    "order). The interval of a cell is Student's for their mean, 95 %. The p-value over data sets is of a two-sided "
    f"sign-flip test of all pairs of data set and seed, exact up to {EXACT_PAIRS} pairs, above by {DRAWS:,} random "
    "patterns; seeds of a data set share its test rows, so it speaks of these data sets, not of others."
)


def summarize(study: Study, cells: Sequence[Cell], finished: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The summary of all finished runs of a study, fit for strict JSON.

    Args:
        study: the study.
        cells: its cells.
        finished: finished runs by file name; those of other studies are left out.
    """
    groups = [_group(cell, finished) for cell in cells]
    used = {run.file_name for cell in cells for run in (*cell.choose, *cell.measured(finished))} & finished.keys()
    return {
        "study": _without_paths(study),
        "runs": {"finished": len(used), "open": count_open(cells, finished)},
        "devices": sorted({finished[name]["run"]["device"] for name in used}),
        "versions": _versions([finished[name]["versions"] for name in sorted(used)]),
        "scoring": SCORING,
        "paired": PAIRED,
        "cells": groups,
        "comparisons": _comparisons(study, groups),
        "not_compared": _not_compared(study, groups),
        "overall": _overall(study, groups),
        "shared": _shared(study, groups),
    }


def _without_paths(study: Study) -> dict[str, Any]:
    """The study's settings without where bases and data lie on this machine."""
    settings: dict[str, Any] = msgspec.to_builtins(study)
    for entry in (*settings["bases"], *settings["data"]):
        for field in ("model", "folder"):
            entry.pop(field, None)
    return settings


def _group(cell: Cell, finished: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Figures of one cell; ``accuracy`` is ``None`` where no seed is measured."""
    runs = [run for run in cell.measured(finished) if run.file_name in finished]
    results = {run.seed: finished[run.file_name]["result"] for run in runs}
    lr = cell.chosen(finished)
    tried = [run.lr for run in cell.choose]
    group: dict[str, Any] = {
        "base": cell.base.name,
        "data": cell.data.name,
        "method": cell.method.name,
        "settings": describe_method(cell.method),
        "size": "all" if cell.size is None else cell.size,
        "lr": lr or None,
        # The best of several at an end of the list: a better one may lie beyond it.
        "lr_at_edge": bool(tried) and lr in (min(tried), max(tried)),
        "seeds": {str(seed): result["accuracy"] for seed, result in results.items()},
        "seeds_wanted": len(cell.finals),
        "runs": [run.file_name for run in runs],
        "accuracy": None,
    }
    if results:
        first = next(iter(results.values()))
        group |= {
            "accuracy": _accuracy([result["accuracy"] for result in results.values()]),
            "trained_parameters": first["trained_parameters"],
            "parameter_share": first["trained_parameters"] / first["base_parameters"],
            "train_seconds": mean_and_deviation([result["train_seconds"] for result in results.values()])[0],
            "train_rows": first["train_rows"],
            "test_rows": first["rows"],
            "diverged": sum(result["diverged"] for result in results.values()),
        }
    if results and cell.parts:
        group["parts"] = {
            part.name: _accuracy([result["part_accuracy"][part.name] for result in results.values()])
            for part in cell.parts
        }
    return group


def _accuracy(values: Sequence[float]) -> dict[str, float | None]:
    mean, deviation = mean_and_deviation(values)
    return {"mean": mean, "deviation": deviation}


def _comparisons(study: Study, groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every trained method paired with those that it is compared with, cell by cell."""
    others = _by_key(groups)
    comparisons = []
    for group, name in _references(study, groups):
        against = others.get((*_key(group), name))
        if against is None:
            continue
        seeds = [seed for seed in group["seeds"] if seed in against["seeds"]]
        if not seeds:
            continue
        differences = [group["seeds"][seed] - against["seeds"][seed] for seed in seeds]
        interval = t_interval(differences)
        comparisons.append({
            "base": group["base"], "data": group["data"], "size": group["size"], "method": group["method"],
            "against": name, "seeds": seeds, "differences": differences,
            "mean": mean_and_deviation(differences)[0], "interval": None if interval is None else list(interval),
            "ratio": group["accuracy"]["mean"] / against["accuracy"]["mean"] if against["accuracy"]["mean"] else None,
        })  # fmt: skip
    return comparisons


def _not_compared(study: Study, groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Where a method is trained and one that it is compared with, as the study declares it, is not."""
    others = _by_key(groups)
    pairs = dict.fromkeys((*_key(group), name) for group, name in _references(study, groups))
    return [
        {"base": base, "data": data, "size": size, "against": name}
        for base, data, size, name in pairs
        if (base, data, size, name) not in others
    ]


def _references(study: Study, groups: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], str]]:
    """Each cell, and the name of each method that its own is compared with."""
    references = {method.name: study.references(method) for method in study.methods}
    return [(group, name) for group in groups for name in references[group["method"]]]


def _overall(study: Study, groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The pairs of all data sets together, for each base, size, method and one that it is compared with."""
    pooled: dict[tuple[str, Any, str, str], list[dict[str, Any]]] = {}
    single = {entry.name for entry in study.data if entry.combine is None}
    for comparison in _comparisons(study, [group for group in groups if group["data"] in single]):
        key = (comparison["base"], comparison["size"], comparison["method"], comparison["against"])
        pooled.setdefault(key, []).append(comparison)
    overall = []
    for (base, size, method, against), comparisons in pooled.items():
        differences = [value for comparison in comparisons for value in comparison["differences"]]
        overall.append({
            "base": base, "size": size, "method": method, "against": against,
            "data": [comparison["data"] for comparison in comparisons], "pairs": len(differences),
            "mean": mean_and_deviation(differences)[0], "p_value": sign_flip_test(differences),
        })  # fmt: skip
    return overall


def _shared(study: Study, groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One of a method for each data set against one for all of them: accuracy on each, and parameters together."""
    measured = {key: group for key, group in _by_key(groups).items() if group["accuracy"] is not None}
    shared = []
    for entry in study.data:
        for base, size, method in dict.fromkeys((key[0], key[2], key[3]) for key in measured):
            alone = [measured.get((base, name, size, method)) for name in entry.combine or ()]
            together = measured.get((base, entry.name, size, method))
            if together is None:
                continue
            measured_alone = [group for group in alone if group is not None]
            parameters = sum(group["trained_parameters"] for group in measured_alone)
            for name, single in zip(entry.combine or (), alone, strict=True):
                shared.append({
                    "base": base, "data": name, "size": size, "method": method, "combined": entry.name,
                    "alone": single and single["accuracy"], "together": together["parts"][name],
                    "parameters_alone": parameters if len(measured_alone) == len(alone) else None,
                    "parameters_together": together["trained_parameters"],
                })  # fmt: skip
    return shared


def _key(group: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """What two cells share whose methods can be compared."""
    return group["base"], group["data"], group["size"]


def _by_key(groups: Sequence[Mapping[str, Any]]) -> dict[tuple[Any, ...], Mapping[str, Any]]:
    return {(*_key(group), group["method"]): group for group in groups}


def _versions(runs: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """Every version of a package that runs were done with: more than one is worth knowing."""
    names = sorted({name for versions in runs for name in versions})
    return {name: sorted({versions[name] for versions in runs if name in versions}) for name in names}
