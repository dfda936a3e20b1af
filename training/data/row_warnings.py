"""What usually is a mistake in rows, and is no error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from adalink.training.data.labelled_rows import LabelledRow, names_of
from adalink.training.data.rows import TrainingRow


def warn_of_prompts(rows: Sequence[TrainingRow], eval_rows: Sequence[TrainingRow]) -> list[str]:
    """Warnings about rows with prompts and completions, each a line."""
    joined = [row for row in rows if row.messages is None and _is_joined(row)]
    warnings = []
    if joined:
        example = joined[0]
        warnings.append(
            f"{len(joined)} of {len(rows)} completions begin without a space behind their prompts (such as "
            f"{example.prompt[-12:] + example.completion[:12]!r}): most tokenizers expect ' {example.completion[:12]}'"
        )
    keys = [prompt_key(row) for row in rows]
    warnings += _warn_of_doubles(keys, [prompt_key(row) for row in eval_rows], "prompts")
    answers: dict[object, str] = {}
    told = [row.completion for row in rows]
    if differing := sum(answers.setdefault(key, answer) != answer for key, answer in zip(keys, told, strict=True)):
        warnings.append(f"{differing} rows have the prompt of another row, with another completion: which is right?")
    return warnings


def warn_of_labels(rows: Sequence[LabelledRow], eval_rows: Sequence[LabelledRow]) -> list[str]:
    """Warnings about rows with labels, each a line."""
    counts = Counter(name for row in rows for name in names_of(row))
    warnings = []
    if rare := sorted(name for name, count in counts.items() if count == 1):
        names = ", ".join(map(repr, rare[:5])) + (" and others" if len(rare) > 5 else "")
        warnings.append(f"{len(rare)} labels have one training row ({names}): add rows, or is one misspelt?")
    keys = [label_key(row) for row in rows]
    warnings += _warn_of_doubles(keys, [label_key(row) for row in eval_rows], "texts")
    answers: dict[object, tuple[object, ...]] = {}
    told = [(row.labels, row.value, row.spans) for row in rows]
    if differing := sum(answers.setdefault(key, label) != label for key, label in zip(keys, told, strict=True)):
        warnings.append(f"{differing} rows have the text of another row, with another label: which is right?")
    return warnings


def label_key(row: LabelledRow) -> tuple[str, str | None]:
    """What makes two rows the same text."""
    return row.text, row.text_pair


def prompt_key(row: TrainingRow) -> tuple[object, ...]:
    """What makes two rows the same prompt."""
    return row.prompt, row.images, row.messages


def _is_joined(row: TrainingRow) -> bool:
    """Whether a completion's word runs on from the prompt: letters of languages that put spaces between words."""
    first, last = row.completion[0], row.prompt[-1]
    return first.isascii() and first.isalnum() and not last.isspace() and last not in "\"'([{<-/_#@$="


def _warn_of_doubles(keys: Sequence[object], eval_keys: Sequence[object], name: str) -> list[str]:
    known = set(keys)
    if not (both := sum(key in known for key in eval_keys)):
        return []
    return [f"{both} of {len(eval_keys)} eval rows have {name} of training rows: what is measured there is memory"]
