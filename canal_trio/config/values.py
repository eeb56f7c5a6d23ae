"""The small languages inside values: addresses, durations, sizes, networks, hashes, proxies, names.

Each function takes what a person wrote and returns the value, or raises `ValueError` with what was expected and what
was there. None of them knows where it was written. A secret is never repeated in a message.
"""

from __future__ import annotations

import difflib
import ipaddress
import math
import os
import re
from collections.abc import Iterable
from urllib.parse import urlsplit

__all__ = [
    "address",
    "check_path",
    "count",
    "duration",
    "listed",
    "name",
    "nearest",
    "network",
    "pattern",
    "plain",
    "proxy_url",
    "server_name",
    "sha256",
    "shown",
    "size",
    "tier",
    "token",
    "weight",
    "workers",
]

_NUMBER = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)", re.ASCII)
_SECONDS = {"": 1.0, "us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_BYTES = {"": 1, "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_MOST = 1e15
MOST_WORKERS = 256
_LABEL = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?", re.ASCII)
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", re.ASCII)  # RFC 9110 5.6.2


def shown(value: object) -> str:
    """`value` as it may be repeated in a message: quoted, controls escaped, not endless."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        text = value if len(value) <= 80 else f"{value[:79]}…"
        text = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
        return f"'{text}'"
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return "a list"
    return str(value)[:80]


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or which ones there are."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, 1, 0.6)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; there is {', '.join(names)}" if 0 < len(names) <= 20 else ""


def address(text: str) -> tuple[str, int]:
    """`HOST:PORT`, with an IPv6 address in brackets."""
    expected = "expected HOST:PORT, such as 127.0.0.1:8080 or [::1]:8080"
    host, colon, port = text.strip().rpartition(":")
    if not colon and text.strip().isdecimal():
        raise ValueError(
            f"{expected}; got {shown(text)} without a host (127.0.0.1:{text.strip()} is this machine only)"
        )
    if not colon or not port.isascii() or not port.isdigit():
        raise ValueError(f"{expected}; got {shown(text)}")
    if not host:
        raise ValueError(f"{expected}; got {shown(text)} without a host (0.0.0.0:{port} is every interface)")
    if len(port) > 5 or int(port) > 65535:
        raise ValueError(f"expected a port from 0 to 65535, got {shown(port)}")
    if host.startswith("[") and host.endswith("]"):
        try:
            return str(ipaddress.IPv6Address(host[1:-1])), int(port)
        except ValueError:
            raise ValueError(f"expected an IPv6 address in the brackets, got {shown(host)}") from None
    if ":" in host:
        raise ValueError(f"expected an IPv6 address in brackets, such as [::1]:8080; got {shown(text)}")
    if re.fullmatch(r"[0-9.]+", host):
        try:
            ipaddress.IPv4Address(host)
        except ValueError:
            raise ValueError(f"expected an IPv4 address or a name, got {shown(host)}") from None
    elif len(host) > 253 or not all(map(_LABEL.fullmatch, host.removesuffix(".").split("."))):
        raise ValueError(f"expected a host name or an address, got {shown(host)}")
    return host, int(port)


def _scaled(value: object, units: dict[str, float] | dict[str, int], what: str) -> float:
    if isinstance(value, str):
        match = _NUMBER.fullmatch(value.strip())
        if match is None or match[2] not in units:
            raise ValueError(f"expected {what}; got {shown(value)}")
        number = float(match[1]) * units[match[2]]
    elif isinstance(value, bool) or not isinstance(value, int | float) or value != value:  # NaN
        raise ValueError(f"expected {what}; got {shown(value)}")
    elif value == math.inf:
        return math.inf
    else:
        number = value
    if abs(number) > _MOST:
        raise ValueError(f"expected {what}; {shown(value)} is beyond reason")
    return number


def duration(value: object) -> float:
    """Seconds, from a number or from a text such as "30s", "5m", "250ms"."""
    return float(_scaled(value, _SECONDS, 'seconds, or a text such as "250ms", "30s", "5m", "2h"'))


def size(value: object) -> float:
    """Bytes, from a number or from a text such as "16KiB". A whole number, or infinity."""
    what = 'bytes, or a text such as "512B", "16KiB", "32MiB", "1GB"'
    number = _scaled(value, _BYTES, what)
    if math.isinf(number):
        return number
    if number != int(number):
        raise ValueError(f"expected {what}; got {shown(value)}, which is not a whole number of bytes")
    return int(number)


def network(text: str) -> str:
    """An address or a network in CIDR notation, in its usual spelling."""
    try:
        return str(ipaddress.ip_network(text.strip(), strict=False))
    except ValueError:
        raise ValueError(f"expected an address or a network such as 10.0.0.0/8, got {shown(text)}") from None


def sha256(text: str) -> str:
    """64 hexadecimal digits. The text is not repeated: it may be the key itself."""
    digits = text.strip().lower()
    if not re.fullmatch(r"[0-9a-f]{64}", digits):
        raise ValueError(
            f"expected the SHA-256 of a key, 64 hexadecimal digits; got {len(text)} characters "
            "('canal-trio keys new NAME' makes a key and its SHA-256)"
        )
    return digits


def name(text: str) -> str:
    """A name for people and for metrics: 1 to 128 printable characters without blanks at the ends."""
    if not 0 < len(text) <= 128 or not text.isprintable() or text != text.strip():
        raise ValueError(f"expected a name of 1 to 128 printable characters, got {shown(text)}")
    return text


def pattern(text: str) -> str:
    """A name in which one `*` may stand for any text."""
    if name(text).count("*") > 1:
        raise ValueError(f"expected at most one '*', got {shown(text)}")
    return text


def token(text: str) -> str:
    """A token of RFC 9110 5.6.2, as it stands in Via."""
    if not _TOKEN.fullmatch(text):
        raise ValueError(f"expected letters, digits and -._~ only, got {shown(text)}")
    return text


def proxy_url(text: str) -> str:
    """`http://HOST:PORT` or `socks5://HOST:PORT`, perhaps with a user and a password, which are not repeated."""
    expected = "expected http://HOST:PORT or socks5://HOST:PORT"
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise ValueError(f"{expected}, and this is no such URL") from None
    if parts.scheme not in ("http", "socks5"):
        raise ValueError(f"{expected}; got the scheme {shown(parts.scheme)}")
    if not host or not port or parts.path.strip("/") or parts.query or parts.fragment:
        raise ValueError(f"{expected} and nothing behind it")
    if not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError(f"{expected} in visible ASCII")
    return text


def server_name(text: str) -> str:
    """A host name that a client may ask for (SNI), perhaps with `*.` for its first label; lower case, no last dot."""
    expected = "expected a host name such as api.example.org or *.example.org"
    name = text.strip().lower().removesuffix(".")
    labels = name.removeprefix("*.").split(".")
    if not text.isascii():
        raise ValueError(f"{expected} in ASCII (xn--…), got {shown(text)}")
    if len(name) > 253 or not all(map(_LABEL.fullmatch, labels)) or (name.startswith("*.") and len(labels) < 2):
        raise ValueError(f"{expected}, got {shown(text)}")
    if labels[-1].isdigit():
        raise ValueError(f"{expected}, got {shown(text)}: an address is never asked for, it gets the default one")
    return name


def workers(value: object) -> int:
    """How many worker processes: a number, or "auto" for one per processor that this process may use."""
    if value == "auto":
        return min(MOST_WORKERS, len(os.sched_getaffinity(0)))
    text = str(value)
    if isinstance(value, bool) or not text.isascii() or not text.isdigit() or not 1 <= int(text[:9]) <= MOST_WORKERS:
        raise ValueError(f"expected 1 to {MOST_WORKERS} or 'auto', got {shown(value)}")
    return int(text)


def listed(text: str) -> list[str]:
    """The members of a list separated by commas or blanks."""
    return [part for part in re.split(r"[,\s]+", text) if part]


def count(value: object) -> float:
    """A whole number, or infinity."""
    if isinstance(value, bool) or not isinstance(value, int | float) or (value != math.inf and value != value // 1):
        raise ValueError(f"expected a whole number, got {shown(value)}")
    return value if math.isinf(value) else int(value)


def plain(value: object) -> float:
    """A number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise ValueError(f"expected a number, got {shown(value)}")
    return value


def weight(value: object) -> float:
    """An upstream's part of the load, against the others'."""
    number = plain(value)
    if number <= 0:
        raise ValueError(f"expected more than 0, got {number:g}; what is to be asked last has a higher tier")
    if number > 10**6:
        raise ValueError(f"expected at most 1000000, got {number:g}")
    return number


def tier(value: int) -> int:
    """Which upstreams are asked first: those of the lowest tier."""
    if not 0 <= value <= 1000:
        raise ValueError(f"expected 0 to 1000, got {value}")
    return value


def check_path(text: str) -> str:
    """What an active check asks for."""
    if not re.fullmatch(r"/[!-~]*", text) or "#" in text:
        raise ValueError(f"expected a path such as /health, got {shown(text)}")
    return text
