"""Targets, authorities and base URLs."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from canal_trio.errors import Failure, Kind
from canal_trio.messages import Headers, RequestHead
from canal_trio.wire.targets import (
    BaseUrl,
    deployment_in,
    is_authority,
    origin_form,
    parse_base_url,
    plain_path,
    upstream_target,
)


def form(target: bytes, host: bytes | None = b"gw.test", method: bytes = b"GET", version: bytes = b"1.1") -> object:
    """The origin-form and authority of a request for `target`, or the kind of its failure."""
    fields = [] if host is None else [(b"Host", host)]
    result = origin_form(RequestHead(method, target, Headers(fields), version))
    return result.kind if isinstance(result, Failure) else result


@pytest.mark.parametrize(
    "value",
    [
        b"a",
        b"GW.test",
        b"a_b.test",
        b"gw.test:8080",
        b"gw.test:",
        b"127.0.0.1:65535",
        b"[::1]",
        b"[2001:db8::1]:80",
        b"a%41",
    ],
)
def test_authorities(value: bytes) -> None:
    """Hosts with and without ports, of every kind (RFC 3986 3.2.2)."""
    assert is_authority(value)
    assert form(b"/", value) == (b"/", value)


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b":80",
        b"a b",
        b"a,b",
        b"user@a",
        b"a/b",
        b"a?b",
        b"a#b",
        b"a\\b",
        b"a:80a",
        b"a:65536",
        b"a:000080",
        b"a:1:2",
        b"::1",
        b"[::1",
        b"::1]",
        b"[]",
        b"[1.2.3.4]",
        b"[:::]",
        b"[::1]a",
        b"a%4",
        b"a%zz",
        b"g\xe9",
        b"a\x00",
        b"<a>",
        b'a"b',
    ],
)
def test_what_is_not_an_authority(value: bytes) -> None:
    """Neither in Host nor in an absolute target."""
    assert not is_authority(value)
    assert form(b"/", value) is Kind.MALFORMED
    assert form(b"http://" + value + b"/x") != (b"/x", value)


@pytest.mark.parametrize(
    ("target", "method", "result"),
    [
        (b"/", b"GET", (b"/", b"gw.test")),
        (b"//evil.test/x", b"GET", (b"//evil.test/x", b"gw.test")),
        (b"/a?b=c;d&e=%zz", b"GET", (b"/a?b=c;d&e=%zz", b"gw.test")),
        (b"http://a.test/x?y", b"GET", (b"/x?y", b"a.test")),
        (b"HTTPS://a.test:443/x", b"GET", (b"/x", b"a.test:443")),
        (b"http://a.test", b"GET", (b"/", b"a.test")),
        (b"http://a.test?x", b"GET", (b"/?x", b"a.test")),
        (b"http://a.test", b"OPTIONS", (b"*", b"a.test")),
        (b"http://a.test?x", b"OPTIONS", (b"/?x", b"a.test")),
        (b"*", b"OPTIONS", (b"*", b"gw.test")),
        (b"*", b"GET", Kind.MALFORMED),
        (b"foo", b"GET", Kind.MALFORMED),
        (b"gw.test:80", b"GET", Kind.MALFORMED),
        (b"ftp://a.test/", b"GET", Kind.MALFORMED),
        (b"http:/a.test/", b"GET", Kind.MALFORMED),
        (b"http:///x", b"GET", Kind.MALFORMED),
        (b"http://u@a.test/x", b"GET", Kind.MALFORMED),
        (b"/a#b", b"GET", Kind.MALFORMED),
        (b"/a\\b", b"GET", Kind.MALFORMED),
        (b"http://a.test/x#y", b"GET", Kind.MALFORMED),
    ],
)
def test_targets(target: bytes, method: bytes, result: object) -> None:
    """Origin-form, absolute-form, and `*` for OPTIONS; nothing else (RFC 9112 3.2)."""
    assert form(target, method=method) == result


def test_how_many_hosts() -> None:
    """One; none only in HTTP/1.0; and Host has to be right even where the target says more."""
    assert form(b"/", None, version=b"1.0") == (b"/", b"")
    assert form(b"http://a.test/", None, version=b"1.0") == (b"/", b"a.test")
    assert form(b"/", None) is Kind.MALFORMED
    assert form(b"http://a.test/", b"") is Kind.MALFORMED
    twice = Headers([(b"Host", b"a"), (b"host", b"a")])
    assert isinstance(origin_form(RequestHead(b"GET", b"/", twice)), Failure)


@pytest.mark.parametrize(
    ("base", "target", "result"),
    [
        (b"", b"/v1/x?y", b"/v1/x?y"),
        (b"", b"/v1/../x", b"/v1/../x"),
        (b"/v1", b"/v1/x?y", b"/v1/x?y"),
        (b"/openai/v4", b"/v1/x?y=/../..", b"/openai/v4/x?y=/../.."),
        (b"/openai/v4", b"/v1", b"/openai/v4"),
        (b"/openai/v4", b"/v1?x", b"/openai/v4?x"),
        (b"/openai/v4", b"/v12/x", b"/openai/v4/v12/x"),
        (b"/openai/v4", b"/health", b"/openai/v4/health"),
        (b"/openai/v4", b"*", b"*"),
        (b"/v1", b"/v1/a/../b", b"/v1/a/../b"),
        (b"/v1", b"/v1/./a//..;x/", b"/v1/./a//..;x/"),
    ],
)
def test_where_a_target_goes(base: bytes, target: bytes, result: bytes) -> None:
    """Behind the base's path, in place of `/v1`; unchanged where the base has none (design, section 9)."""
    assert upstream_target(base, target) == result


