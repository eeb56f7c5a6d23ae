"""`[server.tls]`: the files have to be there, fit together and be usable, before a gateway starts or reloads."""

from __future__ import annotations

import os
from typing import Any

from canal_trio.config import values
from canal_trio.config.build import Surroundings, read
from canal_trio.config.locate import Path
from canal_trio.config.schema import Complain, NamedCertificateTable, TLSTable, decode
from canal_trio.config.values import shown
from canal_trio.settings import NamedCertificate, ServerTLS

__all__ = ["server_tls_of"]


def server_tls_of(raw: dict[str, Any], path: Path, around: Surroundings, complain: Complain) -> ServerTLS | None:
    """The table as settings; None after a complaint that leaves nothing to go on with. Reads the files."""
    table = decode(TLSTable, raw, path, complain)
    if table is None:
        return None
    certificate, key = _pair(table, path, around, complain)
    client_ca, client_auth = _clients(table, path, around, complain)
    further: list[NamedCertificate] = []
    taken: dict[str, int] = {}
    for number, inner in enumerate(table.sni):
        place: Path = (*path, "sni", number)
        one = decode(NamedCertificateTable, inner, place, complain)
        if one is not None:
            names = _names(one.names, number, (*place, "names"), taken, complain)
            further.append(NamedCertificate(names, *_pair(one, place, around, complain)))
    return ServerTLS(certificate, key, tuple(further), client_ca, client_auth)


def _clients(table: TLSTable, path: Path, around: Surroundings, complain: Complain) -> tuple[str | None, str]:
    """Whose certificates of clients are believed, and whether clients need one; with an authority they do."""
    from canal_trio.serve.tls import PairFault, load_authority  # late, as below

    auth = table.client_auth or ("none" if table.client_ca is None else "required")
    if auth not in ("none", "optional", "required"):
        complain((*path, "client_auth"), f"expected 'none', 'optional' or 'required', got {shown(auth)}")
        auth = "none"
    if table.client_ca is None:
        if auth != "none":
            text = f"{shown(auth)} needs client_ca, a file with the authority whose certificates are believed"
            complain((*path, "client_auth"), text)
        return None, "none"
    client_ca = os.path.join(around.folder, table.client_ca)
    try:
        load_authority(client_ca)
    except PairFault as exc:
        complain((*path, exc.part), str(exc))
    return client_ca, auth


def _names(raw: list[str], entry: int, path: Path, taken: dict[str, int], complain: Complain) -> tuple[str, ...]:
    if not raw:
        complain(path, "expected at least one host name, got an empty list")
    names: list[str] = []
    for number, text in enumerate(raw):
        name = read(text, values.server_name, (*path, number), complain, "")
        if name in taken:
            complain((*path, number), f"{shown(text)} is named already, in server.tls.sni[{taken[name]}]")
        elif name:
            taken[name] = entry
            names.append(name)
    return tuple(names)


def _pair(
    table: TLSTable | NamedCertificateTable, path: Path, around: Surroundings, complain: Complain
) -> tuple[str, str]:
    from canal_trio.serve.tls import PairFault, load_pair  # late: only a file with TLS needs that floor here

    certificate = os.path.join(around.folder, table.certificate)
    key = os.path.join(around.folder, table.key)
    try:
        load_pair(certificate, key)
    except PairFault as exc:
        complain((*path, exc.part), str(exc))
    return certificate, key
