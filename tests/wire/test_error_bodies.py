"""Errors in OpenAI's shapes."""

from __future__ import annotations

import json

from canal_trio.wire.error_bodies import error_body, error_event
from canal_trio.wire.sse import EventParser, EventScanner


def test_an_error_body_has_all_four_keys() -> None:
    """`message`, `type`, `param` and `code`, whatever characters they hold."""
    body = error_body('é "x"\n', "invalid_request_error", None, "model")
    assert body.isascii()
    error = {"message": 'é "x"\n', "type": "invalid_request_error", "param": "model", "code": None}
    assert json.loads(body) == {"error": error}


def test_an_error_event_is_one_event_that_our_scanner_knows() -> None:
    """Unnamed with an error object on most APIs, named and flat on the Responses API; one line of data either way."""
    for responses_api in (False, True):
        data = error_event("a\nb", "upstream_error", "cut", responses_api=responses_api)
        (event,) = EventParser().feed(data)
        scanner = EventScanner()
        scanner.feed(data)
        assert (scanner.events, scanner.error, scanner.terminal, scanner.at_boundary) == (1, True, False, True)
        content = json.loads(event.data)
        if responses_api:
            assert event.event == "error"
            assert (content["type"], content["message"], content["code"], content["param"]) == (
                "error",
                "a\nb",
                "cut",
                None,
            )
        else:
            assert event.event == "message"
            assert content == json.loads(error_body("a\nb", "upstream_error", "cut"))
