"""Keeps a load where it may be: on loopback unless told otherwise."""

from __future__ import annotations

import ipaddress
import socket
import urllib.parse
from dataclasses import dataclass

__all__ = ["Refused", "Target", "target_of"]


class Refused(Exception):
    """A load we do not start; the text says why and what would be accepted."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where a load goes: one address, resolved once."""

    host: str
    address: str
    port: int
    tls: bool
    path: str  # what stands before `/v1/…`; no slash at the end

    @property
    def authority(self) -> str:
        """For the Host field."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def target_of(url: str, *, allow_remote: bool = False) -> Target:
    """The target that `url` names; raises `Refused` for what is none, and for one off loopback unless allowed."""
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
    except ValueError as exc:
        raise Refused(f"{url!r} is no URL: {exc}") from None
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise Refused(f"{url!r} is no target: expected http://HOST:PORT or https://HOST:PORT")
    if parts.query or parts.fragment or parts.username:
        raise Refused(f"{url!r} is no target: only scheme, host, port and a path are expected")
    port = port or (443 if parts.scheme == "https" else 80)
    try:
        found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    except OSError as exc:
        raise Refused(f"{parts.hostname} does not resolve: {exc}") from None
    addresses = {str(entry[4][0]) for entry in found}
    if not allow_remote and not all(ipaddress.ip_address(one.partition("%")[0]).is_loopback for one in addresses):
        raise Refused(f"{parts.hostname} is not on loopback: a load test may hurt; --allow-remote if it is yours")
    path = parts.path.rstrip("/").removesuffix("/v1")
    return Target(parts.hostname, str(found[0][4][0]), port, parts.scheme == "https", path)
