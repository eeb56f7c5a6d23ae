"""The byte-level response cases, and how what a client saw of one is judged: over sockets and in the simulation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rawclient import Client, Response

__all__ = ["AFTER", "CASES", "judge"]

CASES: list[dict[str, Any]] = json.loads((Path(__file__).parent.parent / "cases/http_upstream_cases.json").read_text())
AFTER = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nafter"


def judge(check: dict[str, Any], response: Response, client: Client) -> None:
    """What the client saw."""
    assert response.status in check["status"]
    if response.status >= 500:
        assert response.error["type"] == "upstream_error"
        assert response.header("x-should-retry") in ("true", "false")
        assert response.complete
    else:
        if check["body"] is not None:
            assert response.body == check["body"].encode("latin-1")
        if check["body_prefix"] is not None:
            assert response.body.startswith(check["body_prefix"].encode("latin-1"))
        if check["complete"] is not None:
            assert response.complete == check["complete"]
            assert not check["complete"] or response.ended_by != "reset"
    for name in check["absent"]:
        name, _, status = name.partition("?")
        assert (status and int(status) != response.status) or response.header(name) is None, name
    for name in check["present"]:
        assert response.header(name) is not None
    for name, value in check["equals"].items():
        assert response.header(name) == value
    for name, count in check.get("count", {}).items():
        assert len(response.all(name)) == count
    seen = bytes(client.seen).decode("latin-1").lower()
    for text in ("poison", *check.get("never_bytes", []), *check.get("no_bytes", [])):
        assert text.lower() not in seen
    if check.get("no_space_colon"):
        assert " :" not in response.raw_head.decode("latin-1")
    if check["informational"] is not None:
        assert [head.status for head in response.informational] == check["informational"]
