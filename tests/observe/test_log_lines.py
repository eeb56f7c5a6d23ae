"""The log's writer thread, the program's own messages and the access log."""

from __future__ import annotations

import json
import logging
import os
import queue
import re
import threading
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from canal_trio.errors import Failure, Kind, Phase, Side
from canal_trio.hooks import ExchangeRecord, Outcome, Usage, UsageSource
from canal_trio.observe.accesslog import AccessLog, json_line, text_line
from canal_trio.observe.lines import BATCH_BYTES, GATHER, GATHER_BUSY, MANY, WHY_DROPPED, LineWriter
from canal_trio.observe.log import TRACEBACK_VARIABLE, describe, logging_to, printable, restyle, timestamp

RECORD = ExchangeRecord(
    request_id="req_1",
    started_at=1_700_000_000.0,
    client="10.0.0.9",
    method="POST",
    path="/v1/chat/completions",
    outcome=Outcome.COMPLETED,
    phase=Phase.DELIVER,
    status=200,
    principal="team-a",
    model="gpt-4o-mini",
    upstream="local",
    attempts=1,
    streamed=True,
    request_bytes=512,
    response_bytes=20_480,
    events=42,
    first_byte=0.035,
    duration=1.25,
    longest_gap=0.051,
    mean_gap=0.025,
)
GONE = ExchangeRecord(
    request_id="req_2",
    started_at=1_700_000_000.0,
    client="10.0.0.9",
    method="POST",
    path="/v1/chat/completions",
    outcome=Outcome.CLIENT_GONE,
    phase=Phase.STREAM,
    status=200,
    failure=Failure(Side.CLIENT, Phase.STREAM, Kind.GONE, "The client closed the connection."),
    upstream="local",
    attempts=2,
    streamed=True,
    response_bytes=300,
    events=3,
    duration=0.5,
    cancel_latency=0.000082,
    flags=("late_body_end",),
)


def _pipe() -> tuple[int, int]:
    return os.pipe()


def _fill(fd: int) -> None:
    """Leave no room at all in the pipe."""
    os.set_blocking(fd, False)
    for size in (65536, 4096, 1):
        try:
            while True:
                os.write(fd, b"x" * size)
        except BlockingIOError:
            continue
    os.set_blocking(fd, True)


def _read_lines(fd: int, until: str, deadline: float = 10.0) -> list[str]:
    data = b""
    ends = time.monotonic() + deadline
    while until.encode() not in data and time.monotonic() < ends:
        data += os.read(fd, 65536)
    return data.decode().replace("x", "").splitlines()


def test_lines_arrive_in_order() -> None:
    """What was written is what comes out, rendered or not, in order, and close() waits for it."""
    read, write = _pipe()
    writer = LineWriter(write)
    for number in range(100):
        line = f"line {number}\n".encode()
        assert writer.write(line if number % 2 else lambda line=line: line)
    assert writer.close(10)
    os.close(write)
    with open(read, "rb") as file:
        assert file.read().decode() == "".join(f"line {number}\n" for number in range(100))
    assert writer.dropped == 0


def test_lines_of_several_processes_were_torn() -> None:
    """On a shared descriptor each write is whole lines, and no more than a pipe takes as one."""
    read, write = os.pipe2(os.O_DIRECT)  # what was written as one is read as one
    writer = LineWriter(write, shared=True)
    lines = [b"%d %s\n" % (number, b"x" * (number * 37 % 1500)) for number in range(60)]
    for line in lines:
        assert writer.write(line)
    assert writer.close(10)
    os.close(write)
    packets = []
    while packet := os.read(read, 1 << 20):
        packets.append(packet)
    os.close(read)
    assert b"".join(packets) == b"".join(lines)
    assert all(packet.endswith(b"\n") for packet in packets)
    assert 1 < len(packets) < len(lines)


def test_a_blocked_descriptor_costs_lines_and_not_time() -> None:
    """When nobody reads the log, writing never blocks, holds a bounded number of lines, and the drops are told."""
    read, write = _pipe()
    _fill(write)
    writer = LineWriter(write, capacity=16)
    results = [writer.write(b"here\n") for _ in range(200)]
    assert results.count(True) <= 16 + 1 + 16  # the queue, and the batch that the thread took out of it
    assert writer.dropped == results.count(False) > 0
    told = f"{writer.dropped} log lines were dropped: {WHY_DROPPED}"
    threading.Timer(0.05, lambda: writer.write(b"later\n")).start()
    lines = _read_lines(read, "dropped")
    assert told in lines
    assert writer.close(10)
    os.close(read)
    os.close(write)


class Pauses:
    """In place of the writer's event: its waits are told, and end one by one."""

    def __init__(self) -> None:
        self.told: queue.SimpleQueue[float] = queue.SimpleQueue()
        self.go_on = threading.Semaphore(0)

    def wait(self, seconds: float) -> None:
        """Until it may go on."""
        self.told.put(seconds)
        self.go_on.acquire(timeout=10)

    def set(self) -> None:
        """All may."""
        self.go_on.release(10)


