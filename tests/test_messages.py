"""Heads and fields: looked up in lower case, kept as their sender wrote them."""

from __future__ import annotations

from canal_trio.messages import End, Headers, RequestHead, ResponseHead

FIELDS = [(b"Via", b"1.1 a"), (b"X-Other", b""), (b"via", b"1.1 b, , 1.0 C\t"), (b"Empty", b" , ")]


def test_fields_keep_their_order_and_casing():
    """Iterating gives what was put in; `lowered` gives the lower-case name beside it."""
    headers = Headers(FIELDS)
    assert list(headers) == FIELDS
    assert len(headers) == 4
    assert next(headers.lowered()) == (b"Via", b"via", b"1.1 a")
    assert "X-Other" in repr(headers)


def test_fields_are_looked_up_in_lower_case():
    """The first value, all values, or what the caller wants instead of none."""
    headers = Headers(FIELDS)
    assert b"via" in headers
    assert b"Via" not in headers
    assert headers.get(b"via") == b"1.1 a"
    assert headers.get(b"x-other") == b""
    assert headers.get(b"absent") is None
    assert headers.get(b"absent", b"default") == b"default"
    assert headers.get_all(b"via") == [b"1.1 a", b"1.1 b, , 1.0 C\t"]
    assert headers.get_all(b"absent") == []


def test_members_of_a_list_come_from_all_its_lines():
    """Lower-cased, stripped, empty ones dropped."""
    headers = Headers(FIELDS)
    assert headers.tokens(b"via") == [b"1.1 a", b"1.1 b", b"1.0 c"]
    assert headers.tokens(b"empty") == []
    assert headers.tokens(b"absent") == []


def test_fields_are_values():
    """Equal fields in equal order and casing are equal, hash alike, and are equal to nothing else."""
    assert Headers(FIELDS) == Headers(FIELDS)
    assert hash(Headers(FIELDS)) == hash(Headers(FIELDS))
    assert Headers(FIELDS) != Headers(reversed(FIELDS))
    assert Headers([(b"A", b"")]) != Headers([(b"a", b"")])
    assert Headers(FIELDS) != FIELDS
    assert End() == End(Headers())
    assert RequestHead(b"GET", b"/") == RequestHead(b"GET", b"/", Headers(), b"1.1")


def test_which_heads_are_informational():
    """Those with a 1xx status, after which another head follows."""
    assert ResponseHead(100).informational
    assert ResponseHead(199).informational
    assert not ResponseHead(200).informational
