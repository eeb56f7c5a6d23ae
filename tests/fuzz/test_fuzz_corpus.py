"""The corpus of the fuzzer, replayed: every input that once was of interest passes every target's oracle."""

from __future__ import annotations

from pathlib import Path

import fuzz_bodies
import fuzz_http
import fuzz_targets
import pytest
from fuzz_run import TARGETS as NAMES
from fuzz_targets import TARGETS

from canal_trio.errors import ConfigError
from canal_trio.messages import End
from canal_trio.wire import headers as fields
from canal_trio.wire.form_fields import FormFields
from canal_trio.wire.json_fields import JsonFields

CORPUS = Path(__file__).parent / "corpus"


@pytest.mark.parametrize("name", NAMES)
def test_the_corpus_passes(name: str) -> None:
    """No oracle objects to an entry, whichever target it was kept for: they are all strangers' bytes."""
    target = TARGETS[name]
    entries = sorted(CORPUS.rglob("*/*"))
    assert len(list((CORPUS / name).iterdir())) >= 10, "the corpus of this target is not here"
    for path in entries:
        try:
            target(path.read_bytes())
        except Exception as exc:
            raise AssertionError(f"{path} does not pass {name}") from exc


def test_the_corpus_is_small() -> None:
    """It is kept in the repository, so it stays below 300 KiB, in files of a few hundred bytes."""
    sizes = [path.stat().st_size for path in CORPUS.rglob("*/*")]
    assert sum(sizes) <= 300 * 1024
    assert max(sizes) <= 1500


class Deaf:
    """Decoder, scanner and filter at once: it lets everything pass and understands nothing."""

    def __init__(self) -> None:
        self.events, self.at_boundary, self.terminal, self.error, self.usage = 0, True, False, False, None
        self.end, self.fault, self.rest, self.going_away = End(), None, b"", False

    def feed(self, data: bytes) -> bytes:
        """All of it."""
        return data


def refuse(*_: object) -> object:
    """A complaint without a place."""
    raise ConfigError("something is wrong")


FORM = b'--X\r\nContent-Disposition: form-data; name="model"\r\n\r\na\r\n--X--\r\n'
SPOILT = {
    "request_heads": (
        fields,
        "for_upstream",
        lambda head, _: head,
        b"\0GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
    ),
    "responses": (
        fuzz_http,
        "response_decoder",
        lambda *_: Deaf(),
        b"\0\0HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok!",
    ),
    "chunks": (fuzz_http, "ChunkedDecoder", Deaf, b"\x002\r\nok\r\n0\r\n\r\n"),
    "event_streams": (fuzz_targets, "EventScanner", Deaf, b"\0data: 1\n\n"),
    "json_requests": (fuzz_bodies, "json_fields", lambda _: JsonFields("m"), b'{"model":"a"}'),
    "forms": (fuzz_bodies, "form_fields", lambda *_: FormFields(), FORM),
    "usages": (fuzz_bodies, "BodyUsage", Deaf, b'\0{"usage":{"prompt_tokens":1}}'),
    "frames": (fuzz_targets, "FrameFilter", Deaf, b"\0\0\0\x08\7" + bytes(7) + b"\5" + bytes(4)),
    "configurations": (fuzz_targets, "load", refuse, b"[server]\nworkers = 0\n"),
}


@pytest.mark.parametrize("name", NAMES)
def test_every_oracle_can_object(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one part of the product spoilt an oracle objects to the plainest input, and without it does not."""
    module, attribute, wrong, data = SPOILT[name]
    TARGETS[name](data)
    monkeypatch.setattr(module, attribute, wrong)
    with pytest.raises(AssertionError):
        TARGETS[name](data)
