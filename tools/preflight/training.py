"""What ``adalink train`` can check of its options before PyTorch is imported: rows, base, folders and device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from adalink.runtime.device.gpus import find_gpus
from adalink.runtime.errors import ConfigError, ModelError
from adalink.runtime.rows.source import RowSource
from adalink.runtime.rows.table import read_table
from adalink.runtime.storage.atomic import check_writable
from adalink.training.data.labelled_rows import EXPECTED, find_labels, has_labels, read_labelled_rows
from adalink.training.data.rows import read_rows
from adalink.training.data.run_rows import check_files
from adalink.training.models.base_kind import find_kind
from adalink.training.models.source import display_name, find_source
from adalink.training.run_folder import check_fresh, check_target, checkpoints_of

# A larger file is read once, when the run begins.
_MOST_BYTES = 32 << 20
# Where AMD's driver is, PyTorch itself says whether it has a GPU.
_OTHER_DRIVER = Path("/dev/kfd")


def check_training(
    base: str,
    data: RowSource,
    eval_data: Path | None,
    out: Path,
    *,
    device: str = "auto",
    resume: bool = False,
    wants_head: bool = False,
    problem_type: str | None = None,
) -> None:
    """Check what a training run is given; ``train`` checks it all again, and more.

    Args:
        base: the base model.
        data: rows to learn from.
        eval_data: rows to measure on, if any.
        out: the adapter folder.
        device: as in ``TrainSettings``.
        resume: whether checkpoints of an interrupted run are expected.
        wants_head: whether the rows must have labels.
        problem_type: as in ``HeadSettings``.

    Raises:
        AdaLinkError: something cannot be used.
    """
    check_files(data, None if eval_data is None else data.at(eval_data))
    kind = find_kind(find_source(base))
    labelled = wants_head or (data.template is None and (has_labels(data) or (kind == "encoder" and _is_strange(data))))
    _check_rows([data] if eval_data is None else [data, data.at(eval_data)], labelled, problem_type)
    _check_kind(kind, display_name(base), labelled=labelled)
    folder = out.resolve()
    check_target(folder)
    if not resume:
        check_fresh(checkpoints_of(folder))
    check_writable(folder, repair="free space, or choose a writable --out")
    if device == "cuda" and not _OTHER_DRIVER.exists() and (reason := find_gpus().reason):
        raise ConfigError(f"device is 'cuda', but there is no GPU on this machine: {reason}; take --device cpu")


def _is_strange(data: RowSource) -> bool:
    """Whether the first row has neither prompts nor labels: on an encoder, labels are what is missing."""
    row = next(iter(read_table(data, EXPECTED)))
    return not {"prompt", "completion", "messages"} & row.fields.keys()


def _check_kind(kind: str | None, name: str, *, labelled: bool) -> None:
    """Check that a base is of the kind that the rows are for; raises ``ModelError``."""
    if kind == "encoder" and not labelled:
        raise ModelError(
            f"base model {name} is an encoder, which cannot generate text: it takes rows with labels, {EXPECTED}"
        )
    if kind == "decoder" and labelled:
        raise ModelError(
            f"base model {name} is a decoder, and rows with labels are for encoders: give it rows "
            '{"prompt": "...", "completion": "..."}, or make them with --template "Text: {text} Label:"'
        )


def _check_rows(sources: Sequence[RowSource], labelled: bool, problem_type: str | None) -> None:
    """Read the rows to learn from, and those to measure on, unless there are very many."""
    for place, source in enumerate(sources):
        if source.path.is_file() and source.path.stat().st_size > _MOST_BYTES:
            return
        if not labelled:
            read_rows(source)
            continue
        problem_type, rows = read_labelled_rows(source, problem_type)  # the first file's is that of both
        if place == 0:
            find_labels(problem_type, rows, source.path)
