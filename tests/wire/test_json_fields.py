"""JSON requests: what they say, that it is said once, and edits that change nothing else, by Python's json."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from canal_trio.wire.json_fields import MEMBERS, JsonFields, _by_scan, _value_end, _walked_end, json_fields
from canal_trio.wire.splice import Edit, splice

JUDGED = ("model", "stream", "stream_options")

# -- JSON texts of every style -----------------------------------------------------------------------------------------

BLANKS = st.sampled_from(["", "", " ", "\r\n\t"])
NUMBERS = st.sampled_from(["0", "-1", "1e400", "123456789012345678901234567890", "1.50", "-0.0", "6E-7"])


@st.composite
def strings(draw: st.DrawFn, text: str | None = None) -> str:
    """A JSON string, each character escaped or not."""
    value = text if text is not None else draw(st.text('abc{}[]",:\\/é\u2028\n😀ſ', max_size=6))
    which = draw(st.sampled_from([0, 0, 0, 1, 2, 5, 255])) if value else 0  # the characters that are escaped
    out = []
    for number, char in enumerate(value):
        code = char.encode("utf-16-be")
        escaped = "".join(f"\\u{code[at : at + 2].hex()}" for at in range(0, len(code), 2))
        plain = json.dumps(char, ensure_ascii=False)[1:-1]
        out.append((escaped.upper().replace("U", "u") if which == 5 else escaped) if which >> number & 1 else plain)
    return '"' + "".join(out) + '"'


def values(depth: int = 2) -> st.SearchStrategy[str]:
    """Any JSON value, as text."""
    scalars = st.one_of(NUMBERS, st.sampled_from(["true", "false", "null"]), strings())
    if depth == 0:
        return scalars
    return st.one_of(scalars, lists(depth), objects(depth))


@st.composite
def lists(draw: st.DrawFn, depth: int) -> str:
    """An array, as text."""
    members = draw(st.lists(values(depth - 1), max_size=3))
    return "[" + ",".join(draw(BLANKS) + member + draw(BLANKS) for member in members) + draw(BLANKS) + "]"


@st.composite
def objects(draw: st.DrawFn, depth: int) -> str:
    """An object, as text; its keys may be those that are judged elsewhere, and may come twice."""
    keys = st.one_of(st.sampled_from([*JUDGED, "include_usage", "a"]), st.text("ab", max_size=2))
    members = [(draw(strings(key)), draw(values(depth - 1))) for key in draw(st.lists(keys, max_size=3))]
    return written(draw, members)


def written(draw: st.DrawFn, members: list[tuple[str, str]]) -> str:
    """An object of these members, with blanks where they may be."""
    inner = ",".join(
        draw(BLANKS) + key + draw(BLANKS) + ":" + draw(BLANKS) + value + draw(BLANKS) for key, value in members
    )
    return "{" + (inner or draw(BLANKS)) + "}"


OTHER = st.one_of(st.text("abn", max_size=3), st.sampled_from(["Modell", "streams", "", "models", "é"]))


@st.composite
def requests(draw: st.DrawFn) -> str:
    """A request's body in which each judged key is there once at most, as text."""
    members = [(draw(strings(key)), draw(values())) for key in draw(st.lists(OTHER, max_size=4))]
    if draw(st.booleans()):
        members.append((draw(strings("model")), draw(strings("gpt-4o"))))
    if draw(st.booleans()):
        members.append((draw(strings("stream")), draw(st.sampled_from(["true", "true", "false", "1"]))))
    if draw(st.booleans()):
        options = st.one_of(st.just("null"), st.just("{}"), objects(1), st.just("[1]"))
        members.append((draw(strings("stream_options")), draw(options)))
    return draw(BLANKS) + written(draw, draw(st.permutations(members))) + draw(BLANKS)


# -- the oracle --------------------------------------------------------------------------------------------------------


def pairs(text: str | bytes) -> Any:
    """Python's reading of a JSON text: objects as lists of pairs, numbers as they are written."""
    return json.loads(text, object_pairs_hook=lambda found: ("object", found), parse_int=str, parse_float=str)


