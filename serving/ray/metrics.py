"""Metrics of a replica, which Ray exports from each machine with the replica's name on them."""

from __future__ import annotations

import asyncio

from ray.serve import metrics as ray_metrics

from adalink.serving.metrics import BETWEEN, BETWEEN_BUCKETS, FIRST, FIRST_BUCKETS, Metrics

# Time between two looks at the counts.
_SECONDS = 2.0


class RayExport:
    """Passes a server's metrics on to Ray: times as they come, counts and load when ``push`` is called."""

    def __init__(self, metrics: Metrics) -> None:
        """Take the metrics of a server that has answered nothing yet."""
        self._metrics = metrics
        self._pushed: dict[tuple[str, tuple[str, ...]], float] = {}
        self._gauges: dict[str, ray_metrics.Gauge] = {}
        self._counters: dict[str, ray_metrics.Counter] = {}
        self._histograms = {
            name: ray_metrics.Histogram(name, what, list(bounds), ("task",))
            for name, what, bounds in (
                (FIRST, "From submission to the first token.", FIRST_BUCKETS),
                (BETWEEN, "Between two tokens of a choice.", BETWEEN_BUCKETS),
            )
        }
        metrics.also_observe = self._observe

    def push(self) -> None:
        """Pass on what has changed."""
        for metric in self._metrics.collect():
            for sample in metric.samples:
                tags, keys = dict(sample.labels), tuple(sample.labels)
                if metric.type == "gauge":
                    if metric.name not in self._gauges:
                        self._gauges[metric.name] = ray_metrics.Gauge(metric.name, metric.documentation, keys)
                    self._gauges[metric.name].set(sample.value, tags)
                elif metric.type == "counter" and sample.name.endswith("_total"):
                    if metric.name not in self._counters:
                        self._counters[metric.name] = ray_metrics.Counter(metric.name, metric.documentation, keys)
                    place = (metric.name, tuple(tags.values()))
                    if grown := sample.value - self._pushed.get(place, 0.0):
                        self._counters[metric.name].inc(grown, tags)
                        self._pushed[place] = sample.value

    async def keep_pushing(self) -> None:
        """Push every two seconds, until this is cancelled."""
        while True:
            self.push()
            await asyncio.sleep(_SECONDS)

    def _observe(self, name: str, task: str, seconds: float) -> None:
        self._histograms[name].observe(seconds, {"task": task})
