"""Metrics for Prometheus: load now, and counts and times by task. The base model goes by its own name."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import Metric

from adalink.runtime.generation.sequence import Generation

CONTENT_TYPE = CONTENT_TYPE_LATEST
# Names and bounds of the histograms.
FIRST, BETWEEN = "adalink_time_to_first_token_seconds", "adalink_time_between_tokens_seconds"
FIRST_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
BETWEEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """Metrics of one server, in a registry of their own; safe for several threads.

    Attributes:
        also_observe: is told each time of a histogram: its name, the task, and seconds; in the thread that generates.
    """

    def __init__(self, running: Callable[[], int], waiting: Callable[[], int], tasks: Callable[[], int], slots: int):
        """``running``, ``waiting`` and ``tasks`` give the values of now; ``slots`` is the most that decode together."""
        self.also_observe: Callable[[str, str, float], None] | None = None
        self._registry = registry = CollectorRegistry()
        for name, what, value in (
            ("adalink_requests_running", "Requests that decode now.", running),
            ("adalink_requests_waiting", "Requests that wait for a slot.", waiting),
            ("adalink_slots", "Most requests that decode together.", lambda: slots),
            ("adalink_tasks", "Tasks that can be used: adapters, beside the base model.", tasks),
        ):
            Gauge(name, what, registry=registry).set_function(value)
        by_task, both = ("task",), ("task", "outcome")
        self._generated = Counter("adalink_generated_tokens", "Tokens generated.", by_task, registry=registry)
        self._prompt = Counter("adalink_prompt_tokens", "Tokens of prompts.", by_task, registry=registry)
        self._cached = Counter(
            "adalink_cached_tokens", "Positions of prompts from the prefix cache.", by_task, registry=registry
        )
        self._requests = Counter("adalink_requests", "Requests by how they ended.", both, registry=registry)
        self._first = Histogram(
            FIRST,
            "From submission to the first token.",
            by_task,
            buckets=FIRST_BUCKETS,
            registry=registry,
        )
        self._between = Histogram(
            BETWEEN,
            "Between two tokens of a choice.",
            by_task,
            buckets=BETWEEN_BUCKETS,
            registry=registry,
        )

    @property
    def tokens(self) -> int:
        """Tokens generated since the start, those of running requests included."""
        samples = (sample for each in (self._first, self._between) for sample in next(iter(each.collect())).samples)
        return int(sum(sample.value for sample in samples if sample.name.endswith("_count")))

    def render(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterable[Metric]:
        """All metrics with their values of now."""
        return self._registry.collect()

    def count_request(self, task: str, outcome: str) -> None:
        """Count a request that has ended, by how."""
        self._requests.labels(task, outcome).inc()

    def count_prompt(self, task: str, generation: Generation) -> None:
        """Count a prompt, once for all choices."""
        self.count_prompt_tokens(task, generation.prompt_tokens)

    def count_prompt_tokens(self, task: str, tokens: int) -> None:
        """Count tokens that were read."""
        self._prompt.labels(task).inc(tokens)

    def count_choice(self, task: str, generation: Generation) -> None:
        """Count the tokens of a choice that has ended."""
        self._generated.labels(task).inc(len(generation.token_ids))
        self._cached.labels(task).inc(generation.cached_tokens)

    def stopwatch(self, task: str) -> Stopwatch:
        """Times one choice from now on."""
        return Stopwatch(self._observers(self._first, FIRST, task), self._observers(self._between, BETWEEN, task))

    def _observers(self, histogram: Histogram, name: str, task: str) -> list[Callable[[float], None]]:
        observers: list[Callable[[float], None]] = [histogram.labels(task).observe]
        if self.also_observe is not None:
            observers.append(partial(self.also_observe, name, task))
        return observers


class Stopwatch:
    """Times the tokens of one choice."""

    def __init__(self, first: list[Callable[[float], None]], between: list[Callable[[float], None]]) -> None:
        self._first, self._between = first, between
        self._last, self._has_begun = time.perf_counter(), False

    def lap(self) -> None:
        """A token has come."""
        now = time.perf_counter()
        for observe in self._between if self._has_begun else self._first:
            observe(now - self._last)
        self._last, self._has_begun = now, True