def test_the_more_lines_the_longer_it_gathers() -> None:
    """Few are written soon, behind many it waits for more; one that is larger than a write leaves nothing waiting."""
    read, write = _pipe()
    writer, pauses = LineWriter(write), Pauses()
    writer._closing = pauses  # type: ignore[assignment]
    behind = GATHER
    for count, size, following in (
        (MANY - 1, 10, GATHER),
        (MANY, 10, GATHER_BUSY),
        (1, 10, GATHER),
        (1, BATCH_BYTES, 0.0),
        (1, 10, GATHER),
    ):
        for _ in range(count):
            writer.write(b"x" * (size - 1) + b"\n")
        assert pauses.told.get(timeout=10) == behind
        pauses.go_on.release()
        left = count * size
        while left:
            left -= len(os.read(read, left))
        behind = following
    assert writer.close(timeout=5)
    assert writer.dropped == 0
    os.close(read)
    os.close(write)


def test_closing_with_a_blocked_descriptor_gives_up() -> None:
    """A process can end though nobody reads its log: close() returns after its timeout and says so."""
    read, write = _pipe()
    _fill(write)
    writer = LineWriter(write)
    writer.write(b"never read\n")
    assert not writer.close(0.05)
    assert not writer.write(b"too late\n")
    while not writer.close(0.05):  # lets the thread go
        os.read(read, 65536)
    os.close(read)
    os.close(write)


def test_a_reader_that_left_is_no_error() -> None:
    """With the other end of the pipe closed, lines are lost and counted, and the writer lives on."""
    read, write = _pipe()
    os.close(read)
    writer = LineWriter(write)
    writer.write(b"one\n")
    writer.write(b"two\n")
    assert writer.close(10)
    assert writer.dropped == 2
    os.close(write)


def test_a_nonblocking_descriptor_is_waited_for() -> None:
    """A stderr that somebody made non-blocking loses nothing when it is full for a while."""
    read, write = _pipe()
    _fill(write)
    os.set_blocking(write, False)
    writer = LineWriter(write)
    writer.write(b"patience\n")
    assert "patience" in _read_lines(read, "patience\n")
    assert writer.close(10)
    assert writer.dropped == 0
    os.close(read)
    os.close(write)


def test_a_line_that_cannot_be_rendered_does_not_end_the_log() -> None:
    """A renderer that raises becomes a line that says so; the next line is written."""
    read, write = _pipe()
    writer = LineWriter(write)
    writer.write(lambda: 1 / 0)  # type: ignore[arg-type,return-value]  # it raises before it returns
    writer.write(b"next\n")
    assert writer.close(10)
    os.close(write)
    with open(read, "rb") as file:
        assert file.read() == b"a log line could not be rendered: ZeroDivisionError\nnext\n"


def _logged(style: str, act) -> str:
    read, write = _pipe()
    writer = LineWriter(write)
    with logging_to(writer, style):
        act(logging.getLogger("canal_trio.somewhere"))
    assert writer.close(10)
    os.close(write)
    with open(read, "rb") as file:
        return file.read().decode()


def _raise_and_log(log: logging.Logger) -> None:
    try:
        raise ExceptionGroup("several", [ValueError("first\nof\x1b[31m two"), KeyError("x")])
    except ExceptionGroup as group:
        log.error("a bug ended it", exc_info=group)


def test_an_exception_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A logged exception is told in one line with its type, text and count, and without a traceback."""
    monkeypatch.delenv(TRACEBACK_VARIABLE, raising=False)
    text = _logged("text", _raise_and_log)
    assert text.count("\n") == 1
    assert "error: a bug ended it: ValueError: first\\nof\\x1b[31m two, and 1 more" in text
    assert "Traceback" not in text


def test_a_traceback_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """With CANAL_TRACEBACK set the traceback follows, inside the JSON object where JSON was asked for."""
    monkeypatch.setenv(TRACEBACK_VARIABLE, "1")
    assert "Traceback (most recent call last)" in _logged("text", _raise_and_log)
    assert "Traceback" in json.loads(_logged("json", _raise_and_log))["traceback"]


def test_messages_as_json() -> None:
    """In JSON style a message is an object on one line, whatever is in it."""
    fields = json.loads(_logged("json", lambda log: log.warning("odd: %s", "\udc80\n\x00")))
    assert fields["level"] == "warning"
    assert fields["kind"] == "log"
    assert fields["message"] == "odd: \\udc80\n\x00"


def test_another_style_from_now_on() -> None:
    """What was said before is as it was, what comes later in the new style; for messages, for exchanges, and for what
    is said of lines that were lost."""
    read, write = _pipe()
    writer = LineWriter(write)
    access = AccessLog(writer)
    lost = []
    with logging_to(writer, "text") as logger:
        for style in ("text", "json", "text"):
            access.restyle(style)
            restyle(style)
            logger.info("hello")
            access.finished(RECORD)
            lost.append(writer.note(3).startswith(b"{"))
    assert lost == [False, True, False]
    assert writer.close(10)
    os.close(write)
    with open(read, "rb") as file:
        assert [line.startswith(b"{") for line in file] == [False, False, True, True, False, False]


def test_the_logger_is_left_as_it_was() -> None:
    """After the block the library's logger has no handler of ours and passes its messages on again."""
    logger = logging.getLogger("canal_trio")
    before = (logger.level, logger.propagate, list(logger.handlers))
    _logged("text", lambda log: log.info("hello"))
    assert (logger.level, logger.propagate, list(logger.handlers)) == before


