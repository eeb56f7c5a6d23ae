"""What a proxy does to fields, one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from canal_trio.errors import Failure, Kind
from canal_trio.messages import Headers, RequestHead, ResponseHead
from canal_trio.wire.headers import (
    ForClient,
    ForUpstream,
    client_address,
    for_client,
    for_upstream,
    is_event_stream,
    keep_alive,
    request_id,
    upgrade_of,
    wants_continue,
)

UPSTREAM = ForUpstream(
    target=b"/v1/x",
    authority=b"up.test:8000",
    client="192.0.2.7",
    client_trusted=False,
    scheme="http",
    request_id=b"req_1",
    pseudonym="canal",
)
CLIENT = ForClient(request_version=b"1.1", request_method=b"GET", request_id=b"req_1", pseudonym="canal")


def upstream(
    *fields: tuple[bytes, bytes], method: bytes = b"GET", options: ForUpstream = UPSTREAM
) -> dict[bytes, bytes]:
    """What an upstream would see of a request with these fields, by lower-case name."""
    head = RequestHead(method, b"/v1/x", Headers([(b"Host", b"gw.test"), *fields]))
    seen = for_upstream(head, options)
    assert len({lower for _, lower, _ in seen.headers.lowered()}) == len(seen.headers)
    return {lower: value for _, lower, value in seen.headers.lowered()}


def client(*fields: tuple[bytes, bytes], status: int = 200, options: ForClient = CLIENT) -> dict[bytes, bytes]:
    """What a client would see of a response with these fields, by lower-case name."""
    seen = for_client(ResponseHead(status, Headers(fields)), options)
    return {lower: value for _, lower, value in seen.headers.lowered()}


# -- questions to fields -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "connection", "kept"),
    [
        (b"1.1", [], True),
        (b"1.1", [b"CLOSE"], False),
        (b"1.1", [b"x", b"a, Close"], False),
        (b"1.0", [], False),
        (b"1.0", [b"Keep-Alive"], True),
        (b"1.0", [b"keep-alive, close"], False),
    ],
)
def test_keep_alive(version: bytes, connection: list[bytes], kept: bool) -> None:
    """Kept by default since 1.1, on request in 1.0, never with `close` on any line (RFC 9112 9.3)."""
    assert keep_alive(version, Headers((b"Connection", value) for value in connection)) is kept


def test_a_request_id_is_the_clients_if_it_is_one() -> None:
    """1 to 128 visible ASCII characters, given once; anything else is replaced by a new one."""
    assert request_id(Headers([(b"X-Request-Id", b"a-1")])) == b"a-1"
    assert request_id(Headers([(b"X-Request-Id", b"x" * 128)])) == b"x" * 128
    bad = [[b""], [b"x" * 129], [b"a b"], [b"\xe9"], [b"a", b"a"], []]
    made = {request_id(Headers((b"x-request-id", value) for value in values)) for values in bad}
    assert len(made) == len(bad)
    assert all(made_id.startswith(b"req_") and len(made_id) == 36 for made_id in made)


def test_an_event_stream_is_one_by_its_content_type() -> None:
    """Case and parameters do not matter, and a missing type is none."""
    assert is_event_stream(Headers([(b"content-type", b"Text/Event-Stream ;charset=utf-8")]))
    assert not is_event_stream(Headers([(b"content-type", b"text/event-streams")]))
    assert not is_event_stream(Headers())


ASKS = [(b"Connection", b"keep-alive, Upgrade"), (b"Upgrade", b"WebSocket")]


@pytest.mark.parametrize(
    ("method", "fields", "version", "protocol"),
    [
        (b"GET", ASKS, b"1.1", b"websocket"),
        (b"GET", [*ASKS, (b"Content-Length", b"0")], b"1.1", b"websocket"),
        (b"GET", ASKS, b"1.0", None),
        (b"POST", ASKS, b"1.1", None),
        (b"GET", ASKS[1:], b"1.1", None),
        (b"GET", [ASKS[0], (b"Upgrade", b"h2c")], b"1.1", None),
        (b"GET", [*ASKS, (b"Upgrade", b"h2c")], b"1.1", None),
        (b"GET", [*ASKS, (b"Content-Length", b"5")], b"1.1", None),
        (b"GET", [*ASKS, (b"Transfer-Encoding", b"chunked")], b"1.1", None),
    ],
)
def test_only_a_plain_websocket_upgrade_is_one(
    method: bytes, fields: list[tuple[bytes, bytes]], version: bytes, protocol: bytes | None
) -> None:
    """Anything else that asks for an upgrade is served as what it is without it."""
    assert upgrade_of(RequestHead(method, b"/", Headers(fields), version)) == protocol


@pytest.mark.parametrize(
    ("values", "version", "wanted"),
    [
        ([], b"1.1", False),
        ([b"100-Continue"], b"1.1", True),
        ([b"100-continue"], b"1.0", False),
        ([b"x"], b"1.0", False),
    ],
)
def test_continue_is_wanted(values: list[bytes], version: bytes, wanted: bool) -> None:
    """By HTTP/1.1 clients that say so; 1.0 has no expectations."""
    head = RequestHead(b"POST", b"/", Headers((b"Expect", value) for value in values), version)
    assert wants_continue(head) is wanted


@pytest.mark.parametrize("values", [[b"x"], [b"100-continue, x"], [b"100-continue", b"y"]])
def test_other_expectations_fail(values: list[bytes]) -> None:
    """What we cannot meet is said (RFC 9110 10.1.1)."""
    failure = wants_continue(RequestHead(b"POST", b"/", Headers((b"Expect", value) for value in values)))
    assert isinstance(failure, Failure)
    assert failure.kind is Kind.EXPECTATION


@pytest.mark.parametrize(
    ("lines", "address"),
    [
        ([], "10.0.0.1"),
        ([b"192.0.2.1"], "192.0.2.1"),
        ([b"198.51.100.1, 192.0.2.1, 10.0.0.2"], "192.0.2.1"),
        ([b"198.51.100.1", b"192.0.2.1:4711"], "192.0.2.1"),
        ([b"[2001:db8::1]:80"], "2001:db8::1"),
        ([b"[2001:DB8::1]"], "2001:db8::1"),
        ([b"2001:db8::1"], "2001:db8::1"),
        ([b"10.0.0.3, 10.0.0.2"], "10.0.0.3"),
        ([b"192.0.2.1, unknown"], "10.0.0.1"),
        ([b"192.0.2.1, \xe9, 10.0.0.2"], "10.0.0.2"),
    ],
)
def test_the_client_is_the_last_one_that_nobody_vouches_for(lines: list[bytes], address: str) -> None:
    """From the right, through trusted proxies only; garbage ends the search."""
    headers = Headers((b"X-Forwarded-For", line) for line in lines)
    assert client_address(headers, "10.0.0.1", lambda text: text.startswith("10.")) == address
    assert client_address(headers, "192.0.2.9", lambda text: text.startswith("10.")) == "192.0.2.9"


# -- to the upstream ---------------------------------------------------------------------------------------------------


def test_a_request_is_built_anew() -> None:
    """Host, identity and Via are ours, end-to-end fields stay as they were."""
    head = RequestHead(b"GET", b"/v1/x", Headers([(b"X-mIx", b"1"), (b"host", b"gw.test:80")]), b"1.0")
    expected = [
        (b"Host", b"up.test:8000"),
        (b"X-mIx", b"1"),
        (b"X-Request-Id", b"req_1"),
        (b"X-Forwarded-For", b"192.0.2.7"),
        (b"X-Forwarded-Proto", b"http"),
        (b"X-Forwarded-Host", b"gw.test:80"),
        (b"Forwarded", b'for=192.0.2.7;proto=http;host="gw.test:80"'),
        (b"Via", b"1.0 canal"),
    ]
    assert for_upstream(head, UPSTREAM) == RequestHead(b"GET", b"/v1/x", Headers(expected))


def test_a_stranger_cannot_speak_for_others() -> None:
    """What untrusted clients claim about themselves is dropped, in any spelling; a trusted proxy's word is kept."""
    claims = [
        (b"X-Forwarded-For", b"198.51.100.1"),
        (b"X-Forwarded-Proto", b"https"),
        (b"X-Forwarded-Host", b"public.test"),
        (b"Forwarded", b"for=198.51.100.1"),
        (b"X-Real-IP", b"9.9.9.9"),
        (b"X-Forwarded-Port", b"99"),
        (b"X_Forwarded_For", b"9.9.9.9"),
        (b"X_Canal_Key", b"9.9.9.9"),
        (b"Content_Length", b"9.9.9.9"),
        (b"X-Canal-Key", b"9.9.9.9"),
        (b"Proxy", b"9.9.9.9"),
        (b"X-Request-Id", b"9.9.9.9"),
        (b"x_other", b"kept"),
    ]
    seen = upstream(*claims)
    assert seen[b"x-forwarded-for"] == b"192.0.2.7"
    assert seen[b"x-forwarded-proto"] == b"http"
    assert seen[b"x-forwarded-host"] == b"gw.test"
    assert seen[b"x_other"] == b"kept"
    assert not any(b"9.9.9.9" in value or b"198.51" in value for value in seen.values())
    seen = upstream(*claims, options=replace(UPSTREAM, client_trusted=True))
    assert seen[b"x-forwarded-for"] == b"198.51.100.1, 192.0.2.7"
    assert seen[b"x-forwarded-proto"] == b"https"
    assert seen[b"x-forwarded-host"] == b"public.test"
    assert seen[b"forwarded"] == b'for=198.51.100.1, for=192.0.2.7;proto=http;host="gw.test"'
    assert not any(b"9.9.9.9" in value for value in seen.values())


