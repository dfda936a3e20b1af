"""Budget of a chat template: what it may compute and write, counted in bytes before each operation.

A step of the template costs a constant, and an operation the size of what it reads and writes. No single operation runs
for long, since its cost is known before it begins.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jinja2 import TemplateError

# Costs of a node of the template and of an element of a list, in bytes.
NODE_COST, ELEMENT_COST = 32, 64
# What any template may spend, and how much more for each byte of its messages.
WORK, WORK_PER_BYTE = 1 << 27, 64
# The longest text in characters, and how much longer it may be for each byte of the messages.
OUTPUT, OUTPUT_PER_BYTE = 1 << 22, 4
DEADLINE_S = 10.0
# Python's own limit for whole numbers that become texts is 4300 digits.
_INTEGER_BITS = 1 << 13

# With a length, and elements that are parts of them.
_SEQUENCES: tuple[type[Any], ...] = (list, tuple, type({}.keys()), type({}.values()), type({}.items()))
_SIZED: tuple[type[Any], ...] = (*_SEQUENCES, dict, range)
_current: ContextVar[Budget | None] = ContextVar("template_budget", default=None)


class TemplateLimitError(TemplateError):
    """A template asked for more work, text or time than it may have."""


class Budget:
    """What is left for one rendering.

    Args:
        input_bytes: size of its messages and variables, as ``size_of`` counts it.
    """

    def __init__(self, input_bytes: int) -> None:
        self._work = WORK + WORK_PER_BYTE * input_bytes
        self._output = OUTPUT + OUTPUT_PER_BYTE * input_bytes
        self._deadline = time.monotonic() + DEADLINE_S

    @property
    def left(self) -> int:
        """Bytes of work that are left."""
        return self._work

    def spend(self, cost: int) -> None:
        """Pay for work before it is done; raises ``TemplateLimitError``."""
        self._work -= cost
        if self._work < 0:
            raise TemplateLimitError(
                "it computes more than a chat template may: see the limits in the guide on running"
            )
        if time.monotonic() > self._deadline:
            raise TemplateLimitError(f"it ran for more than {DEADLINE_S:.0f} s")

    def write(self, characters: int) -> None:
        """Pay for text of the result; raises ``TemplateLimitError``."""
        self._output -= characters
        if self._output < 0:
            raise TemplateLimitError("it writes a longer text than a chat template may")


@contextmanager
def limited(budget: Budget) -> Iterator[None]:
    """Count what templates of this thread do against ``budget``."""
    token = _current.set(budget)
    try:
        yield
    finally:
        _current.reset(token)


def current() -> Budget:
    """The budget of the rendering in progress; outside of one, a small budget of its own."""
    return _current.get() or Budget(0)


def charge(cost: int) -> bool:
    """Pay for a step; always true, so that it fits into a condition."""
    current().spend(cost)
    return True


def size_of(value: Any, most: int) -> int:
    """Size of a value with all its parts, in bytes; may stop counting above ``most``.

    A part counts as often as it occurs, as every operation that reads the whole value visits it so often.
    """
    total, waiting = 0, [value]
    while waiting and total <= most:
        item = waiting.pop()
        total += shallow_size(item)
        if isinstance(item, dict):
            waiting.extend(item)
            waiting.extend(item.values())
        elif isinstance(item, _SEQUENCES):
            waiting.extend(item)
    return total


def shallow_size(value: Any) -> int:
    """Size of a value in bytes without the parts of its elements."""
    if isinstance(value, str):
        return value.__sizeof__()
    if isinstance(value, _SIZED):
        return ELEMENT_COST * (1 + len(value))
    return ELEMENT_COST + value.bit_length() // 8 if isinstance(value, int) else ELEMENT_COST


def measured(value: Any) -> Any:
    """The same value, after paying for its whole size."""
    budget = current()
    budget.spend(size_of(value, budget.left))
    return value


def glanced(value: Any) -> Any:
    """The same value, after paying for its size without the parts of its elements."""
    current().spend(shallow_size(value))
    return value


def counted(values: Iterable[Any]) -> Iterator[Any]:
    """The same values, each paid for when it is reached."""
    budget = current()
    for value in values:
        budget.spend(2 * ELEMENT_COST)  # most are made by a call for each
        yield value


def bounded_integer(value: Any) -> Any:
    """The same value; raises ``TemplateLimitError`` for an integer that is too long."""
    if isinstance(value, int) and value.bit_length() > _INTEGER_BITS:
        raise TemplateLimitError(f"a number has {value.bit_length()} bits, expected at most {_INTEGER_BITS}")
    return value


def power_bits(base: Any, exponent: Any) -> None:
    """Check the length of ``base ** exponent`` before it is computed; raises ``TemplateLimitError``."""
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * abs(exponent) > 2 * _INTEGER_BITS:
        raise TemplateLimitError(f"a power of {exponent} is too long a number")