def test_describe_names_the_place() -> None:
    """The one-line description of an exception says where it was raised."""
    with pytest.raises(ValueError) as caught:
        json.loads("{")
    assert "json/decoder.py:" in describe(caught.value)
    assert describe(RuntimeError("bare")) == "RuntimeError: bare"


def test_timestamps() -> None:
    """Times are RFC 3339 in UTC with milliseconds."""
    assert timestamp(1_700_000_000.1239) == "2023-11-14T22:13:20.123Z"


def test_the_line_for_people() -> None:
    """The text line of a stream holds when, who, what, how it ended, and the numbers of the issue."""
    assert text_line(RECORD).decode() == (
        "2023-11-14T22:13:21.250Z 10.0.0.9 POST /v1/chat/completions 200 completed phase=deliver in=512B out=20KiB "
        "events=42 first=35ms took=1.2s gap=51ms key=team-a model=gpt-4o-mini upstream=local id=req_1\n"
    )
    assert text_line(GONE).decode() == (
        "2023-11-14T22:13:20.500Z 10.0.0.9 POST /v1/chat/completions 200 client_gone phase=stream in=0B out=300B "
        "events=3 took=500ms cancel=82us attempts=2 upstream=local id=req_2 flags=late_body_end "
        'failure="client gone (stream): The client closed the connection."\n'
    )


def test_the_tokens_of_a_line() -> None:
    """Where tokens were counted a line says how many; an estimate is marked as one."""
    said = RECORD._replace(usage=Usage(12, 34, 5, 6), usage_source=UsageSource.UPSTREAM)
    assert b" tokens=12+34 " in text_line(said)
    assert b" tokens=~12+34 " in text_line(said._replace(usage_source=UsageSource.ESTIMATED))
    fields = json.loads(json_line(said))
    assert fields["usage"] == {"prompt": 12, "completion": 34, "cached": 5, "reasoning": 6}
    assert fields["usage_source"] == "upstream"


def test_the_line_for_machines() -> None:
    """The JSON line holds every field of the issue, as plain numbers and names."""
    fields = json.loads(json_line(GONE))
    assert fields["request_id"] == "req_2"
    assert fields["outcome"] == "client_gone"
    assert fields["phase"] == "stream"
    assert fields["cancel_latency"] == 8.2e-05
    assert fields["first_byte"] is None
    assert fields["flags"] == ["late_body_end"]
    assert fields["failure"]["kind"] == "gone"
    assert json.loads(json_line(RECORD))["failure"] is None
    shown = set(fields) - {"time", "kind"}
    assert shown == set(ExchangeRecord._fields) - {"started_at"}


@pytest.mark.parametrize("render", [text_line, json_line])
def test_a_stranger_cannot_forge_a_line(render) -> None:
    """Line ends, escapes, quotes and broken Unicode in what a client sends stay inside one line."""
    forged = ExchangeRecord(
        request_id='a b"',
        started_at=0.0,
        client="::1",
        method="GET",
        path="/x\n2023 forged 200\x1b[2J\x7f\udcff" + "y" * 9000,
        outcome=Outcome.REJECTED,
        phase=Phase.ROUTE,
        model='m" outcome=completed',
    )
    line = render(forged)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert b"\x1b" not in line
    assert len(line) < 4000
    if render is text_line:
        assert b'model="m\\" outcome=completed"' in line
    else:
        assert json.loads(line)["model"] == 'm" outcome=completed'


@given(st.text(st.sampled_from('m\\"= \n\x1b\udcff'), min_size=1, max_size=300))
@example('m\\" outcome=completed ')
def test_a_model_with_a_backslash_cannot_forge_a_field(model: str) -> None:
    """Whatever a model is called, whoever splits the line by its quotes finds the same fields in it."""
    line = text_line(RECORD._replace(model=model)).decode()
    words = re.findall(r'(?:[^ "=]+=)?(?:"(?:[^"\\]|\\.)*"|[^ "=]+)', line.removesuffix("\n"))
    assert " ".join(words) == line.removesuffix("\n")
    names = [word.partition("=")[0] for word in words if word[0] != '"']
    assert names.count("model") == 1
    assert names == [word.partition("=")[0] for word in text_line(RECORD).decode().split()]


def test_the_recorder_queues_its_line() -> None:
    """Each record becomes one line of the chosen style."""
    read, write = _pipe()
    writer = LineWriter(write)
    AccessLog(writer).finished(RECORD)
    AccessLog(writer, "json").finished(RECORD)
    assert writer.close(10)
    os.close(write)
    with open(read, "rb") as file:
        assert file.read() == text_line(RECORD) + json_line(RECORD)


def test_printable_is_bounded() -> None:
    """A stranger's text is cut at the limit and marked as cut."""
    assert printable("a" * 300, 10) == "a" * 9 + "…"
    assert printable("plain") == "plain"
