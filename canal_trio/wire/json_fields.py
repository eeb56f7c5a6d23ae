"""The fields of a JSON request that a gateway judges: `model`, `stream` and `stream_options`, and where they stand.

What was judged must be what the upstream gets, whichever parser it has: of two equal keys some take the first and some
the last, and some do not tell upper case from lower. So a body that has one of these keys twice, compared unescaped and
without case, is refused. msgspec decides what JSON is, and what the fields say.

One search finds every place in the body that could be one of the keys, in any spelling. Where each of them is spelled
as nearly everybody does, and none is there twice, that place is the key; else a scan of the top level tells. Time is
O(length), and nothing is copied. What the scan costs for a key is bounded by their number: the loop waits for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import islice
from typing import Final

import msgspec
from msgspec import UNSET

from canal_trio.hooks import Wanted
from canal_trio.wire.splice import Edit

__all__ = ["JsonFields", "json_fields"]

_JUDGED: Final = ("model", "stream", "stream_options")
_USUAL: Final = {name.encode(): name for name in _JUDGED}  # as nearly everybody spells them


def _spelled(name: str) -> bytes:
    """A pattern for `name` in every spelling: escaped or not, in either case; the long s (ſ) is an s without case."""
    letters = []
    for letter in name:
        codes = {ord(letter), ord(letter.upper())}
        ways = [re.escape(chr(code).encode()) for code in codes]
        ways += [b"\\\\u%b" % re.sub(rb"[a-f]", lambda m: b"[%b%b]" % (m[0], m[0].upper()), b"%04x" % c) for c in codes]
        if letter == "s":
            ways += ["ſ".encode(), rb"\\u017[fF]"]
        letters.append(b"(?:%b)" % b"|".join(ways))
    return b"".join(letters)


_BLANK: Final = rb"[ \t\r\n]*+"
_STRING: Final = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
# No possessive repeat of alternatives: before 3.11.5 (Debian 12 has 3.11.2) `re` gets them wrong (CPython gh-106052).
_PLAIN: Final = rb'[^"{}\[\]]*+(?:%b[^"{}\[\]]*+)*+' % _STRING
# The key, and its value if that is a string. Most strings begin otherwise, which is seen at once.
_CANDIDATE: Final = re.compile(
    rb'"(?=[mMsS\\\xc5])(%b|%b(?:%b)?)"%b:%b(%b|)'
    % (_spelled("model"), _spelled("stream"), _spelled("_options"), _BLANK, _BLANK, _STRING),
    re.DOTALL,
)
_OPEN: Final = re.compile(rb"%b\{%b" % (_BLANK, _BLANK))
_KEY: Final = re.compile(rb"(%b)%b:%b" % (_STRING, _BLANK, _BLANK), re.DOTALL)
_SCALAR: Final = re.compile(rb'%b|[^"{}\[\], \t\r\n]++' % _STRING, re.DOTALL)
_NEXT: Final = re.compile(rb"%b,%b" % (_BLANK, _BLANK))
# Where the first byte behind a whole value stands, by msgspec, counted from one.
_BEHIND: Final = re.compile(r"trailing characters \(byte (\d+)\)")
# To the next bracket that does not belong to a flat object or array.
_INSIDE: Final = re.compile(
    rb"[^\"{}\[\]]*+(?:(?>%b|\{%b\}|\[%b\])[^\"{}\[\]]*+)*+" % (_STRING, _PLAIN, _PLAIN), re.DOTALL
)


MODEL_CHARACTERS: Final = 1024
MEMBERS: Final = 1000  # of an object that is scanned: more than any request has
_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")


class _Body(msgspec.Struct):
    model: str | None = None
    stream: msgspec.Raw | msgspec.UnsetType = UNSET
    stream_options: msgspec.Raw | msgspec.UnsetType = UNSET
    # What bounds a generation, as the APIs call it: of any type, for nobody is refused for its sake.
    max_completion_tokens: msgspec.Raw | msgspec.UnsetType = UNSET
    max_tokens: msgspec.Raw | msgspec.UnsetType = UNSET
    max_output_tokens: msgspec.Raw | msgspec.UnsetType = UNSET
    n: msgspec.Raw | msgspec.UnsetType = UNSET


class _Options(msgspec.Struct):
    include_usage: msgspec.Raw | msgspec.UnsetType = UNSET


_decode_body: Final = msgspec.json.Decoder(_Body).decode
_decode_options: Final = msgspec.json.Decoder(_Options).decode
_decode_raw: Final = msgspec.json.Decoder(msgspec.Raw).decode
_decode_number: Final = msgspec.json.Decoder(int | float | None).decode
_encode: Final = msgspec.json.Encoder().encode
_astuple: Final = msgspec.structs.astuple
_UNBOUNDED: Final = (UNSET,) * 4  # the last fields of a body that does not say how much it wants


class JsonFields(msgspec.Struct, frozen=True):
    """What a request's body says, and where its model stands (from `start` to `end`; 0 and 0 if it names none).

    `wanted` is how much it wants generated (None: it does not say). `usage` makes `stream_options.include_usage` true:
    there where a stream is asked for and the body does not say.
    """

    model: str | None = None
    stream: bool = False  # a stream is asked for
    wanted: Wanted | None = None
    start: int = 0
    end: int = 0
    usage: Edit | None = None

    def edits(self, model: str | None, *, usage: bool) -> tuple[Edit, ...]:
        """For an upstream that calls the model `model` (None: as the client does), and is asked for usage or not."""
        edits = (self.usage,) if usage and self.usage is not None else ()
        if model is None or self.model is None or model == self.model:
            return edits
        edit = Edit(self.start, self.end, _encode(model))
        return (*edits, edit) if edits else (edit,)


def json_fields(body: bytes) -> JsonFields | str:
    """The judged fields of `body`; a `str` says why it is refused, for people. Not a checkpoint."""
    try:
        try:
            said = _decode_body(body)
        except msgspec.DecodeError:
            said, body = _decode_mended(body)
    except msgspec.DecodeError as exc:
        return f"The body is not the JSON expected: {exc}."
    except UnicodeDecodeError:  # msgspec's, for a string that it is asked for
        return "The body is not the JSON expected: the model's name is not UTF-8."
    except RecursionError:
        return "The body is nested too deeply."
    places: dict[str, tuple[int, int]] = {}  # the value of each; where it is no string, its beginning twice
    for match in _CANDIDATE.finditer(body):
        name = _USUAL.get(match[1])
        if name is None or name in places:
            scanned = _by_scan(body)
            if isinstance(scanned, str):
                return scanned
            places = scanned
            break
        places[name] = match.span(2)
    model = said.model
    if model is not None and len(model) > MODEL_CHARACTERS:
        return "The body's 'model' is too long for a name."  # which is kept by what counts, and may be megabytes
    start, end = (0, 0) if model is None else places["model"]
    wanted = None if _astuple(said)[3:] == _UNBOUNDED else _wanted(said)
    if said.stream is UNSET or bytes(said.stream) != b"true":
        return JsonFields(model, False, wanted, start, end)
    return JsonFields(model, True, wanted, start, end, _usage_edit(body, said, places))


def _decode_mended(body: bytes) -> tuple[_Body, bytes]:
    """What msgspec would read, if it took half a surrogate pair, and the body so mended, with each byte in its place.

    Clients that cut a text in two send some, and it is for the upstream to say what it makes of them; only a model's
    name may not have any.
    """
    mended = _SURROGATE.sub(rb"\\ufffd", body)
    said = _decode_body(mended)
    if isinstance(said.model, str) and "\ufffd" in said.model:
        raise msgspec.DecodeError("the model's name cannot be read")
    return said, mended


def _wanted(said: _Body) -> Wanted:
    """How much is to be generated. What is not a number says nothing: the upstream will tell what is wrong with it."""
    most = said.max_completion_tokens, said.max_tokens, said.max_output_tokens
    tokens = (number for raw in most if (number := _number(raw)) is not None)
    return Wanted(next(tokens, None), _number(said.n))


def _number(raw: msgspec.Raw | msgspec.UnsetType) -> float | None:
    try:
        return None if raw is UNSET else _decode_number(raw)
    except msgspec.DecodeError:
        return None


def _by_scan(body: bytes) -> dict[str, tuple[int, int]] | str:
    """Where the values of the top level's keys stand; a `str` says which is there twice, for people."""
    places: dict[str, tuple[int, int]] = {}
    for number, (key, *place) in enumerate(_top_level(body)):
        if number == MEMBERS:
            return f"The body has more than {MEMBERS} fields."
        name = _folded(key[1:-1])
        if name in places and name in _JUDGED:
            return f"The body has '{name}' more than once."
        places[name] = place[0], place[1]
    return places


def _usage_edit(body: bytes, said: _Body, places: dict[str, tuple[int, int]]) -> Edit | None:
    """`stream_options.include_usage` becomes true in a body that asks for a stream, and does not say.

    None where it says (that is respected), or where `stream_options` is of another kind or in another case: some
    parsers read it, and would have it twice. None, too, where there is too much to look through.
    """
    if said.stream_options is UNSET:
        if "stream_options" in places and _may_have(body, "stream_options"):
            return None
        at = body.index(b"{") + 1
        return Edit(at, at, b'"stream_options":{"include_usage":true},')  # never the only one: there is `stream`
    options, start = bytes(said.stream_options), places["stream_options"][0]
    if options == b"null":
        return Edit(start, start + 4, b'{"include_usage":true}')
    if not options.startswith(b"{") or _says(options):
        return None
    members = list(islice(_top_level(options), MEMBERS))
    nulls = [place for key, *place in members if _folded(key[1:-1]) == "include_usage"]
    if len(nulls) > 1 or len(members) == MEMBERS:
        return None  # one of them may say
    if nulls:
        return Edit(start + nulls[0][0], start + nulls[0][1], b"true")
    comma = b"," if options[1:-1].strip() else b""
    return Edit(start + 1, start + 1, b'"include_usage":true' + comma)


