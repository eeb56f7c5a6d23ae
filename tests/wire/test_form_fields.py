"""Multipart forms: the model is found, is there once, is exchanged in place, and nothing ambiguous passes."""

from __future__ import annotations

import email
import email.policy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from canal_trio.wire.form_fields import FormFields, form_fields, is_form
from canal_trio.wire.splice import splice

TYPE = b"multipart/form-data; boundary=B0undary"
MODEL = b'Content-Disposition: form-data; name="model"'
FILE = b'Content-Disposition: form-data; name="file"; filename="a.wav"\r\nContent-Type: audio/wav'


def form(*parts: tuple[bytes, bytes], end: bytes = b"--\r\n") -> bytes:
    """A form of these heads and contents."""
    return b"".join(b"--B0undary\r\n%b\r\n\r\n%b\r\n" % part for part in parts) + b"--B0undary" + end


@pytest.mark.parametrize("value", [b"multipart/form-data; boundary=x", b"Multipart/Form-Data;boundary=x"])
def test_a_form_is_told_by_its_type(value: bytes):
    """In any case; nothing else is one."""
    assert is_form(value)
    assert not is_form(b"multipart/mixed; boundary=x")
    assert not is_form(b"application/json")


@pytest.mark.parametrize(
    "content_type",
    [
        b"multipart/form-data; boundary=B0undary",
        b'multipart/form-data; boundary="B0undary"',
        b"Multipart/Form-Data ; Boundary=B0undary; charset=utf-8",
        b"multipart/form-data;charset=UTF-8;boundary=B0undary",  # Spring
    ],
)
def test_the_model_is_found(content_type: bytes):
    """Before or behind the file, whatever the parts are called besides."""
    file = (FILE, b"RIFF\r\n--B0undar\r\n\0\xff")
    for parts in (((MODEL, b"whisper-1"), file), (file, (MODEL, b"whisper-1"))):
        body = form(*parts)
        fields = form_fields(content_type, body)
        assert isinstance(fields, FormFields)
        assert fields.model == "whisper-1"
        assert body[fields.start : fields.end] == b"whisper-1"
    assert form_fields(content_type, form(file)) == FormFields()


@given(
    st.lists(st.tuples(st.sampled_from(["file", "prompt", "image[]"]), st.binary(max_size=20)), max_size=4),
    st.text(max_size=10),
    st.text(min_size=1, max_size=10).filter(lambda text: not set(text) & set("\r\n")),
    st.integers(0, 4),
)
def test_an_alias_changes_the_model_and_nothing_else(others: list[tuple[str, bytes]], model: str, alias: str, at: int):
    """Every byte outside of the model's part stays, and a form library reads the new name."""
    parts = [(b'Content-Disposition: form-data; name="%b"' % name.encode(), data) for name, data in others]
    parts.insert(min(at, len(parts)), (MODEL, model.encode()))
    body = form(*parts)
    fields = form_fields(TYPE, body)
    assert isinstance(fields, FormFields)
    assert fields.model == model
    edits = fields.edits(alias, usage=True)
    assert len(edits) == (alias != model)
    assert fields.edits(None, usage=True) == ()
    after = b"".join(splice([body], edits))
    expected = [(head, alias.encode() if head == MODEL else data) for head, data in parts]
    assert after == form(*expected)
    message = email.message_from_bytes(b"Content-Type: %b\r\n\r\n%b" % (TYPE, after), policy=email.policy.HTTP)
    read: list[Any] = [part.get_payload(decode=True) for part in message.iter_parts()]  # type: ignore[attr-defined]
    assert len(read) == len(parts)


