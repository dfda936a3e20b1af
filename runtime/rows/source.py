"""A file of rows, and how its columns are named."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from adalink.runtime.errors import ConfigError, DataError
from adalink.runtime.near_names import did_you_mean

# Columns that the kit knows, whatever reads the rows.
COLUMNS = (
    *("prompt", "completion", "text", "text_pair", "label", "labels", "spans", "tokens", "tags"),
    *("messages", "images", "task"),
)


@dataclass(frozen=True)
class RowSource:
    """A file of rows.

    Attributes:
        path: the file; ``-`` for standard input.
        columns: for names of ``COLUMNS`` the column of the file that they are taken from.
        template: how a prompt is made of columns, such as ``"Text: {text} Topic:"``; a brace of the text is doubled.
            A row's ``label`` becomes its completion, behind a space unless the prompt ends in one.

    Raises:
        ConfigError: a name is not known, or the template cannot be read.
    """

    path: Path
    columns: Mapping[str, str] = field(default_factory=dict)
    template: str | None = None

    def __post_init__(self) -> None:
        for name in self.columns:
            if name not in COLUMNS:
                raise ConfigError(
                    f"map names {name!r}, expected one of {', '.join(COLUMNS)}{did_you_mean(name, COLUMNS)}"
                )
        if self.template is not None and not _names(self.template):
            raise ConfigError(f"template is {self.template!r}, expected columns in braces: 'Text: {{text}} Topic:'")

    @classmethod
    def of(cls, source: RowSource | Path | str) -> RowSource:
        """The source itself, or that of a file with the kit's own names."""
        return source if isinstance(source, RowSource) else cls(Path(source))

    def at(self, path: Path | str) -> RowSource:
        """Another file with the same columns and template."""
        return replace(self, path=Path(path))

    def as_record(self) -> dict[str, Any]:
        """What a report says beside the file's name; empty without names and template."""
        columns = {"columns": dict(self.columns)} if self.columns else {}
        return columns | ({} if self.template is None else {"template": self.template})

    def rename(self, values: dict[str, Any], origin: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Values by the kit's names, and those whose name another column got.

        Raises:
            DataError: a column is not in the row.
        """
        if not self.columns:
            return values, {}
        for name, column in self.columns.items():
            if column not in values:
                raise DataError(
                    f"{origin}: there is no column {column!r}, which --map takes for {name}; there are "
                    f"{', '.join(values)[:200]}{did_you_mean(column, values)}"
                )
        used = set(self.columns.values())
        rest = {name: value for name, value in values.items() if name not in used}
        hidden = {name: rest.pop(name) for name in self.columns if name in rest}
        return rest | {name: values[column] for name, column in self.columns.items()}, hidden

    def apply_template(self, fields: dict[str, Any], values: dict[str, Any], origin: str) -> None:
        """Give a row its prompt, and a completion where it has a label alone; raises ``DataError``."""
        assert self.template is not None
        filled = {}
        for name in _names(self.template):
            if name not in fields and name not in values:
                raise DataError(
                    f"{origin}: the template names column {name!r}; there are {', '.join({**values, **fields})[:200]}"
                    f"{did_you_mean(name, {**values, **fields})}"
                )
            filled[name] = _word(fields.get(name, values.get(name)), name, origin)
        prompt = "".join(
            literal + (filled[name] if name is not None else "")
            for literal, name, _, _ in string.Formatter().parse(self.template)
        )
        fields["prompt"] = prompt
        if "completion" not in fields and "label" in fields:
            fields["completion"] = ("" if prompt[-1:].isspace() else " ") + _word(fields["label"], "label", origin)


def read_columns(texts: tuple[str, ...]) -> dict[str, str]:
    """``("text=body,label=topic",)`` as a mapping; a name holds no comma unless it stands alone.

    Raises:
        ConfigError: a part is no pair, or a name occurs twice.
    """
    columns: dict[str, str] = {}
    parts = [part for text in texts for part in _split(text)]
    for part in parts:
        name, equals, column = part.partition("=")
        if not (name and equals and column) or name in columns:
            raise ConfigError(f"--map is {' '.join(texts)!r}, expected names once: text=body,label=topic")
        columns[name] = column
    return columns


def _split(text: str) -> list[str]:
    parts: list[str] = []
    for part in text.split(","):
        if "=" in part or not parts:
            parts.append(part.strip())
        else:
            parts[-1] += "," + part
    return parts


@lru_cache
def _names(template: str) -> list[str]:
    """Columns of a template, in order; raises ``ConfigError``."""
    try:
        parts = [(name, form, conversion) for _, name, form, conversion in string.Formatter().parse(template)]
    except ValueError as error:
        raise ConfigError(f"template is {template!r}: {error}; write a brace that is no column's twice") from error
    names = [name for name, _, _ in parts if name is not None]
    if "" in names or any(form or conversion for name, form, conversion in parts if name is not None):
        raise ConfigError(f"template is {template!r}, expected only names of columns in braces, such as {{text}}")
    return names


def _word(value: Any, name: str, origin: str) -> str:
    if value is None or isinstance(value, list | dict) or value == "":
        raise DataError(f"{origin}: column {name!r} is {value!r:.60}, expected a text, which the template needs")
    return str(value)
