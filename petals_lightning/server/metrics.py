"""A server's figures for Prometheus, over HTTP."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from petals_lightning import __version__
from petals_lightning.errors import ConfigurationError
from petals_lightning.server.execution.compute import Priority
from petals_lightning.server.resources import ServerResources

_PREFIX = "petals_lightning_server"


class ServerMetrics(Collector):
    """Reads a server's figures whenever Prometheus asks. Nothing is counted twice or kept here.

    Args:
        serving: returns the server's resources, or None while it moves to other blocks. Figures then begin anew.
        dht_prefix: the model's name in the swarm.
    """

    def __init__(self, serving: Callable[[], ServerResources | None], dht_prefix: str):
        self._serving, self._dht_prefix = serving, dht_prefix

    def collect(self) -> Iterator[Metric]:
        resources = self._serving()
        if resources is None:
            return
        span = resources.span
        about = {
            "version": __version__,
            "model": self._dht_prefix,
            "blocks": f"{span.start}:{span.end}",
            "dtype": str(span.dtype).removeprefix("torch."),
            "quant_type": span.quant_type,
            "device": str(span.device),
        }
        yield InfoMetricFamily(_PREFIX, "The server and its blocks.", value=about)
        usage = resources.compute.usage
        by_kind: dict[str, tuple[str, Mapping[Priority, float]]] = {
            "requests": ("Requests that have run.", usage.requests),
            "queue_seconds": ("Seconds that they waited in the queue.", usage.queued),
            "compute_seconds": ("Seconds that they took.", usage.computed),
        }
        for name, (meaning, values) in by_kind.items():
            family = CounterMetricFamily(f"{_PREFIX}_{name}", meaning, labels=["kind"])
            for priority, value in values.items():
                family.add_metric([priority.name.lower()], value)
            yield family
        refused = CounterMetricFamily(f"{_PREFIX}_refusals", "Requests that were refused or failed.", labels=["code"])
        for code, count in resources.refusals.copy().items():
            refused.add_metric([code.value], count)
        yield refused
        yield CounterMetricFamily(f"{_PREFIX}_positions", "Positions of admitted requests.", value=resources.positions)
        gauges: dict[str, tuple[str, float]] = {
            "open_requests": ("Requests that are not answered yet.", resources.open_requests),
            "clients": ("Clients with anything open.", len(resources.quotas.clients)),
            "streams": ("Streams of clients.", resources.quotas.streams),
            "request_bytes": ("Memory of requests and registered adapters.", resources.quotas.num_bytes),
            "request_bytes_limit": ("The most that it may be.", resources.limits.max_total_bytes),
            "graph_bytes": ("Memory of kept autograd graphs.", resources.graphs.num_bytes),
            "graph_bytes_limit": ("The most that it may be.", resources.graphs.max_bytes),
            "cache_bytes": ("Memory reserved for sessions' keys and values.", resources.caches.num_bytes),
            "cache_bytes_limit": ("The most that it may be.", resources.caches.max_bytes),
            "sessions": ("Inference sessions.", len(resources.caches)),
            "leaving": ("1 while the server shuts down.", resources.leaving),
        }
        for name, (meaning, value) in gauges.items():
            yield GaugeMetricFamily(f"{_PREFIX}_{name}", meaning, value=value)


def serve_metrics(metrics: ServerMetrics, host: str, port: int) -> Callable[[], None]:
    """Answers `GET /metrics` from a thread of its own; returns what ends it.

    Raises:
        ConfigurationError: the address cannot be listened on.
    """
    registry = CollectorRegistry()
    registry.register(metrics)
    for process in (ProcessCollector, PlatformCollector, GCCollector):
        process(registry=registry)
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as e:
        raise ConfigurationError(
            f"metrics cannot be served on {host}:{port} ({e.strerror}): set --metrics-host and --metrics-port to an "
            "address of this machine and a free port"
        ) from e

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop
