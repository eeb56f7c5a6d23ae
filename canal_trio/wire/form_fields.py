"""The `model` of a multipart form (audio, images), and where it stands.

What was judged must be what the upstream gets, and parsers of forms differ wherever the grammar leaves them room. So
only what all of them read alike is accepted (RFC 7578 as browsers, curl and the SDKs write it): no preamble, CRLF line
ends, the boundary nowhere else, one Content-Disposition per part with one plain `name`, no folded fields, no encoded
parts. A second `model`, in any case or with brackets behind it, is refused; so is one that a charset would change.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Final

from canal_trio.wire.splice import Edit

__all__ = ["FormFields", "form_fields", "is_form"]

HEAD_BYTES: Final = 8192  # of one part
PARTS: Final = 4096
MODEL_BYTES: Final = 1024

_BOUNDARY: Final = re.compile(
    rb"multipart/form-data[ \t]*(?:;[ \t]*charset=\"?utf-?8\"?[ \t]*)?"
    rb";[ \t]*boundary=(?:\"([0-9A-Za-z'()+_,./:=?-]{1,70})\"|([0-9A-Za-z'+_.-]{1,70}))[ \t]*"
    rb"(?:;[ \t]*charset=\"?utf-?8\"?[ \t]*)?",
    re.IGNORECASE,
)
_FIELD: Final = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([^\x00-\x08\x0a-\x1f\x7f]*)")
_DISPOSITION: Final = re.compile(
    rb"form-data[ \t]*;[ \t]*name=(?:\"([^\"\\\x00-\x1f]*)\"|([!#$&+.^_`|~0-9A-Za-z-]+))"
    rb"([ \t]*;[ \t]*filename=(?:\"(?:[^\"\\\x00-\x1f]|\\.)*\"|[^\s\";]+))?([ \t]*;[ \t]*filename\*=[^\s\";]+)?",
    re.IGNORECASE,
)
_NAMES: Final = re.compile(rb"\bname[ \t]*=", re.IGNORECASE)  # in quotes, too: some look for one without minding them
_TEXT: Final = re.compile(rb"text/plain(?:[ \t]*;[ \t]*charset=\"?(?:(utf-?8)|us-ascii|iso-8859-1)\"?)?", re.IGNORECASE)
_UNENCODED: Final = frozenset({b"binary", b"8bit", b"7bit"})


@dataclass(frozen=True, slots=True)
class FormFields:
    """What a form says; `start` and `end` are where its `model` stands. The rest is what only JSON can say."""

    model: str | None = None
    start: int = 0
    end: int = 0
    stream: ClassVar[bool] = False
    wanted: ClassVar[None] = None
    usage: ClassVar[None] = None

    def edits(self, model: str | None, *, usage: bool) -> tuple[Edit, ...]:
        """For an upstream that calls the model `model`, without line ends (None: as the client does)."""
        if model is None or self.model is None or model == self.model:
            return ()
        return (Edit(self.start, self.end, model.encode()),)


@dataclass(frozen=True, slots=True)
class _Part:
    name: str
    file: bool
    type: bytes  # `b""` if it has none
    start: int
    end: int


def is_form(content_type: bytes) -> bool:
    """Is it a multipart form, by its content type?"""
    return content_type.partition(b";")[0].strip(b" \t").lower() == b"multipart/form-data"


def form_fields(content_type: bytes, body: bytes) -> FormFields | str:
    """The `model` of a form; a `str` says why it is refused, for people. Not a checkpoint."""
    match = _BOUNDARY.fullmatch(content_type.strip(b" \t"))
    if match is None:
        return "The form's content type is not 'multipart/form-data; boundary=…'."
    parts = _parts(body, b"--" + (match[1] or match[2]))
    if isinstance(parts, str):
        return parts
    models = [part for part in parts if part.name.partition("[")[0].strip().casefold() == "model"]
    if len(models) > 1:
        return "The form has 'model' more than once."
    return _model(models[0], body) if models else FormFields()


def _model(part: _Part, body: bytes) -> FormFields | str:
    kind = _TEXT.fullmatch(part.type or b"text/plain")
    if part.name != "model" or part.file or kind is None:
        return "The form's 'model' is not a plain field of that name."
    try:
        text = body[part.start : min(part.end, part.start + MODEL_BYTES + 1)].decode()
    except UnicodeDecodeError:
        return "The form's 'model' is not UTF-8."
    if part.end - part.start > MODEL_BYTES:
        return "The form's 'model' is too long for a name."
    if b"charset" in part.type.lower() and kind[1] is None and not text.isascii():
        return "The form's 'model' is in another charset than UTF-8."  # which reads ASCII as everybody does
    return FormFields(text, part.start, part.end)


def _parts(body: bytes, delimiter: bytes) -> list[_Part] | str:
    """The parts of a form, or what is wrong with it."""
    if not body.startswith(delimiter):
        return "The form does not begin with its boundary."
    parts: list[_Part] = []
    at = len(delimiter)
    while not body.startswith(b"--", at):
        if not body.startswith(b"\r\n", at):
            return "A boundary of the form does not end with CRLF."
        head_end = body.find(b"\r\n\r\n", at, at + HEAD_BYTES)
        start = head_end + 4
        following = -1 if head_end < 0 else body.find(delimiter, start)
        end = following - 2
        if following < 0 or end < start or body[end:following] != b"\r\n":
            return "A part of the form has no plain end, or a head that is too large."
        if body.find(delimiter, at, head_end) >= 0:
            return "The form's boundary stands in the head of a part."  # where some look for it, and some do not
        part = _part(body[at + 2 : head_end], start, end)
        if isinstance(part, str):
            return part
        parts.append(part)
        if len(parts) > PARTS:
            return f"The form has more than {PARTS} parts."
        at = following + len(delimiter)
    if body[at + 2 :] not in (b"", b"\r\n"):
        return "There is something behind the form's last boundary."
    return parts


def _part(head: bytes, start: int, end: int) -> _Part | str:
    fields: dict[bytes, bytes] = {}
    for line in head.split(b"\r\n"):
        match = _FIELD.fullmatch(line)
        name = match[1].lower() if match is not None else b""
        if match is None or name in fields:
            return "A part of the form has a malformed or repeated field."
        fields[name] = match[2].strip(b" \t")  # not by the pattern: it would try each end of a run of blanks
    if fields.get(b"content-transfer-encoding", b"binary").lower() not in _UNENCODED:
        return "A part of the form has a Content-Transfer-Encoding."
    disposition = fields.get(b"content-disposition", b"")
    match = _DISPOSITION.fullmatch(disposition)
    if match is None or len(_NAMES.findall(disposition)) != 1:
        return "A part of the form has no plain Content-Disposition."
    name = match[1] if match[1] is not None else match[2]
    file = match[3] is not None or match[4] is not None
    return _Part(name.decode("utf-8", "replace"), file, fields.get(b"content-type", b""), start, end)
