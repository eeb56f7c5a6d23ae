"""Any file at all: loading it ends in settings or in complaints that say where."""

from __future__ import annotations

import pathlib

from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from canal_trio.config import Flags, load
from canal_trio.errors import ConfigError

TOML_VALUES = st.sampled_from(
    [
        "1",
        "-1",
        "true",
        "inf",
        "nan",
        "''",
        "'x'",
        "[]",
        "[1]",
        "['a']",
        "{}",
        "{env='A'}",
        "{a={b=[1]}}",
        "1e999",
        "2000-01-01",
    ]
)
TABLES = st.sampled_from(
    [
        "[server]",
        "[bounds]",
        "[deadlines]",
        "[[upstream]]",
        "[[model]]",
        "[[route]]",
        "[[key]]",
        "[server.tls]",
        "[x]",
    ]
)
NAMES = st.sampled_from(
    [
        "listen",
        "admin",
        "workers",
        "log",
        "trusted_proxies",
        "pseudonym",
        "allow_anonymous",
        "tls",
        "certificate",
        "key",
        "sni",
        "name",
        "base_url",
        "api_key",
        "http2",
        "proxy",
        "ca_file",
        "retry_sent",
        "on_client_eof",
        "connections",
        "heartbeat",
        "upstreams",
        "sha256",
        "models",
        "routes",
        "path",
        "principal",
        "expires",
        "revoked",
        "key_header",
        "list_models",
        "capacity",
        "piece_bytes",
        "waiters",
        "drain",
        "connect",
    ]
)
LINES = st.one_of(TABLES, st.tuples(NAMES, TOML_VALUES).map(lambda pair: f"{pair[0]} = {pair[1]}"))


@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(LINES, max_size=12))
def test_any_file(tmp_path: pathlib.Path, lines: list[str]) -> None:
    """Whatever stands in a file, loading it gives settings or a ConfigError whose lines each name a place."""
    file = tmp_path / "canal.toml"
    file.write_text("\n".join(lines))
    try:
        load(Flags(config=str(file)), {"A": "x"})
    except ConfigError as exc:
        for line in str(exc).splitlines():
            assert line.startswith((f"{file}:", "…")), line
