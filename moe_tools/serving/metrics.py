"""What a server counts, as Prometheus reads it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from moe_tools.serving.limits import Turns
from moe_tools.serving.sparsity import Count, Watch

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
SHARES = tuple(share / 20 for share in range(1, 21))
LAST = 10.0
"""Seconds of which the present speed is told."""
SIZE = "moe_tools_ffn"


class Metrics:
    """The counters of one server; none is global."""

    def __init__(self, watch: Watch, turns: Turns) -> None:
        self._registry = held = CollectorRegistry()
        self._requests = Counter(
            "moe_tools_requests", "Answered requests.", ("endpoint", "status"), registry=held
        )
        self._tokens = Counter(
            "moe_tools_tokens", "Tokens of prompts and of answers.", ("kind",), registry=held
        )
        self._first = Histogram(
            "moe_tools_time_to_first_token_seconds",
            "From a request to its first token.",
            buckets=SECONDS,
            registry=held,
        )
        self._whole = Histogram(
            "moe_tools_request_seconds",
            "From a request to its end.",
            buckets=SECONDS,
            registry=held,
        )
        self._sparsity = Histogram(
            "moe_tools_request_ffn_sparsity",
            "Share of neurons off while a request ran: its own, or its batch's.",
            ("of",),
            buckets=SHARES,
            registry=held,
        )
        self._speed = Speed()
        self._gauge(
            "moe_tools_tokens_per_second",
            f"Tokens generated in the last {LAST:.0f} s, each second.",
            self._speed.now,
        )
        self._gauge("moe_tools_requests_running", "Requests that run.", lambda: turns.running)
        self._gauge("moe_tools_requests_waiting", "Requests that wait.", lambda: turns.waiting)
        held.register(_Neurons(watch))

    def _gauge(self, name: str, what: str, value: Callable[[], float]) -> None:
        Gauge(name, what, registry=self._registry).set_function(value)

    def answered(self, endpoint: str, status: int) -> None:
        """Counts a request."""
        self._requests.labels(endpoint, str(status)).inc()

    def began(self, prompt: int) -> None:
        """Counts the tokens of a prompt that is computed."""
        self._tokens.labels("prompt").inc(prompt)

    def token(self) -> None:
        """Counts a token of an answer."""
        self._tokens.labels("generated").inc()
        self._speed.count()

    def first(self, seconds: float) -> None:
        """Notes how long a first token took."""
        self._first.observe(seconds)

    def ended(self, seconds: float, counted: Count, alone: bool) -> None:
        """Notes how long a request took, and how sparse that was."""
        self._whole.observe(seconds)
        if counted.sparsity is not None:
            self._sparsity.labels("request" if alone else "batch").observe(counted.sparsity)

    def page(self) -> bytes:
        """The text of `/metrics`."""
        return generate_latest(self._registry)


class Speed:
    """Tokens of the last seconds."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._counts: deque[tuple[int, int]] = deque()
        """Tenths of a second since it began, and tokens in each."""

    def count(self) -> None:
        """One token."""
        now = self._tenth()
        if self._counts and self._counts[-1][0] == now:
            now, before = self._counts.pop()
            self._counts.append((now, before + 1))
        else:
            self._counts.append((now, 1))
        self._forget(now)

    def now(self) -> float:
        """Tokens a second."""
        self._forget(self._tenth())
        return sum(count for _, count in self._counts) / LAST

    def _tenth(self) -> int:
        return int(10 * (time.monotonic() - self._began))

    def _forget(self, now: int) -> None:
        while self._counts and self._counts[0][0] <= now - 10 * LAST:
            self._counts.popleft()


class _Neurons(Collector):
    """What a watch has counted, when somebody asks."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def collect(self) -> Iterator[Metric]:
        if not self._watch.sees:
            return
        count = self._watch.count
        neurons = CounterMetricFamily(
            f"{SIZE}_neurons", "Neurons of the passes that were looked at.", labels=["state"]
        )
        neurons.add_metric(["on"], count.on)
        neurons.add_metric(["off"], count.seen - count.on)
        yield neurons
        if count.sparsity is not None:
            yield GaugeMetricFamily(
                f"{SIZE}_sparsity", "Share of neurons off since the start.", count.sparsity
            )