def changed(tree: Any, key: str, change: Any) -> Any:
    """`tree` with the value of the top level's `key` made another one."""
    return ("object", [(name, change(value) if name == key else value) for name, value in tree[1]])


def model_edit(fields: JsonFields, model: str) -> Edit:
    """The only edit for an upstream with another name for the model."""
    (edit,) = fields.edits(model, usage=False)
    return edit


def edited(body: bytes, edit: Any) -> bytes:
    """The body after the edit, whose bytes around it are the same by construction of `splice` and by this."""
    out = b"".join(splice([body], [edit]))
    assert out[: edit.start] == body[: edit.start]
    assert out[edit.start + len(edit.text) :] == body[edit.end :]
    return out


@given(requests())
def test_the_fields_are_those_that_json_reads(text: str):
    """`model`, `stream` and `include_usage` are what a JSON library finds, in any spelling and spacing."""
    body = text.encode()
    tree, fields = dict(pairs(text)[1]), json_fields(body)
    assert isinstance(fields, JsonFields)
    assert fields.model == tree.get("model")
    assert fields.stream is (tree.get("stream") is True)
    if fields.model is not None:
        assert json.loads(body[fields.start : fields.end]) == fields.model


@given(requests())
def test_the_search_finds_the_model_where_the_scan_does(text: str):
    """Where every key is spelled as usual its place is the search's, else the scan's: it is the same one."""
    body = text.encode()
    fields, places = json_fields(body), _by_scan(body)
    assert isinstance(fields, JsonFields)
    assert isinstance(places, dict)
    if fields.model is not None:
        assert (fields.start, fields.end) == places["model"]


@given(requests(), st.text(min_size=1, max_size=8))
def test_an_alias_changes_the_model_and_nothing_else(text: str, alias: str):
    """Equal apart from the model by a JSON library, and identical in every byte around it."""
    body = text.encode()
    fields = json_fields(body)
    assert isinstance(fields, JsonFields)
    if fields.model is None or fields.model == alias:
        assert fields.edits(alias, usage=False) == ()
        return
    edit = model_edit(fields, alias)
    assert json.loads(body[edit.start : edit.end]) == fields.model
    assert pairs(edited(body, edit)) == changed(pairs(text), "model", lambda _: alias)


def test_an_upstream_gets_both_edits_or_either_or_none():
    """What is asked of the edits is what they are: the model's if it has another name, the usage's if it is wanted."""
    fields = json_fields(b'{"model":"m","stream":true}')
    assert isinstance(fields, JsonFields)
    model, usage = Edit(9, 12, '"é"'.encode()), fields.usage
    assert fields.edits("é", usage=True) == (usage, model)
    assert fields.edits("é", usage=False) == (model,)
    assert fields.edits("m", usage=True) == fields.edits(None, usage=True) == (usage,)
    assert fields.edits("m", usage=False) == fields.edits(None, usage=False) == ()


@given(requests())
def test_asking_for_usage_changes_nothing_else(text: str):
    """Usage is asked for where a stream is and the body does not say; apart from that it is the same."""
    body = text.encode()
    fields = json_fields(body)
    assert isinstance(fields, JsonFields)
    edit = fields.usage
    before = pairs(text)
    options = dict(before[1]).get("stream_options")
    if edit is None:
        said = isinstance(options, tuple) and dict(options[1]).get("include_usage") is not None
        several = isinstance(options, tuple) and [key for key, _ in options[1]].count("include_usage") > 1
        other = options is not None and not isinstance(options, tuple)
        assert not fields.stream or said or several or other
        return
    after = edited(body, edit)
    again = json_fields(after)
    assert isinstance(again, JsonFields)
    assert (again.stream, again.usage) == (True, None)
    new = dict(pairs(after)[1])["stream_options"]
    assert dict(new[1]).pop("include_usage") is True

    def without(tree: Any) -> Any:
        kept = [(key, value) for key, value in tree[1] if key != "stream_options"]
        inner = [pair for key, value in tree[1] if key == "stream_options" and value for pair in value[1]]
        return kept, [(key, value) for key, value in inner if key != "include_usage"]

    assert without(pairs(after)) == without(before)