def test_forwarded_knows_every_kind_of_client() -> None:
    """IPv6 is quoted, an unknown client is `unknown`, a missing Host is left out (RFC 7239 4, 6)."""
    seen = upstream(options=replace(UPSTREAM, client="2001:db8::1"))
    assert seen[b"forwarded"].startswith(b'for="[2001:db8::1]";')
    nobody = replace(UPSTREAM, client="")
    head = for_upstream(RequestHead(b"GET", b"/", Headers(), b"1.0"), nobody)
    assert head.headers.get(b"forwarded") == b"for=unknown;proto=http"
    assert b"x-forwarded-for" not in head.headers
    assert b"x-forwarded-host" not in head.headers


def test_the_authority_of_an_absolute_target_is_the_host() -> None:
    """What Host said beside it does not go on (RFC 9112 3.2.2); a target that is none leaves no host."""
    head = RequestHead(b"GET", b"http://gw.test/x", Headers([(b"Host", b"evil.test")]))
    seen = for_upstream(head, UPSTREAM)
    assert seen.headers.get(b"x-forwarded-host") == b"gw.test"
    assert not any(b"evil" in value for _, value in seen.headers)
    bad = for_upstream(RequestHead(b"GET", b"nonsense", Headers([(b"Host", b"gw.test")])), UPSTREAM)
    assert b"x-forwarded-host" not in bad.headers


