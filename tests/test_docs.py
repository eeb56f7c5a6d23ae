"""The documents say what is true: every setting is there, links lead somewhere, the design's numbers are the code's."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from canal_trio.gateway.core import GatewayStatistics
from canal_trio.gateway.exchange import ExchangeView
from canal_trio.hooks import ExchangeRecord
from canal_trio.observe.metrics import Metrics
from canal_trio.settings import (
    Balance,
    Bounds,
    Deadlines,
    Drain,
    Health,
    Key,
    Ledger,
    Limit,
    LimitStore,
    Model,
    Price,
    Retries,
    Route,
    Target,
    Upstream,
)
from canal_trio.upstream.pool import PoolStatistics

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize(
    "record",
    [
        *(Balance, Bounds, Deadlines, Drain, Health, Ledger, Limit, LimitStore, Price),
        *(Retries, Upstream, Model, Route, Target, Key),
    ],
    ids=lambda record: record.__name__,
)
def test_every_setting_is_documented(record: type):
    """Each field of each record of settings has a place in docs/settings.md."""
    text = (ROOT / "docs" / "settings.md").read_text()
    missing = [field.name for field in dataclasses.fields(record) if not re.search(rf"\b{field.name}\b", text)]
    assert missing == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path):
    """A relative link in a document names a file that exists."""
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_every_metric_is_documented():
    """What a scrape shows of ours, a gateway's state included, has a line in docs/watching.md."""
    metrics = Metrics()
    metrics.watch(Idle())
    page = metrics.page().decode() + "# TYPE canal_connection_slots g\n# TYPE canal_log_lines_dropped g\n"
    page += "# TYPE canal_tls_handshakes_running g\n# TYPE canal_tls_handshakes_waiting g\n"
    page += "# TYPE canal_limit_store_away g\n# TYPE canal_limit_store_errors g\n"
    page += "# TYPE canal_tasks g\n"
    page += "# TYPE canal_workers g\n# TYPE canal_worker_restarts_total c\n"  # the supervisor's
    ledger = ("backlog_bytes", "rows", "refused", "interrupted", "store_errors")
    page += "".join(f"# TYPE canal_ledger_{name} g\n" for name in ledger)
    families = set(re.findall(r"^# TYPE (canal_\w+)", page, re.MULTILINE))
    families = {name for name in families if not name.endswith("_created")}
    text = (ROOT / "docs" / "watching.md").read_text()
    assert "canal_pool_dialled_total" in families
    assert {name for name in families if f"`{name}`" not in text} == set()
    assert set(re.findall(r"`(canal_\w+)`", text)) - families == set()


def test_every_field_of_the_log_and_of_streams_is_documented():
    """docs/watching.md names them all."""
    text = (ROOT / "docs" / "watching.md").read_text()
    names = {*ExchangeRecord._fields, *(field.name for field in dataclasses.fields(ExchangeView))}
    assert {name for name in names - {"started_at"} if f"`{name}`" not in text} == set()


class Idle:
    """A gateway that does nothing, with one pool."""

    draining = False

    def ready(self) -> bool:
        """Yes."""
        return True

    def exchanges(self) -> list[object]:
        """None."""
        return []

    def statistics(self) -> GatewayStatistics:
        """Noughts."""
        return GatewayStatistics(0, 0, 0, {"a": PoolStatistics(*[0] * len(dataclasses.fields(PoolStatistics)))})
