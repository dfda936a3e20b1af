"""Stop texts: texts that end a row, and special tokens in them, which the generated text does not show.

A special token of a stop text is looked for as a mark: a character that no text holds, put where the token was.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from adalink.runtime.errors import RequestError
from adalink.runtime.request import check_text
from adalink.runtime.storage.generation_schema import GenerationDefaults

# Halves of characters: no decoded text and no checked stop text holds one.
_FIRST_MARK, _MARKS = 0xD800, 0x0800
_MARK = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class StopTexts:
    """Stop texts of a request.

    Attributes:
        texts: texts to look for, with a mark for each special token.
        marks: mark of each special token that a text holds, by its id.
        heads: endings of texts that the prompt begins; they count at the start of the generated text.
    """

    texts: tuple[str, ...]
    marks: Mapping[int, str] = field(default_factory=dict)
    heads: tuple[str, ...] = ()

    def behind(self, prompt: str) -> StopTexts:
        """These stop texts behind a prompt whose last characters may begin one, with marks for special tokens."""
        heads = [
            text[size:] for text in self.texts for size in range(1, len(text)) if prompt.endswith(text[:size])
        ]  # fmt: skip
        return replace(self, heads=tuple(dict.fromkeys(heads)))


def without_marks(text: str) -> str:
    """The text as its reader sees it."""
    return _MARK.sub("", text)


def check_stops(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Stop texts as a tuple, ``None`` for none; raises ``RequestError`` for an empty one."""
    if stop is None:
        return ()
    stops = tuple(stop) if isinstance(stop, Iterable) and not isinstance(stop, str) else (stop,)
    if not all(isinstance(text, str) for text in stops):
        raise RequestError(f"stop is {stop!r}, expected a text or a list of texts")
    if "" in stops:
        raise RequestError("stop holds an empty text, which would end every row at once: leave it out")
    return tuple(check_text(text, "a stop text") for text in stops)


def resolve_stops(
    stop: str | Sequence[str] | None, defaults: GenerationDefaults | None, *, base_defaults: bool = True
) -> tuple[str, ...]:
    """Stop texts of a request, checked; where it names none, the base's.

    Args:
        stop: the request's; an empty list for none at all, ``None`` for those of the base.
        defaults: the base's generation defaults; ``None`` if it has none.
        base_defaults: whether the request wants them.

    Raises:
        RequestError: a stop text is empty, or no text.
    """
    if stop is None and defaults is not None and base_defaults:
        return defaults.stop_strings
    return check_stops(stop)


def mark_stops(stops: Sequence[str], special_ids: Mapping[str, int]) -> StopTexts:
    """Stop texts in which special tokens can be found.

    A stop text that holds a special token is also looked for as it is: a model may write it with ordinary tokens.

    Args:
        stops: checked stop texts.
        special_ids: id of each special token by its text.
    """
    used = [text for text in special_ids if text and any(text in stop for stop in stops)]
    if not used:
        return StopTexts(tuple(stops))
    if len(used) > _MARKS:
        raise RequestError(f"stop holds {len(used)} special tokens, expected at most {_MARKS}")
    marks = {text: chr(_FIRST_MARK + number) for number, text in enumerate(used)}
    # The longest first: a special token may begin with another.
    pattern = re.compile("|".join(map(re.escape, sorted(used, key=len, reverse=True))))
    marked = [pattern.sub(lambda match: marks[match.group()], stop) for stop in stops]
    return StopTexts(tuple(dict.fromkeys([*stops, *marked])), {special_ids[text]: mark for text, mark in marks.items()})