def test_credentials() -> None:
    """A client's key goes on, is stripped where it is ours to check, and replaced where the upstream has one."""
    fields = [(b"authorization", b"Bearer c"), (b"Api-Key", b"c"), (b"X-Api-Key", b"c")]
    assert upstream(*fields)[b"authorization"] == b"Bearer c"
    assert not {b"authorization", b"api-key", b"x-api-key"} & set(
        upstream(*fields, options=replace(UPSTREAM, strip_credentials=True))
    )
    seen = upstream(*fields, options=replace(UPSTREAM, credential=(b"Authorization", b"Bearer up")))
    assert seen[b"authorization"] == b"Bearer up"
    assert not {b"api-key", b"x-api-key"} & set(seen)
    hidden = [(b"Sec-WebSocket-Protocol", b"realtime, OpenAI-insecure-api-key.sk-c,b")]
    assert upstream(*hidden)[b"sec-websocket-protocol"] == hidden[0][1]
    mine = replace(UPSTREAM, strip_credentials=True)
    assert upstream(*hidden, options=mine)[b"sec-websocket-protocol"] == b"realtime, b"
    only = (b"Sec-WebSocket-Protocol", b"openai-insecure-api-key.sk-c")
    assert b"sec-websocket-protocol" not in upstream(only, options=mine)
    seen = upstream(*fields, options=replace(UPSTREAM, credential=(b"api-key", b"up")))
    assert seen[b"api-key"] == b"up"
    assert not {b"authorization", b"x-api-key"} & set(seen)


