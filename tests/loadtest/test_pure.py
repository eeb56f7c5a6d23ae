"""The pure parts of the load test: behaviours, the wire, histograms, scenarios, refusals."""

from __future__ import annotations

import itertools
import tomllib

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest import bodies
from loadtest.behaviour import Behaviour, BehaviourError, parse, split_user
from loadtest.histogram import Latency
from loadtest.run import joined
from loadtest.safety import Refused, target_of
from loadtest.scenario import Part, ScenarioError, changed, from_table, load, names
from loadtest.table import table
from loadtest.wire import Malformed, Response, stamps

behaviours = st.builds(
    Behaviour,
    tokens=st.integers(-1, 10_000),
    head=st.floats(0, 3600),
    interval=st.floats(0, 10),
    jitter=st.floats(0, 1),
    batch=st.integers(1, 4096),
    framing=st.sampled_from(["chunked", "length", "close"]),
    usage=st.booleans(),
    cut=st.integers(-1, 100_000),
    reset=st.booleans(),
    body=st.sampled_from(["", *bodies.CANNED]),
)


@given(behaviours, st.text("abc0123", min_size=1))
def test_a_behaviour_survives_its_way_through_a_request(behaviour: Behaviour, ident: str):
    """What the client asks for is what the upstream plays."""
    got_ident, rest = split_user(behaviour.encode(ident))
    assert got_ident == ident
    assert parse(rest) == behaviour


@pytest.mark.parametrize(
    ("rest", "words"),
    [
        ("tokns=3", "unknown key 'tokns'"),
        ("tokens=many", "expected int"),
        ("tokens=-2", "tokens is -2, expected -1 to"),
        ("jitter=2", "jitter is 2"),
        ("framing=carrier-pigeon", "expected one of chunked, length, close"),
    ],
)
def test_a_behaviour_nobody_can_play_is_named(rest: str, words: str):
    """The error says which field is wrong and what it takes."""
    with pytest.raises(BehaviourError, match=words):
        parse(rest)


def test_a_user_that_is_not_ours_is_only_an_identity():
    """A real client's `user` field asks for nothing."""
    assert split_user("customer;tokens=5") == ("customer;tokens=5", "")


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    """`data` in pieces."""
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in itertools.pairwise(places)]


def answer(pieces: list[bytes], framing: str) -> bytes:
    """A response with this payload."""
    body = b"".join(map(bodies.frame, pieces)) + bodies.LAST if framing == "chunked" else b"".join(pieces)
    return bodies.head(200, framing, "text/event-stream", sum(map(len, pieces))) + body


payloads = st.lists(st.binary(min_size=1, max_size=300), max_size=12)


@given(payloads, st.sampled_from(["chunked", "length", "close"]), st.lists(st.integers(0, 5000), max_size=20))
def test_the_payload_does_not_depend_on_how_the_bytes_were_split(pieces: list[bytes], framing: str, cuts: list[int]):
    """Any splitting gives the same payload, and h11 agrees on it."""
    wire = answer(pieces, framing)
    response = Response()
    payload = b"".join(response.feed(piece) for piece in split(wire, cuts))
    assert response.eof()
    oracle = h11.Connection(h11.CLIENT)
    oracle.send(h11.Request(method="GET", target="/", headers=[("host", "x")]))
    oracle.send(h11.EndOfMessage())
    oracle.receive_data(wire)
    oracle.receive_data(b"")
    expected = b""
    while not isinstance(event := oracle.next_event(), h11.EndOfMessage):
        if isinstance(event, h11.Data):
            expected += bytes(event.data)
    assert payload == expected == b"".join(pieces)


@given(payloads, st.sampled_from(["chunked", "length"]), st.data())
def test_a_cut_answer_is_never_complete(pieces: list[bytes], framing: str, data: st.DataObject):
    """Whatever is missing at the end, even one byte, the message is not done."""
    wire = answer(pieces, framing)
    response = Response()
    response.feed(wire[: data.draw(st.integers(0, len(wire) - 1))])
    assert not response.eof()


def test_what_follows_a_message_is_kept_apart():
    """Bytes of a second answer are not payload of the first."""
    response = Response()
    assert response.feed(answer([b"one"], "chunked") + b"HTTP/1.1 200") == b"one"
    assert response.done
    assert response.rest == b"HTTP/1.1 200"


def test_interim_answers_are_passed_over():
    """A 103 before the answer is not the answer."""
    response = Response()
    assert response.feed(b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + answer([b"one"], "length")) == b"one"
    assert response.status == 200


@pytest.mark.parametrize(
    "wire",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"x" * 70_000,
        bodies.head(200, "chunked", "text/plain") + b"+3\r\nabc\r\n",
        bodies.head(200, "chunked", "text/plain") + b"1_0\r\nabc\r\n",
        bodies.head(200, "chunked", "text/plain") + b"3\r\nabcX\r\n",
        bodies.head(200, "chunked", "text/plain") + b"3" * 100,
    ],
)
def test_what_is_no_http_is_malformed(wire: bytes):
    """A gateway that garbles framing does not pass for a working one."""
    with pytest.raises(Malformed):
        Response().feed(wire)


