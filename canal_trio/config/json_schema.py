"""A JSON Schema of the configuration file, made from the very tables that it is decoded with, for editors.

It says of which kind each value is, which keys there are and which are needed. What values mean, and whether names fit
together, only `canal-trio check` says.
"""

from __future__ import annotations

from typing import Any

import msgspec

from canal_trio.config import schema

__all__ = ["ARRAYS", "TABLES", "json_schema"]

TABLES: dict[str, type[schema.Table]] = {
    "server": schema.ServerTable,
    "bounds": schema.BoundsTable,
    "deadlines": schema.DeadlinesTable,
    "balance": schema.BalanceTable,
    "health": schema.HealthTable,
    "retries": schema.RetriesTable,
    "ledger": schema.LedgerTable,
    "limits": schema.LimitStoreTable,
}
"""`[…]`."""
ARRAYS: dict[str, type[schema.Table]] = {
    "upstream": schema.UpstreamTable,
    "model": schema.ModelTable,
    "route": schema.RouteTable,
    "key": schema.KeyTable,
    "price": schema.PriceTable,
    "limit": schema.LimitTable,
}
"""`[[…]]`."""

_SECRET = {
    "anyOf": [
        {"type": "string"},
        *(
            {
                "type": "object",
                "properties": {kind: {"type": "string"}},
                "required": [kind],
                "additionalProperties": False,
            }
            for kind in ("env", "file")
        ),
    ]
}
_CHOICES = {
    "key_header": ["authorization", "api-key", "x-api-key"],
    "on_client_eof": ["abort", "finish"],
    "log": ["text", "json"],
}


def json_schema() -> dict[str, Any]:
    """The schema, draft 2020-12."""
    kinds = [*TABLES.values(), *ARRAYS.values(), schema.TLSTable, schema.NamedCertificateTable, schema.TargetTable]
    _, components = msgspec.json.schema_components([*kinds, schema.DrainTable], ref_template="#/$defs/{name}")
    for table in components.values():
        table["description"] = table.get("description", "").strip("`.")
        for key, value in table["properties"].items():
            _mend(key, value)
    properties = {name: {"$ref": f"#/$defs/{kind.__name__}"} for name, kind in TABLES.items()}
    arrays = {name: {"type": "array", "items": {"$ref": f"#/$defs/{kind.__name__}"}} for name, kind in ARRAYS.items()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "The configuration of canal-trio",
        "type": "object",
        "properties": {**properties, **arrays},
        "additionalProperties": False,
        "$defs": components,
    }


def _mend(key: str, value: dict[str, Any]) -> None:
    """Say of a key what its kind in Python does not say; TOML has no null."""
    value.pop("default", None)
    kinds = [kind for kind in value.pop("anyOf", [value.copy()]) if kind.get("type") != "null"]
    value.clear()
    if key in ("api_key", "proxy", "postgres", "redis"):
        kinds = [_SECRET]
    elif key == "tls":
        kinds = [{"$ref": "#/$defs/TLSTable"}]
    elif key == "sni":
        kinds = [{"type": "array", "items": {"$ref": "#/$defs/NamedCertificateTable"}}]
    elif key == "on_disconnect":
        kinds = [{"enum": ["cancel", "drain"]}, {"$ref": "#/$defs/DrainTable"}]
    elif key == "upstreams":
        kinds = [{"type": "array", "items": {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/TargetTable"}]}}]
    elif key in _CHOICES:
        kinds = [{"enum": _CHOICES[key]}]
    value.update(kinds[0] if len(kinds) == 1 else {"anyOf": kinds})
