"""Metrics in Prometheus' text format, collected at each scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from server.engine.engine import Engine
from server.engine.metrics import EngineMeasurements
from server.latencies import Latencies
from server.service.service import Service
from server.service.stream_counts import FRAME_OUTCOMES
from server.service.streams import Streams

if TYPE_CHECKING:
    # Its dependencies are optional.
    from server.jobs.jobs import Jobs

__all__ = ["exposition"]

ROW_BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def exposition(
    service: Service, streams: Streams, jobs: Callable[[], Jobs | None]
) -> Callable[[], bytes]:
    """Return a function that renders the metrics of a server as text, from a separate registry.

    Args:
        service: service that makes pictures.
        streams: live streams.
        jobs: function that returns the durable jobs, or None without them.
    """
    registry = CollectorRegistry()
    registry.register(_Gathered(service, streams, jobs))
    return lambda: generate_latest(registry)


class _Gathered(Collector):
    """A collector that turns the counters of a server's parts into metric families."""

    def __init__(self, service: Service, streams: Streams, jobs: Callable[[], Jobs | None]) -> None:
        self._service = service
        self._streams = streams
        self._jobs = jobs

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        service = self._service
        yield GaugeMetricFamily(
            "weft_ready", "1 if the server accepts requests.", float(service.ready)
        )
        yield _labeled("weft_requests", "Requests by outcome.", "outcome", dict(service.outcomes))
        yield from _live(self._streams)
        if (jobs := self._jobs()) is not None:
            yield from _stored_jobs(jobs)
        if service.engine is not None:
            yield from _engine(service.engine.measurements)
            yield _tick_costs(service.engine)
            yield _model_memory(service)
            yield from _clients(service.engine)


def _live(streams: Streams) -> Iterable[Metric]:
    counts = streams.counts
    yield GaugeMetricFamily("weft_streams_open", "Live streams open now.", float(len(streams)))
    yield CounterMetricFamily("weft_streams", "Live streams opened.", float(counts.opened))
    outcomes = {name: counts.frames[name] for name in FRAME_OUTCOMES}
    yield _labeled("weft_stream_frames", "Frames of live streams.", "outcome", outcomes)
    yield HistogramMetricFamily(
        "weft_stream_latency_seconds",
        "Seconds from the arrival of an input frame to its encoded output.",
        buckets=_buckets(counts.latencies),
        sum_value=counts.latencies.total_s,
    )


def _stored_jobs(jobs: Jobs) -> Iterable[Metric]:
    yield GaugeMetricFamily(
        "weft_jobs_reachable",
        "1 if the database of durable jobs answered its last transaction.",
        float(jobs.reachable),
    )
    yield HistogramMetricFamily(
        "weft_jobs_transaction_seconds",
        "Seconds of the transactions of durable jobs, failed ones included.",
        buckets=_buckets(jobs.transaction_seconds),
        sum_value=jobs.transaction_seconds.total_s,
    )
    if not jobs.reachable:
        return
    family = GaugeMetricFamily("weft_jobs", "Stored durable jobs by status.", labels=["status"])
    for status, count in jobs.counts.items():
        family.add_metric([status], float(count))
    yield family


def _engine(counted: EngineMeasurements) -> Iterable[Metric]:
    yield GaugeMetricFamily(
        "weft_queue_images", "Images queued or running.", float(counted.pending)
    )
    yield GaugeMetricFamily(
        "weft_row_budget",
        "Maximum rows in one forward pass of the denoiser.",
        float(counted.row_budget),
    )
    seconds = {
        "denoise": counted.denoise_s,
        "weave": counted.weave_s,
        "decode": counted.decode_s,
        "encode": counted.encode_s,
    }
    yield _labeled("weft_engine_seconds", "Seconds the engine spent, by stage.", "stage", seconds)
    images = {
        "finished": counted.images,
        "failed": counted.failed,
        "cancelled": counted.cancelled,
        "refused": counted.refused,
    }
    yield _labeled("weft_images", "Images by outcome.", "outcome", images)
    yield from _latencies(counted)
    yield CounterMetricFamily(
        "weft_evaluations", "Denoiser rows evaluated.", float(counted.evaluations)
    )
    yield _labeled(
        "weft_evaluations_saved",
        "Denoiser rows skipped, by the guidance policy or step cache that did so.",
        "policy",
        dict(counted.saved),
    )
    yield _rows(dict(counted.rows_per_tick))