@pytest.mark.parametrize(
    ("method", "body", "framing"),
    [
        (b"GET", 0, {}),
        (b"DELETE", 0, {}),
        (b"POST", 0, {b"content-length": b"0"}),
        (b"POST", 7, {b"content-length": b"7"}),
        (b"GET", 7, {b"content-length": b"7"}),
        (b"POST", None, {b"transfer-encoding": b"chunked"}),
    ],
)
def test_the_framing_of_a_request_is_ours(method: bytes, body: int | None, framing: dict[bytes, bytes]) -> None:
    """Whatever the client sent, nominated or not; a body is never asked to be answered compressed."""
    fields = [
        (b"Content-Length", b"99"),
        (b"Transfer-Encoding", b"chunked"),
        (b"Connection", b"content-length, transfer-encoding, host"),
        (b"Accept-Encoding", b"gzip"),
        (b"Trailer", b"X-T"),
        (b"Expect", b"100-continue"),
    ]
    seen = upstream(*fields, method=method, options=replace(UPSTREAM, body=body))
    assert {name: seen[name] for name in (b"content-length", b"transfer-encoding") if name in seen} == framing
    assert seen[b"accept-encoding"] == (b"gzip" if body == 0 else b"identity")
    assert (b"trailer" in seen) == (body is None)
    assert seen[b"host"] == b"up.test:8000"
    assert not {b"connection", b"expect"} & set(seen)


def test_an_upgrade_is_asked_for_anew() -> None:
    """The protocol that we relay, and no other option of the client's connection."""
    fields = [
        (b"Connection", b"upgrade, x-a"),
        (b"Upgrade", b"websocket"),
        (b"X-A", b"1"),
        (b"Sec-WebSocket-Key", b"k"),
    ]
    seen = upstream(*fields, options=replace(UPSTREAM, upgrade=b"websocket"))
    assert (seen[b"connection"], seen[b"upgrade"], seen[b"sec-websocket-key"]) == (b"Upgrade", b"websocket", b"k")
    assert b"x-a" not in seen
    assert b"upgrade" not in upstream(*fields)


@pytest.mark.parametrize(
    ("method", "given", "seen"),
    [
        (b"OPTIONS", b"2", b"1"),
        (b"OPTIONS", b"0", b"0"),
        (b"OPTIONS", b"x", None),
        (b"OPTIONS", b"9" * 5_000, None),
        (b"GET", b"2", b"2"),
    ],
)
def test_max_forwards(method: bytes, given: bytes, seen: bytes | None) -> None:
    """Counts down where it means something (RFC 9110 7.6.2)."""
    assert upstream((b"Max-Forwards", given), method=method).get(b"max-forwards") == seen


def test_via_is_appended_to() -> None:
    """Our entry comes last, behind all that were there."""
    assert (
        upstream((b"Via", b"1.0 fred, 1.1 p"), (b"via", b""), (b"Via", b"1.1 q"))[b"via"]
        == b"1.0 fred, 1.1 p, 1.1 q, 1.1 canal"
    )
    assert client((b"Via", b"1.1 q"))[b"via"] == b"1.1 q, 1.1 canal"