def _may_have(body: bytes, name: str) -> bool:
    """Is there a key `name` at the top level? Also true where there are too many to be sure."""
    folded = [_folded(key[1:-1]) for key, _, _ in islice(_top_level(body), MEMBERS)]
    return name in folded or len(folded) == MEMBERS


def _says(options: bytes) -> bool:
    """Whether there shall be a usage chunk; null does not say."""
    said = _decode_options(options).include_usage
    return said is not UNSET and bytes(said) != b"null"


# -- the scan ----------------------------------------------------------------------------------------------------------


def _folded(key: bytes) -> str:
    """A key, given without its quotes, without its escapes and its case."""
    usual = _USUAL.get(key)
    if usual is not None:
        return usual
    return str(json.loads(f'"{key.decode("utf-8", "replace")}"', strict=False)).casefold()


def _top_level(body: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Each key of the object that the JSON in `body` is, as it is written, and where its value begins and ends."""
    opened = _OPEN.match(body)
    at = opened.end() if opened is not None else len(body)
    while (match := _KEY.match(body, at)) is not None:
        end = _value_end(body, match.end())
        yield match[1], match.end(), end
        following = _NEXT.match(body, end)
        if following is None:
            return
        at = following.end()


def _value_end(body: bytes, start: int) -> int:
    """Where the value at `start` of valid JSON ends."""
    if body[start] not in b"{[":
        scalar = _SCALAR.match(body, start)
        assert scalar is not None, "not JSON"
        return scalar.end()
    try:
        _decode_raw(memoryview(body)[start:])
    except msgspec.DecodeError as exc:
        behind = _BEHIND.search(str(exc))
        if behind is not None and body[start + int(behind[1]) - 1] in b",}":
            return start + int(behind[1]) - 1  # perhaps with blanks before it
    return _walked_end(body, start)


def _walked_end(body: bytes, start: int) -> int:
    """As `_value_end` for an array or object, by ourselves: for an msgspec that says it in other words."""
    depth, at = 1, start + 1
    while depth:
        inside = _INSIDE.match(body, at)
        assert inside is not None  # it may be empty
        depth += 1 if body[inside.end()] in b"{[" else -1
        at = inside.end() + 1
    return at
