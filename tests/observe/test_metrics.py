"""Metrics: what one exchange adds, what a scrape reads, and that labels stay bounded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from dataclasses import fields as fields_of

from prometheus_client.parser import text_string_to_metric_families
from test_log_lines import GONE, RECORD

from canal_trio import __version__
from canal_trio.gateway.balancing import UpstreamStatistics
from canal_trio.hooks import Tried, Usage, UsageSource
from canal_trio.observe.metrics import _POOL, Metrics
from canal_trio.observe.standings import STATES
from canal_trio.policy.health import State
from canal_trio.upstream.pool import PoolStatistics


@dataclass(frozen=True, slots=True)
class PoolNumbers:
    """As a pool reports itself."""

    idle: int
    used: int
    dialled: int
    novel: int = 0
    name: str = "ignored"


@dataclass(frozen=True, slots=True)
class Numbers:
    """As a gateway reports itself."""

    connections: int = 3
    in_flight: int = 2
    held_bytes: int = 77
    waiting: int = 5
    flow_bytes: int = 66
    memory_limit: float = 1e6
    upstreams: Mapping[str, UpstreamStatistics] = field(
        default_factory=lambda: {"a": UpstreamStatistics("ejected", 2, 0.5, 3, 4)}
    )
    retries_refused: int = 6
    pools: Mapping[str, object] = field(default_factory=lambda: {"a": PoolNumbers(1, 2, 8), "b": PoolNumbers(3, 4, 9)})


class Watched:
    """A gateway to look at."""

    draining = False

    def ready(self) -> bool:
        """Always."""
        return True

    def exchanges(self) -> list[object]:
        """None."""
        return []

    def statistics(self) -> Numbers:
        """Made up."""
        return Numbers()


def _scrape(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample of the page, by name and labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(metrics.page().decode())
        for sample in family.samples
    }


def _value(samples, name: str, **labels: str) -> float:
    return samples[name, tuple(sorted(labels.items()))]


def test_attempts_are_counted_where_they_were_made() -> None:
    """Those that another one followed at their own upstreams, the last one at its."""
    metrics = Metrics()
    metrics.finished(RECORD._replace(attempts=3, tried=(Tried("a", "429"), Tried("b", "refused"))))
    samples = _scrape(metrics)
    for upstream in ("a", "b", "local"):
        assert _value(samples, "canal_attempts_total", upstream=upstream) == 1


def test_how_upstreams_stand() -> None:
    """One state of each is 1; counts are counters; what was not measured is not shown."""
    metrics = Metrics()
    metrics.watch(Watched())
    samples = _scrape(metrics)
    for state in STATES:
        assert _value(samples, "canal_upstream_state", upstream="a", state=state) == float(state == "ejected")
    assert _value(samples, "canal_upstream_attempts_in_flight", upstream="a") == 2
    assert _value(samples, "canal_upstream_first_token_seconds", upstream="a") == 0.5
    assert _value(samples, "canal_upstream_ejections_total", upstream="a") == 3
    assert _value(samples, "canal_retries_total", upstream="a") == 4
    assert _value(samples, "canal_retries_refused_total") == 6
    assert set(STATES) == {state.value for state in State}


def test_one_exchange() -> None:
    """A finished stream is counted once in every family that concerns it."""
    metrics = Metrics()
    metrics.finished(RECORD)
    samples = _scrape(metrics)
    assert _value(samples, "canal_exchanges_total", outcome="completed", upstream="local", streamed="true") == 1
    assert _value(samples, "canal_responses_total", status="200") == 1
    assert _value(samples, "canal_attempts_total", upstream="local") == 1
    assert _value(samples, "canal_first_byte_seconds_sum", streamed="true") == 0.035
    assert _value(samples, "canal_exchange_duration_seconds_count", streamed="true") == 1
    assert _value(samples, "canal_event_gap_longest_seconds_sum") == 0.051
    assert _value(samples, "canal_event_gap_mean_seconds_sum") == 0.025
    assert _value(samples, "canal_cancel_latency_seconds_count") == 0
    assert _value(samples, "canal_request_bytes_total") == 512
    assert _value(samples, "canal_response_bytes_total") == 20_480
    assert _value(samples, "canal_events_total") == 42


def test_a_client_that_left() -> None:
    """A cancelled exchange shows its cancel latency, its failure and its flags."""
    metrics = Metrics()
    metrics.finished(GONE._replace(handed_over=7, queued=2, waits=3))
    samples = _scrape(metrics)
    labels = {"side": "client", "phase": "stream", "kind": "gone", "upstream": "local"}
    assert _value(samples, "canal_failures_total", **labels) == 1
    assert _value(samples, "canal_cancel_latency_seconds_sum") == 0.000082
    assert _value(samples, "canal_cancel_latency_seconds_bucket", le="0.0001") == 1
    assert _value(samples, "canal_exchange_flags_total", flag="late_body_end") == 1
    assert _value(samples, "canal_pieces_total", path="handed_over") == 7
    assert _value(samples, "canal_pieces_total", path="queued") == 2
    assert _value(samples, "canal_flow_waits_total") == 3


def test_tokens_by_where_the_number_comes_from() -> None:
    """Said and estimated tokens are never in one number."""
    metrics = Metrics()
    metrics.finished(RECORD._replace(usage=Usage(12, 34), usage_source=UsageSource.UPSTREAM))
    metrics.finished(GONE._replace(usage=Usage(1, 2), usage_source=UsageSource.ESTIMATED))
    samples = _scrape(metrics)
    said = {"source": "upstream", "upstream": "local"}
    assert _value(samples, "canal_tokens_total", type="prompt", **said) == 12
    assert _value(samples, "canal_tokens_total", type="completion", **said) == 34
    assert _value(samples, "canal_tokens_total", type="completion", source="estimated", upstream="local") == 2


def test_no_label_comes_from_a_client() -> None:
    """However many models, paths and methods clients make up, the number of series stays the same."""
    metrics = Metrics()
    metrics.finished(RECORD)
    before = len(_scrape(metrics))
    for number in range(50):
        metrics.finished(RECORD._replace(model=f"m{number}", path=f"/{number}", method=f"M{number}", request_id="x"))
    assert len(_scrape(metrics)) == before


def test_an_exchange_without_an_answer() -> None:
    """Where nothing was told to the client the status is 'none'; a stream of one event has no gap."""
    metrics = Metrics()
    metrics.finished(RECORD._replace(status=None, events=1))
    samples = _scrape(metrics)
    assert _value(samples, "canal_responses_total", status="none") == 1
    assert _value(samples, "canal_event_gap_longest_seconds_count") == 0


def test_the_state_is_read_when_asked() -> None:
    """A scrape shows the gateway's connections, exchanges, held bytes and each pool's numbers, as they are now."""
    metrics = Metrics()
    metrics.watch(Watched())
    number = 5
    metrics.gauge("canal_something", "Something.", lambda: number)
    samples = _scrape(metrics)
    assert _value(samples, "canal_connections") == 3
    assert _value(samples, "canal_exchanges_in_flight") == 2
    assert _value(samples, "canal_held_bytes") == 77
    assert _value(samples, "canal_exchanges_waiting") == 5
    assert _value(samples, "canal_flow_bytes") == 66
    assert _value(samples, "canal_memory_limit_bytes") == 1e6
    assert _value(samples, "canal_ready") == 1
    assert _value(samples, "canal_draining") == 0
    assert _value(samples, "canal_pool_idle", upstream="a") == 1
    assert _value(samples, "canal_pool_used", upstream="b") == 4
    assert _value(samples, "canal_pool_dialled_total", upstream="b") == 9
    assert _value(samples, "canal_pool_novel", upstream="a") == 0
    assert _value(samples, "canal_build_info", version=__version__) == 1
    assert _value(samples, "canal_something") == 5
    number = 6
    assert _value(_scrape(metrics), "canal_something") == 6


def test_every_number_of_a_pool_is_explained() -> None:
    """What a real pool counts has a name, a help text and a type of its own."""
    fields = {field.name for field in fields_of(PoolStatistics)}
    assert fields == set(_POOL)


def test_two_gateways_do_not_meet() -> None:
    """Each Metrics has a registry of its own."""
    first, second = Metrics(), Metrics()
    first.finished(RECORD)
    assert _value(_scrape(second), "canal_events_total") == 0