# -- to the client -----------------------------------------------------------------------------------------------------

HEAD_CLIENT = CLIENT._replace(request_method=b"HEAD")
OLD_CLIENT = CLIENT._replace(request_version=b"1.0")


@pytest.mark.parametrize(
    ("options", "status", "framing"),
    [
        (CLIENT, 200, {b"transfer-encoding": b"chunked"}),
        (CLIENT._replace(body=7), 200, {b"content-length": b"7"}),
        (CLIENT._replace(body=0, close=True), 200, {b"content-length": b"0", b"connection": b"close"}),
        (OLD_CLIENT._replace(close=True), 200, {b"connection": b"close"}),
        (OLD_CLIENT._replace(body=7), 200, {b"content-length": b"7", b"connection": b"keep-alive"}),
        (HEAD_CLIENT, 200, {}),
        (HEAD_CLIENT._replace(body=7), 200, {b"content-length": b"7"}),
        (CLIENT._replace(body=7), 304, {b"content-length": b"7"}),
        (CLIENT, 304, {}),
        (CLIENT._replace(body=7), 204, {}),
        (CLIENT, 204, {}),
        (CLIENT._replace(body=0), 103, {}),
        (CLIENT._replace(close=True), 103, {}),
        (CLIENT._replace(upgrade=b"websocket"), 101, {b"connection": b"Upgrade", b"upgrade": b"websocket"}),
        (CLIENT, 101, {}),
    ],
)
def test_the_framing_of_a_response_is_ours(options: ForClient, status: int, framing: dict[bytes, bytes]) -> None:
    """Whatever the upstream used: what fits the client, the method and the status."""
    fields = [(b"Content-Length", b"99"), (b"Transfer-Encoding", b"chunked"), (b"Connection", b"x"), (b"Upgrade", b"y")]
    seen = client(*fields, status=status, options=options)
    names = (b"content-length", b"transfer-encoding", b"connection", b"upgrade")
    assert {name: seen[name] for name in names if name in seen} == framing


def test_informational_heads_lose_their_hop_by_hop_fields_too() -> None:
    """What Connection names in a 103 does not reach the client, and nothing is added to it (Go issue 46313)."""
    fields = [
        (b"Connection", b"X-N"),
        (b"X-N", b"1"),
        (b"Keep-Alive", b"timeout=5"),
        (b"Link", b"a"),
        (b"Trailer", b"x"),
    ]
    assert client(*fields, status=103) == {b"link": b"a"}


def test_what_a_response_gains() -> None:
    """A request id where the upstream has none, what keeps proxies from buffering events, a date, a Via."""
    plain = client((b"Set-Cookie", b"a"), (b"X-Canal-Secret", b"x"), options=CLIENT._replace(body=0))
    assert plain == {b"set-cookie": b"a", b"content-length": b"0", b"x-request-id": b"req_1", b"via": b"1.1 canal"}
    stream = CLIENT._replace(event_stream=True, date=b"now")
    added = client(options=stream)
    assert (added[b"cache-control"], added[b"x-accel-buffering"], added[b"date"]) == (b"no-cache", b"no", b"now")
    own = [(b"Cache-Control", b"private"), (b"X-Accel-Buffering", b"yes"), (b"Date", b"then"), (b"X-Request-Id", b"up")]
    kept = client(*own, options=stream)
    assert {name.lower(): value for name, value in own}.items() <= kept.items()
    assert kept[b"x-canal-request-id"] == b"req_1"  # what the log says: else nobody finds what a user reports


def test_lines_are_never_joined() -> None:
    """Two Set-Cookie lines stay two (RFC 9110 5.3)."""
    head = ResponseHead(200, Headers([(b"Set-Cookie", b"a=1"), (b"Set-Cookie", b"b=2")]))
    assert for_client(head, CLIENT).headers.get_all(b"set-cookie") == [b"a=1", b"b=2"]
