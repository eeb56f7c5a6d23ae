"""Lines of keys in a TOML document: every path that tomllib gives has one, and it is the right one."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from canal_trio.config.locate import Path, locate, path_text

DOCUMENT = '''\
# a comment with [[brackets]] and "quotes"
title = "x"
a.b.c = 1
"quoted key" . 'lit.eral' = 2

[server]
listen = [
  "127.0.0.1:1",  # ] not the end
  "[::1]:2",
]
text = """
[not.a.table]
key = 1 \\""" still in """""
raw = \'\'\'
x = [ {
\'\'\'
when = 1979-05-27 07:32:00Z   # a blank inside

[[upstream]]
name = "a"
api_key = { env = "A", deep = { er = [1, { x = 2 }] } }

[[upstream]]
name = "b"

[upstream.more]
key = 1

[[upstream.part]]
p = 1
[[upstream.part]]
p = 2

[ "odd . table" . sub ]
y = [[1, 2], [3]]
'''


def _paths(value: Any, path: Path = ()) -> set[Path]:
    found = {path} if path else set()
    if isinstance(value, dict):
        for key, inner in value.items():
            found |= _paths(inner, (*path, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            found |= _paths(inner, (*path, number))
    return found


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (("title",), 2),
        (("a", "b"), 3),
        (("a", "b", "c"), 3),
        (("quoted key", "lit.eral"), 4),
        (("server",), 6),
        (("server", "listen"), 7),
        (("server", "listen", 1), 9),
        (("server", "text"), 11),
        (("server", "raw"), 14),
        (("server", "when"), 17),
        (("upstream",), 19),
        (("upstream", 0), 19),
        (("upstream", 0, "api_key", "env"), 21),
        (("upstream", 0, "api_key", "deep", "er", 1, "x"), 21),
        (("upstream", 1), 23),
        (("upstream", 1, "name"), 24),
        (("upstream", 1, "more", "key"), 27),
        (("upstream", 1, "part", 1, "p"), 32),
        (("odd . table", "sub", "y", 0, 1), 35),
    ],
)
def test_lines(path: Path, line: int) -> None:
    """Tables, arrays of tables, dotted and quoted keys, inline tables and elements are found on their line."""
    assert locate(DOCUMENT)[path] == line


def test_every_path_has_a_line() -> None:
    """No path of the parsed document is missing."""
    assert _paths(tomllib.loads(DOCUMENT)) <= set(locate(DOCUMENT))


KEYS = st.one_of(
    st.from_regex(r"[A-Za-z0-9_-]{1,6}", fullmatch=True),
    st.text(st.characters(codec="utf-8", categories=["L", "P", "S", "Zs"]), max_size=5),
)
TEXTS = st.text(st.sampled_from("ab\"'\\#[]{}=,.\n\té"), max_size=12)


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
    return f'"{escaped}"'


def _long_quoted(text: str) -> str:
    return '"""\n' + text.replace("\\", "\\\\").replace('"""', '""\\"').removesuffix('"') + '"""'


def _long_literal(text: str) -> str:
    return "'''" + text.replace("'", "") + "'''"


SCALARS = st.one_of(
    st.integers(-(10**6), 10**6).map(str),
    st.sampled_from(["true", "inf", "-1.5e3", "0xff", "1979-05-27", "07:32:00", "1979-05-27 07:32:00.5+01:00"]),
    TEXTS.map(_quoted),
    TEXTS.map(_long_quoted),
    TEXTS.map(_long_literal),
)
GAPS = st.sampled_from(["", " ", "\n", " # ] } = [x]\n  "])
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(st.tuples(GAPS, inner, GAPS).map("".join), max_size=3).map(lambda items: f"[{','.join(items)}]"),
        st.dictionaries(KEYS.map(_quoted), inner, max_size=3).map(
            lambda items: "{ " + ", ".join(f"{key} = {value}" for key, value in items.items()) + " }"
        ),
    ),
    max_leaves=6,
)
DOCUMENTS = st.lists(
    st.one_of(
        st.lists(KEYS.map(_quoted), min_size=1, max_size=3).map(lambda keys: f"[{'.'.join(keys)}]"),
        st.lists(KEYS.map(_quoted), min_size=1, max_size=2).map(lambda keys: f"[[ {' . '.join(keys)} ]]  # x"),
        st.tuples(st.lists(KEYS.map(_quoted), min_size=1, max_size=2), VALUES).map(
            lambda pair: f"{'.'.join(pair[0])} = {pair[1]}"
        ),
        st.just("# [comment"),
        st.just(""),
    ),
    max_size=8,
).map("\n".join)


@given(DOCUMENTS)
@example('k = """a"""""\nl = 1')
@example("k = ''''a'''''\nl = 1")
def test_any_document(text: str) -> None:
    """Whatever tomllib accepts has a line for each of its paths, within the document."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return  # tables and keys that are drawn twice; the rest of the draws is valid
    lines = locate(text)
    assert _paths(document) <= set(lines)
    assert all(1 <= line <= text.count("\n") + 1 for line in lines.values())


def test_how_a_path_is_written() -> None:
    """A path reads as in TOML, with quotes only where they are needed."""
    assert path_text(("upstream", 0, "api_key", "env")) == "upstream[0].api_key.env"
    assert path_text(("odd key\n", "x")) == '"odd key\\n".x'
