"""The small languages: what each accepts, and what it says to the rest."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from canal_trio.config import values


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:8080", ("127.0.0.1", 8080)),
        ("[::1]:0", ("::1", 0)),
        ("[2001:DB8::1]:65535", ("2001:db8::1", 65535)),
        ("localhost:80", ("localhost", 80)),
        ("a-b.example.:1", ("a-b.example.", 1)),
        (" 0.0.0.0:1 ", ("0.0.0.0", 1)),
    ],
)
def test_addresses(text: str, address: tuple[str, int]) -> None:
    """HOST:PORT with a name, an IPv4 address or an IPv6 address in brackets."""
    assert values.address(text) == address


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "expected HOST:PORT, such as 127.0.0.1:8080 or [::1]:8080; got ''"),
        ("8080", "got '8080' without a host (127.0.0.1:8080 is this machine only)"),
        (":8080", "got ':8080' without a host (0.0.0.0:8080 is every interface)"),
        ("localhost", "got 'localhost'"),
        ("localhost:", "got 'localhost:'"),
        ("localhost:http", "got 'localhost:http'"),
        ("localhost:٣", "got 'localhost:٣'"),
        ("localhost:-1", "got 'localhost:-1'"),
        ("localhost:65536", "expected a port from 0 to 65535, got '65536'"),
        ("localhost:" + "9" * 5000, "expected a port from 0 to 65535, got '999"),
        ("::1:80", "expected an IPv6 address in brackets, such as [::1]:8080; got '::1:80'"),
        ("[::g]:80", "expected an IPv6 address in the brackets, got '[::g]'"),
        ("[]:80", "expected an IPv6 address in the brackets, got '[]'"),
        ("300.1.1.1:80", "expected an IPv4 address or a name, got '300.1.1.1'"),
        ("http://127.0.0.1:80", "expected an IPv6 address in brackets"),
        ("a b:80", "expected a host name or an address, got 'a b'"),
        ("-a:80", "expected a host name or an address, got '-a'"),
        ("a..b:80", "expected a host name or an address, got 'a..b'"),
        ("a" * 300 + ":80", "expected a host name or an address"),
        ("x\x1b[31m:80", "expected a host name or an address, got 'x\\x1b[31m'"),
    ],
)
def test_bad_addresses(text: str, complaint: str) -> None:
    """A bad address is told what an address looks like."""
    with pytest.raises(ValueError) as caught:
        values.address(text)
    assert complaint in str(caught.value)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "seconds"),
    [(3, 3.0), (0.5, 0.5), ("30s", 30.0), ("5m", 300.0), ("250 ms", 0.25), ("2h", 7200.0), ("7", 7.0)],
)
def test_durations(raw: object, seconds: float) -> None:
    """Seconds, or a number with a unit."""
    assert values.duration(raw) == seconds


@pytest.mark.parametrize(
    ("raw", "count"), [(3, 3), ("16KiB", 16384), ("1 MB", 1_000_000), ("1.5KiB", 1536), ("9", 9), (math.inf, math.inf)]
)
def test_sizes(raw: object, count: float) -> None:
    """Bytes, or a number with a unit."""
    assert values.size(raw) == count


@pytest.mark.parametrize(
    "raw", ["", "s", "30 parsecs", "1e3", "-1s", "٣s", True, None, [], {}, math.nan, 10**400, "9" * 400]
)
def test_bad_durations(raw: object) -> None:
    """Anything else is told which units there are."""
    with pytest.raises(ValueError, match="expected seconds, or a text such as"):
        values.duration(raw)


@pytest.mark.parametrize("raw", ["0.3B", 1.5, "1 KB/s", "16kib", True, math.nan, "9" * 400])
def test_bad_sizes(raw: object) -> None:
    """Anything else is told which units there are, half a byte too."""
    with pytest.raises(ValueError, match="expected bytes, or a text such as"):
        values.size(raw)


@given(st.one_of(st.text(), st.floats(), st.integers(), st.booleans(), st.none(), st.lists(st.integers())))
def test_readers_only_complain(raw: object) -> None:
    """Whatever is written, the readers return a value or raise ValueError with one bounded, printable line."""
    readers = [values.duration, values.size, values.count]
    if isinstance(raw, str):
        readers += [values.address, values.network, values.sha256, values.name, values.token, values.proxy_url]
    for reader in readers:
        try:
            reader(raw)
        except ValueError as exc:
            message = str(exc)
        else:
            continue
        assert message.isprintable()
        assert len(message) < 500


def test_networks() -> None:
    """An address or a network; host bits are cut off."""
    assert values.network("10.1.2.3/8") == "10.0.0.0/8"
    assert values.network("::1") == "::1/128"
    with pytest.raises(ValueError, match=r"expected an address or a network such as 10\.0\.0\.0/8, got '10\.0\.0/8'"):
        values.network("10.0.0/8")


def test_hashes_are_not_repeated() -> None:
    """A key that was pasted where its hash belongs does not come back in the message."""
    assert values.sha256(" " + "AB" * 32) == "ab" * 32
    with pytest.raises(ValueError, match="64 hexadecimal digits; got 20 characters") as caught:
        values.sha256("sk-very-secret-value")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://127.0.0.1:3128", "socks5://user:pass@[::1]:1080/"])
def test_proxies(url: str) -> None:
    """HTTP and SOCKS5 proxies with a host and a port, perhaps with a user."""
    assert values.proxy_url(url) == url


@pytest.mark.parametrize(
    "url",
    [
        "",
        "127.0.0.1:3128",
        "ftp://h:1",
        "http://h",
        "http://:1",
        "http://h:0",
        "http://h:99999",
        "http://h:1/path",
        "http://u:hunter2@h",
        "http://u:hunter2@[::1",
        "http://h:1?q",
        "http://h\x00:1",
        "http://ü:1",
        "http://u:hunt er2@h:1",
    ],
)
def test_bad_proxies(url: str) -> None:
    """Anything else is told what is expected, without the password that it may hold."""
    with pytest.raises(ValueError, match=r"expected http://HOST:PORT or socks5://HOST:PORT") as caught:
        values.proxy_url(url)
    assert "hunt" not in str(caught.value)


def test_names() -> None:
    """Names are for people and metrics: short and printable."""
    assert values.name("Team Ä/1") == "Team Ä/1"
    for bad in ("", " x", "x\n", "x" * 129, "\x1b"):
        with pytest.raises(ValueError, match="expected a name of 1 to 128 printable characters"):
            values.name(bad)


def test_nearest() -> None:
    """A near word is offered; where none is near, the few that there are."""
    assert values.nearest("listn", ["listen", "admin"]) == "; did you mean 'listen'?"
    assert values.nearest("zzz", ["listen", "admin"]) == "; there is admin, listen"
    assert values.nearest("zzz", []) == ""


def test_shown_is_bounded() -> None:
    """What is repeated in a message is short and cannot move the cursor."""
    assert values.shown("a" * 500) == "'" + "a" * 79 + "…'"
    assert values.shown("\x1b[2J\n") == "'\\x1b[2J\\n'"
    assert values.shown(True) == "true"
    assert values.shown({}) == "a table"


def test_lists() -> None:
    """Commas and blanks separate."""
    assert values.listed(" a, b  c,,\n") == ["a", "b", "c"]