@pytest.mark.parametrize(
    "target",
    [
        b"/v1/..",
        b"/v1/../admin",
        b"/v1/%2e%2E/admin",
        b"/v1/.%2e/admin",
        b"/v1/a/../../b",
        b"/v1//../../b",
        b"/v1/..;x/admin",
        b"/v1/a%2f..%2F../b",
        b"/v1/a/%2e%2e%5c..%5cb",
        b"/../x",
    ],
)
def test_no_target_leads_out_of_the_base(target: bytes) -> None:
    """Dot segments in every disguise are refused where they would climb above the base."""
    failure = upstream_target(b"/v1", target)
    assert isinstance(failure, Failure)
    assert failure.kind is Kind.MALFORMED


@given(segments=st.lists(st.sampled_from(["..", ".", "", "a", "%2e%2e", "v1", "..;", "x%2f.."]), max_size=8))
@settings(deadline=None)
def test_a_target_stays_below_the_base_for_any_segments(segments: list[str]) -> None:
    """Resolved as the most lenient upstream would, with empty segments merged, it is still below the base."""
    target = upstream_target(b"/base/v1", ("/" + "/".join(segments)).encode())
    if isinstance(target, Failure):
        return
    place: list[str] = []
    for segment in target.decode().replace("%2e", ".").replace("%2f", "/").split("/"):
        name = segment.partition(";")[0]
        if name == "..":
            assert len(place) > 2
            place.pop()
        elif name not in ("", "."):
            place.append(name)
    assert place[:2] == ["base", "v1"]


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("http://127.0.0.1:8000/v1", BaseUrl("http", "127.0.0.1", 8000, b"/v1", b"127.0.0.1:8000")),
        ("https://API.test", BaseUrl("https", "api.test", 443, b"", b"api.test")),
        ("https://api.test:443/", BaseUrl("https", "api.test", 443, b"", b"api.test")),
        ("http://[::1]:80/a/b/", BaseUrl("http", "::1", 80, b"/a/b", b"[::1]")),
        ("http://[::1]:81", BaseUrl("http", "::1", 81, b"", b"[::1]:81")),
    ],
)
def test_base_urls(url: str, parts: BaseUrl) -> None:
    """What is dialled, what Host says, and what comes before every path."""
    assert parse_base_url(url) == parts


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:8000",
        "ftp://a/",
        "http://",
        "http:///v1",
        "http://u:p@a/",
        "http://a/?x",
        "http://a/#x",
        "http://a/?",
        "http://a:99999",
        "http://a:0",
        "http://a:b",
        "http://[::1",
        "http://é/",
        "http://a/é",
        "http://a /",
        "http://a\n/",
        "http://a/\\x",
        "http://a,b/",
        "http://a/../b",
    ],
)
def test_what_is_not_a_base_url_is_explained(url: str) -> None:
    """A complaint for people, not an exception."""
    complaint = parse_base_url(url)
    assert isinstance(complaint, str)
    assert complaint.endswith(".")


@pytest.mark.parametrize(
    ("target", "path"),
    [
        (b"/v1/files", "/v1/files"),
        (b"/v1/files/file-1/content?a=../b", "/v1/files/file-1/content"),
        (b"/v1/files/", "/v1/files/"),
        (b"/v1/...", "/v1/..."),
        (b"/", "/"),
        (b"/v1/files/..", None),
        (b"/v1/files/../chat/completions", None),
        (b"/v1/./files", None),
        (b"/v1//files", None),
        (b"/v1/files;a=b", None),
        (b"/v1/%66iles", None),
        (b"/v1/files%2f..%2fchat", None),
        (b"*", None),
        (b"", None),
    ],
)
def test_a_plain_path_is_one_that_nobody_resolves(target: bytes, path: str | None):
    """What a route is chosen by is the path that the upstream will see, or there is no route."""
    assert plain_path(target) == path


@pytest.mark.parametrize(
    ("path", "deployment"),
    [
        ("/v1/chat/completions", None),
        ("/v1/deploymentsx/a", None),
        ("/openai/deployments/gpt-4o/chat/completions", "gpt-4o"),
        ("/openai/Deployments/gpt-4.1_b", "gpt-4.1_b"),
        ("/deployments/", ""),
        ("/openai/deployments/a/deployments/b", ""),
        ("/openai/deployments//a", ""),
        ("/openai/deployments/a/../b/x", ""),
        ("/openai/deployments/%61", ""),
        ("/openai/%64eployments/a", ""),
        ("/openai/deployments%2fa", ""),
        ("/openai/deployments/a;b", ""),
        ("/openai/deployments%5Ca/x", ""),
        ("/openai%2fdeployments;v=1/a/x", ""),
        ("/openai/%2564eployments/a", ""),
        ("/v1/files/a%20b", None),
    ],
)
def test_the_deployment_that_a_path_names(path: str, deployment: str | None):
    """It is told only where every upstream reads the same one."""
    assert deployment_in(path) == deployment
