"""How upstreams stand, as metric families: read from the gateway's statistics during a scrape, nothing in between.

A state is a gauge per state, 1 for the present one: several workers add up to how many of them see it so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

__all__ = ["STATES", "UpstreamNumbers", "standings"]

STATES = ("usable", "set_aside", "trial", "ejected", "down")


class UpstreamNumbers(Protocol):
    """How an upstream stands now."""

    @property
    def state(self) -> str:
        """One of `STATES`."""

    @property
    def in_flight(self) -> int:
        """Attempts."""

    @property
    def first_token(self) -> float:
        """Seconds, 0 where it is not measured."""

    @property
    def ejections(self) -> int:
        """Ever."""

    @property
    def retries(self) -> int:
        """Attempts here because another upstream had failed, ever."""


def standings(upstreams: Mapping[str, UpstreamNumbers], refused: int) -> Iterator[Metric]:
    """The families of now. `refused`: retries that there was no budget for."""
    label = ["upstream"]
    state = GaugeMetricFamily("canal_upstream_state", "1 for how it stands now.", labels=["upstream", "state"])
    in_flight = GaugeMetricFamily("canal_upstream_attempts_in_flight", "Attempts at it now.", labels=label)
    token = GaugeMetricFamily(
        "canal_upstream_first_token_seconds", "Expected time to the first token, where it is measured.", labels=label
    )
    ejections = CounterMetricFamily("canal_upstream_ejections", "Times it was ejected.", labels=label)
    retries = CounterMetricFamily("canal_retries", "Attempts at it because another one had failed.", labels=label)
    for name, now in upstreams.items():
        for one in STATES:
            state.add_metric([name, one], float(one == now.state))
        in_flight.add_metric([name], now.in_flight)
        if now.first_token:
            token.add_metric([name], now.first_token)
        ejections.add_metric([name], now.ejections)
        retries.add_metric([name], now.retries)
    yield from (state, in_flight, token, ejections, retries)
    yield CounterMetricFamily("canal_retries_refused", "Attempts not made: the retry budget was spent.", value=refused)