@given(st.integers(10**9, 10**18), st.sampled_from(["field", "content"]))
def test_an_event_says_when_it_was_sent(now: int, stamp: str):
    """Both places of the stamp are read back; a stamp cut in the middle is none."""
    event = bodies.event_maker(0, stamp, False)(now, 3)
    assert stamps(event) == [now]
    assert stamps(event[: event.index(str(now).encode()) + 9]) == []


@given(st.lists(st.integers(0, 10**7), min_size=1), st.lists(st.integers(0, 10**7)))
def test_latencies_keep_their_extremes_and_order(first: list[int], second: list[int]):
    """Nothing is lost in adding up, percentiles rise, and the largest is exact."""
    one, other = Latency(), Latency()
    for value in first:
        one.record(value)
    for value in second:
        other.record(value)
    one.add(other)
    assert len(one) == len(first) + len(second)
    assert one.worst == max(first + second)
    shown = [one.at(point) for point in (0, 50, 90, 99, 100)]
    assert shown == sorted(shown)
    assert shown[-1] == pytest.approx(max(one.worst, 1), rel=0.002)


def test_no_latency_is_not_a_fast_one():
    """An empty histogram says that it counted nothing."""
    assert Latency().summary() == {"count": 0}


@pytest.mark.parametrize("name", names())
def test_the_scenarios_we_ship_can_be_run(name: str):
    """Each loads, says what it is about, and makes well-formed requests."""
    scenario = load(name)
    assert scenario.about
    for part in scenario.parts:
        request = part.request("127.0.0.1:1", "", "7")
        server = h11.Connection(h11.SERVER)
        server.receive_data(request + bytes(part.upload and 10))
        event = server.next_event()
        assert isinstance(event, h11.Request)
        if not part.upload:
            assert isinstance(server.next_event(), h11.Data)
            assert isinstance(server.next_event(), h11.EndOfMessage)


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("streems = 3", "unknown key 'streems', did you mean 'streams'"),
        ("streams = 1000000", "streams is 1000000, expected 0 to 30000"),
        ("streams = true", "streams is True, expected int"),
        ("seconds = 1e9", "seconds is"),
        ("mode = 'wild'", "mode is 'wild', expected one of 'closed', 'open', 'ramp'"),
        ("part = 3", r"expected \[\[part\]\] tables"),
        ("[[part]]\nwait = 1", "part 1: unknown key 'wait'"),
        ("[[part]]\nupstream = { tokens = 'x' }", "tokens is 'x', expected int"),
        ("[[part]]\nupstream = { tokns = 1 }", "unknown key 'tokns' in a behaviour"),
    ],
)
def test_a_bad_scenario_is_refused_by_name(toml: str, words: str):
    """The error names the key and what is expected."""
    with pytest.raises((ScenarioError, BehaviourError), match=words):
        from_table("bad", tomllib.loads(toml))


def test_an_unknown_scenario_names_the_known_ones():
    """A typo is answered with the list."""
    with pytest.raises(ScenarioError, match=r"no scenario 'stedy'; there are .*steady"):
        load("stedy")


def test_a_scenario_is_changed_within_the_same_bounds():
    """The command line's values are checked as the file's are."""
    assert changed(load("steady"), streams=7).streams == 7
    with pytest.raises(ScenarioError, match="streams is 99999"):
        changed(load("steady"), streams=99_999)


@pytest.mark.parametrize("url", ["http://192.0.2.1:80", "https://192.0.2.1", "http://[2001:db8::1]:8080/v1"])
def test_a_target_off_loopback_is_refused(url: str):
    """Nobody's machine is loaded by a slip of the finger; with --allow-remote it is a decision."""
    with pytest.raises(Refused, match="--allow-remote"):
        target_of(url)
    assert target_of(url, allow_remote=True).host in url


@pytest.mark.parametrize("url", ["", "localhost:80", "ftp://127.0.0.1", "http://127.0.0.1:99999", "http://u@127.0.0.1"])
def test_what_is_no_target_is_refused(url: str):
    """The error repeats what was given."""
    with pytest.raises(Refused):
        target_of(url)


def test_a_base_url_is_a_target_too():
    """The URL one gives to an SDK works: our paths bring their own /v1."""
    target = target_of("http://127.0.0.1:8080/proxy/v1/")
    assert (target.port, target.path, target.authority) == (8080, "/proxy", "127.0.0.1:8080")


def test_leavers_are_joined_with_what_the_upstream_saw():
    """Cancel latency is from the client's leaving to the upstream's seeing; later tokens are wasted."""
    ms = 1_000_000
    entry = {"user": "1", "seen": 105 * ms, "sent_at": [90 * ms, 101 * ms, 103 * ms]}
    report = {"left": [entry], "totals": {}, "late_ms": {}}
    cancel = joined({"1": 100 * ms, "2": 100 * ms}, report)["cancel"]
    assert (cancel["left"], cancel["seen_by_upstream"], cancel["tokens_wasted"]) == (2, 1, 2)
    assert cancel["ms"]["max"] == 5.0


def test_a_part_without_keep_alive_says_so():
    """The gateway is told to close."""
    assert b"\r\nConnection: close\r\n" in Part(keep_alive=False).request("x:1", "", "0")


def test_columns_are_aligned():
    """Every cell starts where its header starts."""
    header, _rule, first, second = table(["a", "b"], [["long", "1"], ["x", "2"]]).splitlines()
    assert header.index("b") == first.index("1") == second.index("2") == 6
