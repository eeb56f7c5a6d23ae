"""Request targets and authorities: which form, which host, and where it goes at an upstream.

The target's bytes are never decoded or rewritten, only judged; what goes to the upstream is the client's target, at
most with the base URL's path in front. Dot segments, escaped ones too, never lead out of that path.
"""

from __future__ import annotations

import functools
import ipaddress
import re
import urllib.parse
from dataclasses import dataclass

from canal_trio.errors import Failure, Kind, Phase, Side
from canal_trio.messages import RequestHead

__all__ = [
    "BaseUrl",
    "deployment_in",
    "is_authority",
    "origin_form",
    "parse_base_url",
    "plain_path",
    "upstream_target",
    "wanted_model",
]

# RFC 3986 3.2.2, without the comma: no host has one, and it is how two Host values are joined into one.
_NAME = rb"(?:[A-Za-z0-9\-._~!$&'()*+;=]|%[0-9A-Fa-f]{2})+"
_AUTHORITY = re.compile(rb"(?:(?P<name>%b)|\[(?P<literal>[0-9A-Fa-f:.]+)\])(?::(?P<port>[0-9]*))?" % _NAME)
_ABSOLUTE = re.compile(rb"https?://([^/?]*)(.*)", re.IGNORECASE)
_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class BaseUrl:
    """A base URL as one gives it to an OpenAI SDK. `path` is `b""` or begins with a slash and does not end with one."""

    scheme: str
    host: str  # without brackets
    port: int
    path: bytes
    authority: bytes  # the value of Host


@functools.lru_cache(maxsize=1024)  # the same few hosts, over and over
def is_authority(value: bytes) -> bool:
    """`host[:port]` by RFC 3986 3.2.2, not empty, without user information; the port at most 65535."""
    match = _AUTHORITY.fullmatch(value)
    if match is None:
        return False
    if match["port"] and (len(match["port"]) > 5 or int(match["port"]) > 65535):
        return False
    return match["literal"] is None or _is_ipv6(match["literal"].decode("ascii"))


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


def _refused(detail: str) -> Failure:
    return Failure(Side.CLIENT, Phase.HEAD, Kind.MALFORMED, detail)


def origin_form(head: RequestHead) -> tuple[bytes, bytes] | Failure:
    """The target in origin-form (or `*`) and the authority it is meant for, `b""` if an HTTP/1.0 client names none.

    An absolute-form target wins over Host (RFC 9112 3.2.2), but Host has to be right all the same. MALFORMED for
    anything that is neither origin-form nor absolute-form nor, with OPTIONS, `*`.
    """
    target = head.target
    hosts = head.headers.get_all(b"host")
    if len(hosts) > 1 or (not hosts and head.version != b"1.0"):
        return _refused("There must be exactly one Host.")
    if hosts and not is_authority(hosts[0]):
        return _refused("Host is not a host and port.")
    if b"#" in target or b"\\" in target:
        return _refused("The request target holds a byte that must be escaped.")
    authority = hosts[0] if hosts else b""
    if target.startswith(b"/"):
        return target, authority
    if target == b"*" and head.method == b"OPTIONS":
        return target, authority
    match = _ABSOLUTE.fullmatch(target)
    if match is None:
        return _refused("The request target is neither a path nor an http URL.")
    authority, path = match.groups()
    if not is_authority(authority):
        return _refused("The authority of the request target is not a host and port.")
    if not path and head.method == b"OPTIONS":
        return b"*", authority  # RFC 9112 3.2.4
    return (path if path.startswith(b"/") else b"/" + path), authority


def upstream_target(base_path: bytes, target: bytes) -> bytes | Failure:
    """The target to ask an upstream for whose base URL has the path `base_path` (design, section 9).

    Without a path it is unchanged. With one, `/v1/x` becomes `<base>/x`, and any other path is put behind the base as
    it is. MALFORMED if dot segments would lead out of the base.
    """
    if not base_path or target == b"*":
        return target
    path = target.partition(b"?")[0]
    rest = target[3:] if path == b"/v1" or path.startswith(b"/v1/") else target
    if _leaves(rest.partition(b"?")[0]):
        return _refused("The request target leads out of the base URL.")
    return base_path + rest


