"""The commands of the load test: promises that can break, peers that are missing, refusals, the page."""

from __future__ import annotations

import dataclasses
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from loadtest import bodies, compare, report
from loadtest.behaviour import Behaviour
from loadtest.peers import PEERS, Gateway, Missing, Peer, running
from loadtest.processes import ROOT, NotStarted, cpu_seconds, descendants, resident, started, upstream_process
from loadtest.promises.check import PARTS, check, shown
from loadtest.promises.endings import endings
from loadtest.promises.exact import exact_bytes
from loadtest.promises.kit import Site
from loadtest.scenario import names


def silent(_text: str) -> None:
    """Say nothing."""


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m loadtest` as a user runs it."""
    argv = [sys.executable, "-m", "loadtest", *arguments]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_a_load_test_that_was_terminated_left_its_programs_running():
    """SIGTERM ends the upstream and the gateway that it has started, as Ctrl-C does."""
    argv = [sys.executable, "-m", "loadtest", "run", "small", "--peer", "canal", "--seconds", "60"]
    program = subprocess.Popen(argv, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 30
    while len(family := descendants(program.pid)) < 3 and time.monotonic() < end:
        time.sleep(0.05)  # a real process
    assert len(family) >= 3
    program.terminate()
    assert program.communicate(timeout=30)[1].splitlines()[-1] == "loadtest: interrupted"
    assert program.returncode == 1
    assert not [pid for pid in family if Path(f"/proc/{pid}").exists()]


@contextmanager
def liar() -> Iterator[Gateway]:
    """A gateway that gives every client the same finished stream, whatever its upstream did."""
    stream = b"".join(bodies.frame(piece) for piece in bodies.canned("three")) + bodies.LAST
    answer = bodies.head(200, "chunked", "text/event-stream") + stream
    stopping = threading.Event()

    def serve() -> None:
        while not stopping.is_set():
            peer, _address = server.accept()
            with peer:
                peer.settimeout(5)
                if peer.recv(65536):
                    peer.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve)
        thread.start()
        yield Gateway("liar", *server.getsockname()[:2], None)
        stopping.set()
        socket.create_connection(server.getsockname()).close()
        thread.join(10)


def test_a_gateway_that_makes_up_endings_is_found_out():
    """Finished answers to cut streams break the promise, and so do bytes nobody sent."""
    with upstream_process() as upstream, liar() as gateway:
        site = Site(gateway, upstream, silent, quick=True)
        verdicts = [*endings(site), *exact_bytes(site)]
    assert [verdict.kept for verdict in verdicts] == [False, False, False]


def test_promises_hold_on_a_direct_connection():
    """The measuring itself adds nothing: with nobody in between every ending is right."""
    result = check("direct", ["endings"], silent, quick=True)
    assert result["broken"] == 0
    assert "0 broken" in shown(result)


def test_a_missing_peer_is_named(monkeypatch: pytest.MonkeyPatch):
    """It is in the result and in the text, with where to get it; the others are measured all the same."""
    monkeypatch.setenv("PATH", "/nowhere")
    result = compare.compare(["haproxy", "direct"], ["small"], silent, rounds=1, shorter=0.1)
    assert "Debian's package: haproxy" in result["missing"]["haproxy"]
    assert result["medians"]["small"]["direct"]["requests_per_s"] > 0
    assert "missing: haproxy" in compare.shown(result)


def test_what_all_of_the_policy_costs():
    """With everything on each request is answered, and the ratio is the one to the peer that was named."""
    result = compare.compare(["canal", "canal-all"], ["small"], silent, rounds=1, shorter=0.1, base="canal")
    assert result["missing"] == {}
    for name in ("canal", "canal-all"):
        assert result["medians"]["small"][name]["requests_per_s"] > 0
        assert result["medians"]["small"][name]["errors"] == 0
    assert result["ratios"]["small"]["canal"]["cpu_us_per_request"] == 1
    assert result["ratios"]["small"]["canal-all"]["cpu_us_per_request"] > 0
    assert "is the ratio to canal within a round" in compare.shown(result)


FRAGILE = """
import socket, sys
server = socket.create_server(("127.0.0.1", int(sys.argv[1])))
server.accept()  # whoever looks whether we are up
server.accept()
sys.exit("out of breath")
"""


def test_a_peer_that_dies_under_the_load_is_named(monkeypatch: pytest.MonkeyPatch):
    """What it had measured before it died is not shown as a figure, and the others go on."""
    fragile = Peer("fragile", "dies at the first request", (sys.executable, "-c", FRAGILE, "$port"))
    monkeypatch.setitem(PEERS, "fragile", fragile)
    result = compare.compare(["fragile", "direct"], ["small"], silent, rounds=1, shorter=0.1)
    assert "out of breath" in result["missing"]["fragile (small)"]
    assert "fragile" not in result["medians"]["small"]
    assert "direct" in result["medians"]["small"]
    assert "missing: fragile" in compare.shown(result)


def test_a_peer_without_tls_is_named_when_tls_is_asked_for():
    """Nobody is compared in the clear by accident."""
    with pytest.raises(Missing, match="no configuration with TLS"), running("envoy", 1, tls=True):
        pass


def test_a_program_that_does_not_come_up_is_named_with_its_last_words():
    """What it said is in the error."""
    argv = [sys.executable, "-c", "print('no such flag')"]
    with pytest.raises(NotStarted, match="no such flag"), started("thing", argv) as process:
        process.saying("listening")


def test_cpu_and_memory_are_those_of_the_whole_tree():
    """A child's work counts for its parent, while it lives."""
    child = "import time, signal; sum(range(10**6)); print('burned', time.process_time(), flush=True); signal.pause()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with started("parent", [sys.executable, "-c", parent]) as process:
        burned = float(process.saying(r"^burned ([\d.]+)$")[1])
        assert process.cpu() >= burned - 0.03  # the kernel counts in ticks of 10 ms, rounded down
        assert process.memory() > 2 * 4_000_000  # two interpreters
    assert (cpu_seconds(process.pid), resident(process.pid)) == (0, 0)


def test_the_document_names_everything_that_can_be_asked_for():
    """Every key of a behaviour, every scenario, measure, promise and peer is in docs/measuring.md."""
    text = (ROOT / "docs" / "measuring.md").read_text()
    asked = [field.name for field in dataclasses.fields(Behaviour)]
    asked += [*names(), *compare.MEASURES, *PARTS, *(peer.package.split("[")[0] for peer in PEERS.values())]
    assert [name for name in asked if not re.search(rf"\b{re.escape(name)}\b", text, re.IGNORECASE)] == []


def test_every_peer_has_its_configuration():
    """Each file a peer needs is there."""
    folder = Path(compare.__file__).parent / "peers"
    for peer in PEERS.values():
        for name in filter(None, (peer.config, peer.tls)):
            assert (folder / name).is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "steady", "--target", "http://192.0.2.1"], "--allow-remote"),
        (["run", "stedy", "--target", "http://127.0.0.1:1"], "no scenario 'stedy'"),
        (["run", "steady"], "either --target URL or --peer NAME"),
        (["run", "steady", "--target", "http://127.0.0.1:1", "--streams", "99999"], "streams is 99999"),
        (["compare", "--peers", "nginx,enovy"], "'enovy' is none of"),
        (["promises", "--only", "speed"], "'speed' is none of latency"),
        (["upstream", "--listen", "9000"], "expected HOST:PORT"),
        (["upstream", "--behaviour", "tokns=1"], "unknown key 'tokns'"),
    ],
)
def test_bad_usage_is_refused_by_name(arguments: list[str], words: str):
    """Exit code 2, what is wrong, what is expected, and no traceback."""
    done = command(*arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_the_upstream_reports_when_it_ends():
    """On SIGTERM one line of JSON says what was counted."""
    with upstream_process() as upstream:
        assert upstream.process is not None
        assert upstream.process.stop() == 0
        line = upstream.process.said().splitlines()[-1]
    assert json.loads(line)["totals"]["requests"] == 0


def test_the_page_is_self_contained(tmp_path: Path):
    """One HTML file with the figures and a plot, loading nothing from anywhere; what was not measured is named."""
    result = compare.compare(["direct"], ["steady"], silent, rounds=1, shorter=0.1)
    file = tmp_path / "compare.json"
    file.write_text(json.dumps(result))
    absent = report.build(report.read([file]), tmp_path / "page.html", tmp_path / "page.png")
    page = (tmp_path / "page.html").read_text()
    assert "<svg" in page
    assert "Latency in ms" in page
    assert "Cancel latency, by phase" in absent
    assert not any(loads in page for loads in ("src=", "<script", "<link", "@import"))
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


def test_a_file_that_is_no_result_is_named(tmp_path: Path):
    """The report says which file it cannot use."""
    file = tmp_path / "other.json"
    file.write_text("[1]")
    with pytest.raises(ValueError, match=r"other\.json: not a result"):
        report.read([file])
