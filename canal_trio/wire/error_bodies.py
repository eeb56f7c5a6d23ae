"""Errors in OpenAI's shapes: the JSON body of an answer, and the event inside a stream (design, section 6).

All four keys of the error object are always there (gateways.md D1). On the Responses API the event is named and flat.
"""

from __future__ import annotations

import json

__all__ = ["error_body", "error_event", "event_of_error"]


def error_body(message: str, type_: str, code: str | None, param: str | None = None) -> bytes:
    """`{"error": {message, type, param, code}}`, ASCII."""
    return _json({"error": {"message": message, "type": type_, "param": param, "code": code}})


def error_event(message: str, type_: str, code: str | None, *, responses_api: bool) -> bytes:
    """One whole event that tells a client of an event stream why it ends."""
    if not responses_api:
        return b"data: " + error_body(message, type_, code) + b"\n\n"
    flat = {"type": "error", "code": code, "message": message, "param": None, "sequence_number": 0}
    return b"event: error\ndata: " + _json(flat) + b"\n\n"


def event_of_error(body: bytes, *, responses_api: bool) -> bytes | None:
    """The error in an upstream's JSON `body` as one event of a stream; None if there is none in its usual shape."""
    try:
        raw = json.loads(body)
    except (ValueError, RecursionError):
        return None
    error = raw.get("error") if isinstance(raw, dict) else None
    if not isinstance(error, dict):
        return None
    if not responses_api:
        return b"data: " + _json({"error": error}) + b"\n\n"
    flat = {"type": "error", "code": error.get("code"), "message": error.get("message"), "param": error.get("param")}
    return b"event: error\ndata: " + _json({**flat, "sequence_number": 0}) + b"\n\n"


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode("ascii")