def _tick_costs(engine: Engine) -> Metric:
    """The cost estimates by which the engine chooses the rows of a tick."""
    family = GaugeMetricFamily(
        "weft_tick_seconds_estimate",
        "Estimated seconds of one tick, by its rows and the size of the latents.",
        labels=["model", "latent", "rows"],
    )
    for model, (_, height, width), cost in engine.tick_costs():
        for rows, seconds in cost.estimates().items():
            family.add_metric([model, f"{width}x{height}", str(rows)], seconds)
    return family


def _clients(engine: Engine) -> Iterable[Metric]:
    """Waiting work and used device time by the name of the API key; cardinality is that of keys."""
    waiting = engine.waiting()
    for name, documentation, values in (
        (
            "weft_waiting_images",
            "Images queued or running, except frames of live streams, by API key.",
            {client: float(amounts.images) for client, amounts in waiting.items()},
        ),
        (
            "weft_waiting_device_seconds",
            "Device seconds that these images still need, as estimated.",
            {client: amounts.seconds for client, amounts in waiting.items()},
        ),
        (
            "weft_waiting_bytes",
            "Bytes of memory that these images need, as estimated.",
            {client: float(amounts.nbytes) for client, amounts in waiting.items()},
        ),
    ):
        family = GaugeMetricFamily(name, documentation, labels=["key"])
        for client, value in values.items():
            family.add_metric([client.name], value)
        yield family
    yield _labeled(
        "weft_device_seconds",
        "Device seconds that images used, except frames of live streams.",
        "key",
        {client.name: seconds for client, seconds in engine.spent().items()},
    )


def _model_memory(service: Service) -> Metric:
    family = GaugeMetricFamily(
        "weft_model_memory_bytes", "Memory of the weights of each loaded model.", labels=["model"]
    )
    for name, nbytes in service.ready_shelf().bytes_loaded().items():
        family.add_metric([name], float(nbytes))
    return family


def _latencies(counted: EngineMeasurements) -> Iterable[Metric]:
    whole = HistogramMetricFamily(
        "weft_image_seconds",
        "Seconds from submission of an image to its pixels, by priority.",
        labels=["priority"],
    )
    for priority, latencies in counted.latencies.items():
        whole.add_metric([priority.name.lower()], _buckets(latencies), latencies.total_s)
    yield whole
    parts = HistogramMetricFamily(
        "weft_image_stage_seconds",
        "Seconds that images spent waiting, being denoised and being decoded, by priority.",
        labels=["stage", "priority"],
    )
    for (priority, stage), latencies in counted.stages.items():
        parts.add_metric([stage, priority.name.lower()], _buckets(latencies), latencies.total_s)
    yield parts


def _buckets(latencies: Latencies) -> list[tuple[str, float]]:
    bounds = [*(str(float(bound)) for bound in latencies.bounds), "+Inf"]
    return list(zip(bounds, map(float, accumulate(latencies.counts)), strict=True))


def _rows(ticks: Mapping[int, int]) -> Metric:
    """Histogram of the rows in each tick."""
    buckets = [
        (str(float(most)), float(sum(count for rows, count in ticks.items() if rows <= most)))
        for most in ROW_BUCKETS
    ]
    buckets.append(("+Inf", float(sum(ticks.values()))))
    total = float(sum(rows * count for rows, count in ticks.items()))
    return HistogramMetricFamily(
        "weft_tick_rows",
        "Denoiser rows in one tick (one forward pass).",
        buckets=buckets,
        sum_value=total,
    )


def _labeled(
    name: str, documentation: str, label: str, values: Mapping[str, float]
) -> CounterMetricFamily:
    family = CounterMetricFamily(name, documentation, labels=[label])
    for value, count in values.items():
        family.add_metric([value], float(count))
    return family
