"""How an upstream says when to come back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from canal_trio.messages import Headers
from canal_trio.wire.hints import retry_after

NOW = 1_700_000_000.0  # Tue, 14 Nov 2023 22:13:20 GMT


@pytest.mark.parametrize(
    ("fields", "seconds"),
    [
        ([], None),
        ([(b"Retry-After", b"7")], 7.0),
        ([(b"retry-after", b"0")], 0.0),
        ([(b"retry-after", b"1.5")], 1.5),
        ([(b"retry-after-ms", b"250"), (b"retry-after", b"7")], 0.25),
        ([(b"retry-after-ms", b"soon"), (b"retry-after", b"7")], 7.0),
        ([(b"retry-after", b"Tue, 14 Nov 2023 22:13:50 GMT")], 30.0),
        ([(b"retry-after", b"Tue, 14 Nov 2023 22:00:00 GMT")], 0.0),
        ([(b"retry-after", b"-5")], None),
        ([(b"retry-after", b"inf")], None),
        ([(b"retry-after", b"nan")], None),
        ([(b"retry-after", b"\xff")], None),
        ([(b"retry-after", b"tomorrow")], None),
        ([(b"retry-after", b"9" * 30)], None),
        ([(b"retry-after", b"Tue, 14 Nov 99999 22:00:00 GMT")], None),
    ],
)
def test_what_is_said(fields: list[tuple[bytes, bytes]], seconds: float | None) -> None:
    """Milliseconds before seconds before a date; what cannot be read was not said."""
    assert retry_after(Headers(fields), NOW) == seconds


@given(st.binary(max_size=40))
def test_any_value(value: bytes) -> None:
    """Nothing is raised, and a wait is never negative."""
    said = retry_after(Headers([(b"retry-after", value)]), NOW)
    assert said is None or said >= 0
