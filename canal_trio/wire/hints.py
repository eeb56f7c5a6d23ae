"""What a response head says about coming back: `retry-after-ms` and `retry-after` (RFC 9110 10.2.3). Pure."""

from __future__ import annotations

import re
from email.utils import parsedate_to_datetime

from canal_trio.messages import Headers

__all__ = ["retry_after"]

_NUMBER = re.compile(rb"[0-9]{1,12}(?:\.[0-9]{1,12})?").fullmatch


def retry_after(headers: Headers, now: float) -> float | None:
    """Seconds to wait, at least 0; None if it does not say, or not so that it can be read. `now` is Unix time.

    Milliseconds win, as they do in the official SDKs.
    """
    milliseconds = headers.get(b"retry-after-ms")
    if milliseconds is not None and _NUMBER(milliseconds):
        return float(milliseconds) / 1000
    said = headers.get(b"retry-after")
    if said is None:
        return None
    if _NUMBER(said):
        return float(said)
    try:
        return max(parsedate_to_datetime(said.decode("ascii")).timestamp() - now, 0.0)
    except (ValueError, TypeError, OverflowError):  # it is no date, or one of another age
        return None