def refusals() -> dict[str, tuple[bytes, bytes]]:
    """Forms that some parser reads in another way."""
    one = (MODEL, b"a")
    return {
        "no boundary": (b"multipart/form-data", form(one)),
        "two boundaries": (b"multipart/form-data; boundary=B0undary; boundary=x", form(one)),
        "a preamble": (TYPE, b"hello\r\n" + form(one)),
        "an epilogue": (TYPE, form(one, end=b"--\r\n--B0undary\r\n")),
        "a boundary with blanks": (TYPE, b"--B0undary \r\n" + form(one)[12:]),
        "a longer boundary": (TYPE, form(one).replace(b"a\r\n--B0undary", b"a\r\n--B0undaryX")),
        "line feeds only": (TYPE, form(one).replace(b"\r\n", b"\n")),
        "a boundary behind a line feed": (TYPE, form((FILE, b"x\n--B0undary\r\n" + MODEL + b"\r\n\r\nb"), one)),
        "the boundary inside a line": (TYPE, form((FILE, b"x --B0undary"), one)),
        "the boundary in the head of a part": (TYPE, form((FILE + b"\r\n--B0undaryX: y", b"a"), one)),
        "an empty part without its line end": (TYPE, form((MODEL, b"")).replace(b"\r\n\r\n\r\n", b"\r\n\r\n")),
        "no end": (TYPE, form(one)[:-14]),
        "no fields": (TYPE, form((b"", b"a"))),
        "a folded field": (TYPE, form((b"Content-Disposition: form-data;\r\n name=model", b"a"))),
        "a large head": (TYPE, form((MODEL + b"\r\nX: " + b"x" * 9000, b"a"))),
        "two dispositions": (TYPE, form((MODEL + b"\r\n" + MODEL, b"a"))),
        "two names": (TYPE, form((MODEL + b'; name="x"', b"a"))),
        "a name inside of a name": (TYPE, form((MODEL.replace(b"model", b"x; name=model"), b"a"))),
        "a name inside of a file's": (TYPE, form((FILE.replace(b'filename="', b'filename="; Name = model; '), b"a"))),
        "an extended name": (TYPE, form((b"Content-Disposition: form-data; name*=UTF-8''model", b"a"))),
        "an escape in the name": (TYPE, form((rb'Content-Disposition: form-data; name="mod\el"', b"a"))),
        "an attachment": (TYPE, form((b'Content-Disposition: attachment; name="model"', b"a"))),
        "no disposition": (TYPE, form((b"Content-Type: text/plain", b"a"))),
        "an encoding": (TYPE, form((MODEL + b"\r\nContent-Transfer-Encoding: quoted-printable", b"=61"))),
        "twice": (TYPE, form(one, (MODEL, b"b"))),
        "twice in upper case": (TYPE, form(one, (MODEL.replace(b"model", b"MODEL"), b"b"))),
        "twice as a list": (TYPE, form(one, (MODEL.replace(b"model", b"model[]"), b"b"))),
        "twice in brackets": (TYPE, form(one, (MODEL.replace(b"model", b"model[0]"), b"b"))),
        "only in upper case": (TYPE, form((MODEL.replace(b"model", b"Model"), b"b"))),
        "as a file": (TYPE, form((MODEL + b'; filename="m"', b"a"))),
        "as a file with an extended name": (TYPE, form((MODEL + b"; filename*=UTF-8''m", b"a"))),
        "as JSON": (TYPE, form((MODEL + b"\r\nContent-Type: application/json", b'"a"'))),
        "in UTF-16": (TYPE, form((MODEL + b"\r\nContent-Type: text/plain; charset=utf-16", b"a"))),
        "in Latin-1": (TYPE, form((MODEL + b"\r\nContent-Type: text/plain; charset=ISO-8859-1", "é".encode()))),
        "not UTF-8": (TYPE, form((MODEL, b"\xff"))),
        "too long": (TYPE, form((MODEL, b"a" * 1025))),
        "too many parts": (TYPE, form(*[(FILE, b"")] * 4097)),
    }


@pytest.mark.parametrize("case", refusals())
def test_what_some_parser_reads_in_another_way_is_refused(case: str):
    """With a sentence that says what it is about."""
    said = form_fields(*refusals()[case])
    assert isinstance(said, str)
    assert "form" in said


def test_what_is_plain_is_not_refused():
    """A part may say that it is text in UTF-8, that it is not encoded, and have further fields."""
    plain = MODEL + b"\r\nContent-Type: text/plain; charset=UTF-8\r\nContent-Transfer-Encoding: 8bit\r\nX-Y: z"
    token = b"content-disposition: form-data; name=model"
    for head in (plain, token, plain.replace(b"UTF-8", b"ISO-8859-1")):  # the last one is Apache's HttpClient for Java
        fields = form_fields(TYPE, form((head, b"a")))
        assert isinstance(fields, FormFields)
        assert fields.model == "a"
    assert form_fields(TYPE, b"--B0undary--") == FormFields()


def test_blanks_in_the_heads_of_parts_froze_every_stream():
    """A run of blanks is looked at once: this megabyte took twenty seconds, in which the loop stood still."""
    blanks = b" \t" * 3900
    part = (FILE + b"\r\nX: \t a" + blanks + b"b" + b" \t", b"")
    fields = form_fields(TYPE, form(*[part] * 120, (b"Content-Disposition:\t" + MODEL[21:] + b" \t", b"a")))
    assert isinstance(fields, FormFields)
    assert fields.model == "a"
