"""Bodies as the fuzzer sees them: what a JSON request or a form says of its model, what an answer says of its usage.

See `fuzz_targets`. The oracles: the standard library's JSON, asked for every key in its order, and a form taken apart
at its boundaries. What was judged is what anybody reads there, and an edit changes that and nothing else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from fuzz_http import same_at_every_cut

from canal_trio.hooks import Usage
from canal_trio.wire.form_fields import FormFields, form_fields
from canal_trio.wire.json_fields import JsonFields, json_fields
from canal_trio.wire.splice import splice
from canal_trio.wire.usage import BodyUsage, StreamUsage, usage_of

OTHER = "another \"model\" \u00e9"


class Pairs(list[tuple[str, Any]]):
    """An object with all its members, those of equal names too."""

    def of(self, name: str) -> list[Any]:
        """The values of the members that some parser could take for `name`."""
        return [value for key, value in self if key.casefold() == name]


def read_json(body: bytes) -> Any:
    """What the standard library reads, None if nothing."""
    try:
        return json.loads(body.decode("utf-8", "replace"), object_pairs_hook=Pairs)
    except (ValueError, RecursionError):
        return None


def json_requests(data: bytes) -> None:
    """A JSON request: what is judged, and what its edits make of it."""
    found = json_fields(data)
    if isinstance(found, str):
        assert found
        return
    document = read_json(data)
    if document is None:
        return  # too deep for the standard library, or a number too long for it
    assert isinstance(document, Pairs), data
    for name in ("model", "stream", "stream_options"):
        assert len(document.of(name)) <= 1, data
    said = dict(document)
    assert found.model == (said["model"] if isinstance(said.get("model"), str) else None) or "\\u" in repr(data), data
    assert found.stream == (said.get("stream") is True), data
    edited(data, found, document)


def edited(data: bytes, found: JsonFields, document: Pairs) -> None:
    """Every member but the edited one is as it was, in its order, and the edited one says what it should."""
    if found.model is not None:
        changed = read_json(b"".join(splice([data], found.edits(OTHER, usage=False))))
        assert changed == [(key, OTHER if key == "model" else value) for key, value in document], data
    edit = found.usage
    if edit is not None:
        changed = read_json(b"".join(splice([data[:3], data[3:]], [edit])))
        (options,) = changed.of("stream_options")
        assert options.of("include_usage") == [True], data
        rest = [(key, value) for key, value in changed if key != "stream_options"]
        assert rest == [(key, value) for key, value in document if key != "stream_options"], data
        before = document.of("stream_options")
        kept = before[0] if before and before[0] is not None else []
        others = [[pair for pair in pairs if pair[0].casefold() != "include_usage"] for pairs in (options, kept)]
        assert others[0] == others[1], data


BOUNDARY = b"--X"


def forms(data: bytes) -> None:
    """A multipart form, whose boundary is X."""
    found = form_fields(b"multipart/form-data; boundary=X", data)
    if isinstance(found, str):
        assert found
        return
    parts = (b"\r\n" + data).split(b"\r\n" + BOUNDARY)
    assert parts[0] == b"", data
    assert parts[-1] in (b"--", b"--\r\n"), data
    models = []
    for part in parts[1:-1]:
        head, blank, content = part.partition(b"\r\n\r\n")
        assert blank, data
        if re.search(rb'(?im)^content-disposition:[^\r\n]*\bname=(?:"model(?:\[\])?"|model(?:\[\])?(?:[\s;]|$))', head):
            models.append(content)
    assert models == ([found.model.encode()] if found.model is not None else []), data
    if found.model is not None:
        changed = b"".join(splice([data], found.edits("m", usage=False)))
        again = form_fields(b'Multipart/Form-Data; boundary="X"', changed)
        assert isinstance(again, FormFields)
        assert again.model == "m"


def usages(data: bytes) -> None:
    """An answer, as a JSON object and as an event stream: its token counts."""

    def read(reads: list[bytes]) -> Any:
        body, stream = BodyUsage(), StreamUsage()
        for read in reads:
            body.feed(read)
            stream.feed(read)
        return body.usage, stream.usage

    raw, (in_body, _) = same_at_every_cut(data, read)
    document = read_json(raw)
    # Escaped names are not looked for, and the standard library reads a little more than JSON.
    if isinstance(document, Pairs) and raw.isascii() and not re.search(rb"\\|NaN|nfinity", raw):
        found: Usage | None = None
        for value in usages_in(document):
            found = usage_of(plain(value)) or found
        assert in_body == found, raw


def usages_in(document: Pairs) -> Iterator[Any]:
    """The values of each `usage` at the top and in `response`, in their order."""
    for key, value in document:
        if key == "usage":
            yield value
        if key == "response" and isinstance(value, Pairs):
            yield from (inner for name, inner in value if name == "usage")


def plain(value: Any) -> Any:
    """With dicts, the last of equal members counting."""
    return {key: plain(inner) for key, inner in value} if isinstance(value, Pairs) else value