_ESCAPED = re.compile(rb"%(?:(2e)|2f|5c)", re.IGNORECASE)


def _leaves(path: bytes) -> bool:
    """Would `path` climb above its beginning, however lenient the upstream decodes it?"""
    depth = 0
    plain = _ESCAPED.sub(lambda match: b"." if match[1] else b"/", path)
    for segment in plain.split(b"/"):
        name = segment.partition(b";")[0]  # Java servers drop path parameters before they resolve dots
        if name == b"..":
            depth -= 1
            if depth < 0:
                return True
        elif name not in (b"", b"."):
            depth += 1
    return False


# No segment that some upstream would resolve or cut, and nothing escaped.
_PLAIN = re.compile(rb"(?:/(?!\.\.?(?:/|\Z))[A-Za-z0-9\-._~!$&'()*+,=:@]+)+/?|/")


def plain_path(target: bytes) -> str | None:
    """The path in an origin-form `target`; None if it is not one that every upstream reads in the same way."""
    path = target.partition(b"?")[0]
    return path.decode("ascii") if _PLAIN.fullmatch(path) else None


_DEPLOYMENT = re.compile(r"/deployments/([^/]*)", re.IGNORECASE)


def deployment_in(path: str) -> str | None:
    """The model that a path names as Azure's do (`/openai/deployments/{id}/...`), whatever its body says; None if it
    names none, `""` if not every upstream would read the same one."""
    if _PLAIN.fullmatch(path.encode("ascii")) is None:  # whoever decodes it twice, or drops a part, may see one
        text = path
        for _ in range(3):
            text = urllib.parse.unquote(text, errors="replace")
        return "" if "deployments" in text.lower() else None
    found = _DEPLOYMENT.findall(path)
    return None if not found else found[0] if len(found) == 1 else ""


def wanted_model(path: str) -> str | None:
    """The model that `/v1/models/{id}` is about, unescaped, `""` for all of them; None for any other path.

    Without `/v1` it is the same, for whoever has left that out of the base URL.
    """
    path = path.removeprefix("/v1")
    if path.rstrip("/") == "/models":
        return ""
    if not path.startswith("/models/"):
        return None
    return urllib.parse.unquote(path.removeprefix("/models/"), errors="replace")


@functools.lru_cache(maxsize=256)
def parse_base_url(url: str) -> BaseUrl | str:
    """The parts of an upstream's base URL; a `str` says what is wrong with it, for people."""
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
    except ValueError as exc:
        return f"{url!r} is not a URL: {exc}."
    complaint = _complaint(url, parts)
    if complaint is not None:
        return complaint
    host = parts.hostname or ""
    default = _PORTS[parts.scheme]
    shown = f"[{host}]" if ":" in host else host
    authority = shown if port in (None, default) else f"{shown}:{port}"
    path = parts.path.rstrip("/").encode("ascii")
    return BaseUrl(parts.scheme, host, port or default, path, authority.encode("ascii"))


def _complaint(url: str, parts: urllib.parse.SplitResult) -> str | None:
    if re.fullmatch(r"[\x21-\x7e]*", url) is None or "\\" in url:
        return f"{url!r} holds a character that a URL cannot hold."  # urlsplit would drop some of them silently
    if parts.scheme not in _PORTS:
        return f"{url!r} must begin with http:// or https://."
    if "@" in parts.netloc:
        return "A base URL must not hold a user or password; give the key as api_key."
    if parts.query or parts.fragment or url.endswith(("?", "#")):
        return f"{url!r} must not have a query or fragment."
    if not is_authority(parts.netloc.encode("ascii")) or parts.port == 0:
        return f"{url!r} does not name a host, optionally with a port."
    if _leaves(parts.path.encode("ascii")):
        return f"{url!r} has a path that leads above its own beginning."
    return None
