"""What a step reports: a JSON file that is whole at any moment, written anew with every figure."""

from __future__ import annotations

import json
import math
import os
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RUNNING, PASSED, FAILED, NO_DEVICE, MISSING = "running", "passed", "failed", "no device", "missing"
# What the driver says of a step that could not say it.
CRASHED, TIMED_OUT, SKIPPED = "crashed", "timed out", "skipped"
STATUSES = (FAILED, CRASHED, TIMED_OUT, PASSED, NO_DEVICE, MISSING, SKIPPED)
_TRACEBACK_CHARACTERS = 8000


class NotHereError(Exception):
    """A step cannot run on this machine, which is no fault; the message says what is missing."""


class Record:
    """The report of one step, saved after every change."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.content: dict[str, Any] = {
            "status": RUNNING,
            "reason": "",
            "traceback": "",
            "figures": {},
            "rehearsal": {},
            "targets": [],
            "notes": [],
        }
        self._section = "figures"
        self._part = ""
        self._errors: list[BaseException] = []
        self.save()

    def rehearse(self) -> None:
        """From now on figures are those of a stand-in: they go into ``rehearsal``, and no target is judged."""
        self._section = "rehearsal"

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Report figures under a name of their own; an error in the block costs this part alone."""
        self._part = name
        try:
            yield
        except Exception as error:
            self._errors.append(error)
            self.figure("failed", last_of(error))
        finally:
            self._part = ""

    def figure(self, name: str, value: object) -> None:
        """Report a figure, or a mapping or list of them."""
        self.figures({name: value})

    def figures(self, values: Mapping[str, object]) -> None:
        """Report several figures."""
        section = self.content[self._section]
        if self._part:
            section = section.setdefault(self._part, {})
        section |= values
        self.save()

    def target(self, name: str, measured: float, limit: float) -> None:
        """Judge a figure: it is met up to and including ``limit``. Nothing fails if it is not."""
        if self._section == "figures":
            shown = f"{self._part}: {name}" if self._part else name
            met = bool(measured <= limit)
            self.content["targets"].append({"name": shown, "measured": measured, "limit": limit, "met": met})
        self.save()

    def note(self, text: str) -> None:
        """Report something that no figure says."""
        self.content["notes"].append(text)
        self.save()

    def finish(self, status: str, reason: str = "") -> None:
        """Say how the step ended."""
        self.content |= {"status": status, "reason": " ".join(reason.split())}
        self.save()

    def fail(self, error: BaseException) -> None:
        """The step raised: its traceback, and the last line of it as the reason."""
        errors = [*self._errors, error]
        lines = "\n".join("".join(traceback.format_exception(one)) for one in errors)
        self.content["traceback"] = lines[-_TRACEBACK_CHARACTERS:]
        self.finish(FAILED, "; ".join(map(last_of, errors)))

    def check_parts(self) -> None:
        """Raise the first error of a part, so that the step is not taken for one that passed."""
        if self._errors:
            raise self._errors.pop()

    def save(self) -> None:
        """Write the file whole."""
        write_json(self._path, self.content)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write strict JSON beside ``path`` and rename it in; what is no number becomes ``null``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(_plain(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    draft.replace(path)


def read_json(path: Path) -> dict[str, Any] | None:
    """A file that ``write_json`` wrote; ``None`` if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _plain(value: Any) -> Any:
    """A value as JSON has it: NumPy's numbers as Python's, paths and types as texts."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(entry) for entry in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def last_of(error: BaseException) -> str:
    """The last line of an error's traceback, and where it was raised."""
    return f"{traceback.format_exception_only(error)[-1].strip()[:400]} ({_place(error)})"


def _place(error: BaseException) -> str:
    """File, line and function where an error was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return "no place"
    last = frames[-1]
    return f"{'/'.join(Path(last.filename).parts[-2:])}:{last.lineno}, {last.name}"