@st.composite
def spellings(draw: st.DrawFn, name: str) -> str:
    """A key that is `name` without escapes and without case."""
    chars = [draw(st.sampled_from([char, char.upper(), *("ſ" if char == "s" else "")])) for char in name]
    return draw(strings("".join(chars)))


@given(st.data())
def test_a_judged_key_is_there_once_or_refused(data: st.DataObject):
    """Two keys that some parser takes for the same judged one are refused, in any spelling; nested ones are not."""
    names = data.draw(st.lists(st.sampled_from([*JUDGED, "modell", "user"]), max_size=4))
    members = [(data.draw(spellings(name)), "null") for name in names]
    nested = data.draw(st.lists(st.sampled_from(JUDGED), max_size=3))
    inner = written(data.draw, [(data.draw(spellings(name)), "[{}]") for name in nested])
    members.insert(data.draw(st.integers(0, len(members))), ('"nested"', f'[[{inner}], "\\"model\\":"]'))
    fields = json_fields(written(data.draw, members).encode())
    twice = [name for name in JUDGED if names.count(name) > 1]
    if twice:
        assert isinstance(fields, str)
        assert any(f"'{name}' more than once" in fields for name in twice)
    else:
        assert isinstance(fields, JsonFields)


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (b'{"model":"a","model":"b"}', "The body has 'model' more than once."),
        (b'{"model":"a","mod\\u0065l":"b"}', "The body has 'model' more than once."),
        (b'{"model":"a","MODEL":"b"}', "The body has 'model' more than once."),
        (b'{"stream":true, "\\u0073tream" : false}', "The body has 'stream' more than once."),
        ('{"stream":true,"ſtream":false}'.encode(), "The body has 'stream' more than once."),
        (b'{"stream_options":{},"a":1,"stream_options":null}', "The body has 'stream_options' more than once."),
        (b"", "The body is not the JSON expected: Input data was truncated."),
        (b"[1]", "The body is not the JSON expected: Expected `object`, got `array`."),
        (b'{"model":"\\ud800"}', "The body is not the JSON expected: the model's name cannot be read."),
        (b'{"model":"\xff"}', "The body is not the JSON expected: the model's name is not UTF-8."),
        (b'{"model":3}', "The body is not the JSON expected: Expected `str | null`, got `int` - at `$.model`."),
        (b'{"model":"%b"}' % (b"a" * 1025), "The body's 'model' is too long for a name."),
        (b'{"model":"a"', "The body is not the JSON expected: Input data was truncated."),
        (b'\xef\xbb\xbf{"model":"a"}', "The body is not the JSON expected: "),
        ('{"model":"a"}'.encode("utf-16"), "The body is not the JSON expected: "),
        (b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}", "The body is nested too deeply."),
    ],
    ids=["plain", "escaped", "upper", "escaped-s", "long-s", "options", "empty", "array",
         "surrogate", "utf-8", "number", "long", "cut", "bom", "utf-16", "deep"],
)  # fmt: skip
def test_what_is_refused(body: bytes, complaint: str):
    """Each with a sentence for people."""
    said = json_fields(body)
    assert isinstance(said, str)
    assert said.startswith(complaint)


