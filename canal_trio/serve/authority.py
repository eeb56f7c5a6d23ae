"""Certificates of clients: whose are believed, and whom one names.

Pure but for the reading of one small file.
"""

from __future__ import annotations

import re
import ssl
from typing import Any

__all__ = ["AUTH", "authority_in", "subject_of"]

AUTH = {"none": ssl.CERT_NONE, "optional": ssl.CERT_OPTIONAL, "required": ssl.CERT_REQUIRED}
"""`client_auth`: are clients asked for a certificate, and must they show one? One that is shown must be good."""

_SHORT = {
    "commonName": "CN",
    "countryName": "C",
    "domainComponent": "DC",
    "localityName": "L",
    "organizationName": "O",
    "organizationalUnitName": "OU",
    "stateOrProvinceName": "ST",
    "streetAddress": "STREET",
    "userId": "UID",
}
_SPECIAL = re.compile(r'([,+"\\<>;=]|^[ #]| $)')


def authority_in(pem: bytes) -> str:
    """The certificates in a PEM file, as `ssl` takes them. Raises ValueError if there is none that can be used."""
    try:
        text = pem.decode("ascii")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_verify_locations(cadata=text)
    except (UnicodeDecodeError, ValueError, ssl.SSLError):
        raise ValueError("there are no PEM certificates in it") from None
    if not context.cert_store_stats()["x509_ca"]:
        raise ValueError("none of its certificates is an authority's")
    return text


def subject_of(certificate: dict[str, Any] | None) -> str | None:
    """Whom a certificate names, most particular first, as RFC 4514 writes it: `CN=alice,O=Example`.

    Without a subject the first alternative name, such as `DNS:alice.example`; None if there is no certificate.
    """
    if not certificate:
        return None
    parts = ["+".join(map(_attribute, relative)) for relative in reversed(certificate.get("subject", ()))]
    if parts:
        return ",".join(parts)
    for kind, value in certificate.get("subjectAltName", ()):
        return f"{kind}:{value}"
    return ""


def _attribute(pair: tuple[str, str]) -> str:
    name, value = pair
    return f"{_SHORT.get(name, name)}=" + _SPECIAL.sub(r"\\\1", value)
