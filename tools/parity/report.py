"""The report of a parity run: checks with measured value and limit, for people and for machines."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        name: such as ``adapter/topics/vocabulary``.
        passed: whether it holds.
        measured: the measured value.
        limit: the largest value that passes; of a negative control (``control/...``) the value to exceed.
        detail: the worst case, and the meaning of the numbers.
    """

    name: str
    passed: bool
    measured: float
    limit: float
    detail: str


def at_most(name: str, measured: float, limit: float, detail: str) -> Check:
    """A check that passes up to and including ``limit``; NaN fails."""
    return Check(name, bool(measured <= limit), float(measured), float(limit), detail)


def more_than(name: str, measured: float, limit: float, detail: str) -> Check:
    """A negative control: passes above ``limit``; NaN fails."""
    return Check(name, bool(measured > limit), float(measured), float(limit), detail)


@dataclass
class Report:
    """All checks of one deployment.

    Attributes:
        checks: in the order in which they were made.
        receipt: the record that nothing was rebuilt.
        cost: the cost of quantising (``adalink.tools.parity.checks.quantization.measure_cost``).
        skipped: checks that could not be made, each with its reason.
    """

    checks: list[Check] = field(default_factory=list)
    receipt: dict[str, object] = field(default_factory=dict)
    cost: dict[str, dict[str, float]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether there are checks and all of them passed."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    def as_json(self, environment: Mapping[str, object]) -> dict[str, object]:
        """The report as JSON values; numbers that are not finite become ``null``."""
        return {
            "passed": self.passed,
            "checks": [
                {**asdict(check), "measured": _finite(check.measured), "limit": _finite(check.limit)}
                for check in self.checks
            ],
            "skipped": self.skipped,
            "receipt": self.receipt,
            "cost": {name: {side: _finite(value) for side, value in row.items()} for name, row in self.cost.items()},
            "environment": dict(environment),
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