@pytest.mark.parametrize(
    ("body", "after"),
    [
        ('{"stream":true}', '{"stream_options":{"include_usage":true},"stream":true}'),
        (' { "stream" : true }', ' {"stream_options":{"include_usage":true}, "stream" : true }'),
        ('{"stream":true,"stream_options":null}', '{"stream":true,"stream_options":{"include_usage":true}}'),
        ('{"stream":true,"stream_options":{ }}', '{"stream":true,"stream_options":{"include_usage":true }}'),
        (
            '{"stream_options":{"include_obfuscation":false},"stream":true}',
            '{"stream_options":{"include_usage":true,"include_obfuscation":false},"stream":true}',
        ),
        (
            '{"stream":true,"stream_options":{"include_usage": null}}',
            '{"stream":true,"stream_options":{"include_usage": true}}',
        ),
        ('{"stream":true,"stream_options":{"include_usage":false}}', None),
        ('{"stream":true,"stream_options":{"include_usage":false,"include_usage":null}}', None),
        ('{"stream":true,"stream_options":{"include_usage":1}}', None),
        ('{"stream":true,"stream_options":7}', None),
        ('{"stream":true,"Stream_Options":{"include_usage":null}}', None),  # some would read it twice
        (
            '{"a":{"Stream_Options":1},"stream":true}',
            '{"stream_options":{"include_usage":true},"a":{"Stream_Options":1},"stream":true}',
        ),
        ('{"stream":false}', None),
        ('{"model":"x"}', None),
    ],
)
def test_where_usage_is_asked_for(body: str, after: str | None):
    """Where a stream is asked for and the body does not say; an explicit false is respected."""
    fields = json_fields(body.encode())
    assert isinstance(fields, JsonFields)
    edit = fields.usage
    assert (None if edit is None else edited(body.encode(), edit).decode()) == after


def test_texts_that_nobody_can_read_pass():
    """Half a surrogate pair in a text, or bytes in it that are not UTF-8, are the upstream's to judge."""
    body = b'{"a":"\\ud800","b":"\xff","\xff":0,"c":{"model":2},"model":"a","d":{"Model":[1]}}'
    fields = json_fields(body)
    assert isinstance(fields, JsonFields)
    assert fields.model == "a"
    assert edited(body, model_edit(fields, "b")) == body.replace(b'"a","d"', b'"b","d"')


def members(count: int) -> bytes:
    """So many fields, each with a comma behind it."""
    return b"".join(b'"k%d":[{}],' % number for number in range(count))


def test_a_body_of_thousands_of_fields_froze_every_stream():
    """What has to be looked through key by key has few keys, or it is refused: the loop waits meanwhile."""
    odd = b'"x":{"Model":1},"model":"a"}'
    few, many = json_fields(b"{" + members(MEMBERS - 2) + odd), json_fields(b"{" + members(MEMBERS) + odd)
    assert isinstance(few, JsonFields)
    assert few.model == "a"
    assert many == f"The body has more than {MEMBERS} fields."
    usual = json_fields(b"{" + members(MEMBERS) + b'"model":"a"}')  # is found by one search
    assert isinstance(usual, JsonFields)
    assert usual.model == "a"


@pytest.mark.parametrize(
    "end",
    [b'"stream":true,"x":{"stream_options":1}}', b'"stream":true,"stream_options":{%b"z":1}}' % members(MEMBERS)],
)
def test_usage_is_not_asked_for_where_there_is_too_much_to_look_through(end: bytes):
    """It is an estimate then."""
    few = json_fields(b"{" + end.replace(members(MEMBERS), b""))
    many = json_fields(b"{" + members(MEMBERS) + end)
    assert isinstance(few, JsonFields)
    assert isinstance(many, JsonFields)
    assert (few.usage is None, many.usage is None) == (False, True)


@given(st.one_of(lists(3), objects(3)), BLANKS, st.sampled_from([',"a":1}', "}"]))
def test_the_end_of_a_value_is_that_which_msgspec_finds(value: str, blanks: str, behind: str):
    """Told in msgspec's words, or found by ourselves where those are others: it is the same, but for blanks."""
    body = f'{{"v":{value}{blanks}{behind}'.encode()
    end = _walked_end(body, 5)
    assert body[5:end] == value.encode()
    assert body[end : _value_end(body, 5)] == blanks.encode()


def test_an_msgspec_that_says_it_in_other_words(monkeypatch: pytest.MonkeyPatch):
    """Only time is lost."""
    monkeypatch.setattr("canal_trio.wire.json_fields._BEHIND", re.compile("never"))
    fields = json_fields(b'{"x":[{"Model":1},[]],"model":"a"}')
    assert isinstance(fields, JsonFields)
    assert fields.model == "a"
