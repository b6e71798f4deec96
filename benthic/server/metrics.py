"""/metrics: what Prometheus asks for. Names are vLLM's where the meaning is the same, so that its dashboards work here;
others begin with `benthic:`.

Counting is a few additions per token; the families are made when somebody asks. Every value of every label is known
before the first request, so no client can make new ones.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from fastapi.responses import PlainTextResponse
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from benthic.server.queue import Queue
from benthic.server.route import WITHOUT_BODY, Route, described
from benthic.server.stream import Ticket

FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10, 40, 80)
WHOLE = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
LENGTHS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000)
REASONS = ("stop", "length", "abort", "error")
OTHER = "other"  # every path that is no route
TEXT = "text/plain; version=0.0.4; charset=utf-8"


class Histogram:
    """Counts by upper bound, and a sum."""

    def __init__(self, bounds: Sequence[float]):
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def buckets(self) -> list[tuple[str, float]]:
        """As Prometheus has them: each holds those before it."""
        total, out = 0, []
        for bound, count in zip((*map(float, self.bounds), "+Inf"), self.counts):
            total += count
            out.append((str(bound), float(total)))
        return out


class Metrics:
    """The counts of one server; without `engine` nothing on pages and drafts. The engine's thread writes meanwhile, but
    each of its values is read at once."""

    def __init__(self, model: str, turns: Queue[Ticket], engine: Any = None):
        self._labels = {"model_name": model, "engine": "0"}
        self._turns, self._engine = turns, engine
        self._paths: frozenset[str] = frozenset()
        self.prompt_tokens = self.cached_tokens = self.generated_tokens = 0
        self.reasons = dict.fromkeys(REASONS, 0)
        self.answered: Counter[tuple[str, str]] = Counter()  # by route and status
        self.first, self.between, self.per_token = Histogram(FIRST), Histogram(BETWEEN), Histogram(BETWEEN)
        self.whole, self.queued, self.running = Histogram(WHOLE), Histogram(WHOLE), Histogram(WHOLE)
        self.prompts, self.answers = Histogram(LENGTHS), Histogram(LENGTHS)
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)  # type: ignore[arg-type]

    def know(self, paths: Iterable[str]) -> None:
        """The server's routes."""
        self._paths = frozenset(paths)

    # What the worker and the log tell

    def arrived(self, ticket: Ticket, tokens: int, now: float) -> None:
        """Tokens of a request, before its own count of them changes."""
        if not ticket.count:
            self.prompt_tokens += ticket.tokens
            self.cached_tokens += ticket.cached
            self.first.add(now - ticket.stream.opened)
        else:
            self.between.add(now - ticket.last)
        self.generated_tokens += tokens

    def ended(self, ticket: Ticket, now: float) -> None:
        """A request has ended, for `ticket.reason`."""
        self.reasons[ticket.reason if ticket.reason in self.reasons else "error"] += 1
        if ticket.reason not in ("stop", "length"):
            return
        self.whole.add(now - ticket.stream.opened)
        self.queued.add(ticket.begun - ticket.came)
        self.running.add(now - ticket.begun)
        self.prompts.add(ticket.tokens)
        self.answers.add(ticket.count)
        if ticket.count > 1:
            self.per_token.add((ticket.last - ticket.first) / (ticket.count - 1))

    def replied(self, path: str, status: int) -> None:
        """An HTTP request was answered."""
        self.answered[path if path in self._paths else OTHER, str(status)] += 1

    # For Prometheus

    def text(self) -> bytes:
        """The page."""
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        """All families, as they stand now."""
        yield self._gauge("vllm:num_requests_running", "Requests in the engine", self._turns.running)
        yield self._gauge("vllm:num_requests_waiting", "Requests that wait for their turn", self._turns.waiting)
        yield self._gauge("benthic:queued_prompt_tokens", "Prompt tokens of waiting requests", self._turns.tokens)
        yield self._counter("vllm:prefix_cache_queries", "Prompt tokens looked up in the cache", self.prompt_tokens)
        yield self._counter("vllm:prefix_cache_hits", "Prompt tokens found in the cache", self.cached_tokens)
        yield self._counter("vllm:prompt_tokens", "Prompt tokens", self.prompt_tokens)
        yield self._counter("vllm:prompt_tokens_cached", "Prompt tokens found in the cache", self.cached_tokens)
        yield self._counter("vllm:generation_tokens", "Tokens of answers", self.generated_tokens)
        yield self._split("vllm:request_success", "Requests that ended", ("finished_reason",), {
            (reason,): count for reason, count in self.reasons.items()
        })  # fmt: skip
        yield self._split("benthic:http_requests", "HTTP requests answered", ("route", "status"), self.answered)
        for name, meaning, histogram in (
            ("vllm:time_to_first_token_seconds", "From a request to its first token", self.first),
            ("vllm:inter_token_latency_seconds", "Between two steps that brought a request tokens", self.between),
            ("vllm:request_time_per_output_token_seconds", "Mean time between an answer's tokens", self.per_token),
            ("vllm:e2e_request_latency_seconds", "From a request to its last token", self.whole),
            ("vllm:request_queue_time_seconds", "Waiting for a turn", self.queued),
            ("vllm:request_inference_time_seconds", "In the engine", self.running),
            ("vllm:request_prompt_tokens", "Prompt tokens of a request", self.prompts),
            ("vllm:request_generation_tokens", "Tokens of an answer", self.answers),
        ):
            family = HistogramMetricFamily(name, meaning, labels=list(self._labels))
            family.add_metric(list(self._labels.values()), histogram.buckets(), histogram.sum)
            yield family
        if self._engine is not None:
            yield from self._of_engine(self._engine)

    def _of_engine(self, engine: Any) -> Iterator[Metric]:
        pool, stats = engine.scheduler.pool, engine.stats
        used = 1 - len(pool.free) / pool.num_pages
        yield self._gauge("vllm:kv_cache_usage_perc", "Share of cache pages that running requests hold", used)
        yield self._counter("vllm:num_preemptions", "Requests that stepped back for others", stats.preemptions)
        yield self._counter("benthic:engine_steps", "Steps of the engine", stats.steps)
        drafts = stats.drafted_at[0] if stats.drafted_at else 0
        yield self._counter("vllm:spec_decode_num_drafts", "Rows that had drafts", drafts)
        yield self._counter("vllm:spec_decode_num_draft_tokens", "Tokens drafted", stats.drafted)
        yield self._counter("vllm:spec_decode_num_accepted_tokens", "Drafts that were right", stats.accepted)
        yield self._split(
            "vllm:spec_decode_num_accepted_tokens_per_pos", "Drafts that were right, by place", ("position",),
            {(str(place),): count for place, count in enumerate(list(stats.accepted_at))},
        )  # fmt: skip

    def _gauge(self, name: str, meaning: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, meaning, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _counter(self, name: str, meaning: str, value: float) -> Metric:
        return self._split(name, meaning, (), {(): value})

    def _split(self, name: str, meaning: str, more: tuple[str, ...], values: Mapping[Any, float]) -> Metric:
        family = CounterMetricFamily(name, meaning, labels=[*self._labels, *more])
        for labels, value in values.items():
            family.add_metric([*self._labels.values(), *labels], value)
        return family


def routes(metrics: Metrics) -> list[Route]:
    """GET /metrics."""

    async def page() -> PlainTextResponse:
        """Counts and times, in Prometheus' format."""
        return PlainTextResponse(metrics.text(), media_type=TEXT)

    return [
        Route(
            "/metrics", page, read=None, methods=["GET"], summary="Counts and times, in Prometheus' format",
            response_class=PlainTextResponse, responses=described(WITHOUT_BODY),
        )
    ]  # fmt: skip
