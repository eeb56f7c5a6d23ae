"""Where a key stands in a TOML document: `tomllib` parses and tells no lines, so a second, blind pass finds them.

`locate(text)` walks a document that `tomllib` has accepted and gives the line of every table, key and array element by
its path. It follows strings, comments and nesting only; values are not interpreted. Invariant: for each path in the
parsed document there is a line (a property test says so).
"""

from __future__ import annotations

import bisect
import re
import tomllib
from typing import TypeAlias, final

__all__ = ["Path", "locate", "path_text"]

Path: TypeAlias = tuple[str | int, ...]

_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_SPACE = re.compile(r"[ \t]*")
_BARE = re.compile(r"[A-Za-z0-9_-]+")
_SCALAR = re.compile(r"[^,\]}#\n]*")
_BASIC = re.compile(r'"(?:[^"\\\n]|\\.)*"')
_LITERAL = re.compile(r"'[^'\n]*'")
# Up to two quotes may stand right before the closing three.
_LONG_BASIC = re.compile(r'"""(?:[^\\]|\\.)*?"""(?!")', re.DOTALL)
_LONG_LITERAL = re.compile(r"'''.*?'''(?!')", re.DOTALL)


def path_text(path: Path) -> str:
    """`upstream[0].base_url`, as people write it; keys that need quotes get them."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            key = part if _BARE.fullmatch(part) else f'"{part.encode("unicode_escape").decode()}"'
            text += f".{key}" if text else key
    return text


def locate(text: str) -> dict[Path, int]:
    """The line (from 1) of each path in `text`, which must be valid TOML."""
    scanner = _Scanner(text)
    scanner.document()
    return scanner.lines


@final
class _Scanner:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.lines: dict[Path, int] = {}
        self._ends = [match.start() for match in re.finditer("\n", text)]
        self._arrays: dict[Path, int] = {}  # arrays of tables, and how many tables each has by now

    def document(self) -> None:
        """All of it: headers and the pairs below them."""
        table: Path = ()
        self._skip(_BLANK)
        while self.at < len(self.text):
            line = self._line()
            if self.text.startswith("[[", self.at):
                self.at += 2
                table = self._header(self._key(), array=True)
                self.at += 2
            elif self.text[self.at] == "[":
                self.at += 1
                table = self._header(self._key(), array=False)
                self.at += 1
            else:
                self._pair(table)
                self._skip(_BLANK)
                continue
            self._note(table, line)
            self._skip(_BLANK)

    def _header(self, keys: list[str], *, array: bool) -> Path:
        path: Path = ()
        for number, key in enumerate(keys):
            path = (*path, key)
            if array and number == len(keys) - 1:
                self._arrays[path] = self._arrays.get(path, 0) + 1
            if path in self._arrays:
                self._note(path, self._line())
                path = (*path, self._arrays[path] - 1)
        return path

    def _note(self, path: Path, line: int) -> None:
        for length in range(1, len(path) + 1):
            self.lines.setdefault(path[:length], line)

    def _pair(self, table: Path) -> None:
        line = self._line()
        path = (*table, *self._key())
        self._note(path, line)
        self.at += 1  # the equals sign
        self._skip(_SPACE)
        self._value(path)

    def _key(self) -> list[str]:
        """A dotted key; leaves the position behind it and the blanks that follow."""
        keys: list[str] = []
        while True:
            self._skip(_SPACE)
            if self.text[self.at] == '"':
                keys.append(tomllib.loads(f"key = {self._take(_BASIC)}")["key"])
            elif self.text[self.at] == "'":
                keys.append(self._take(_LITERAL)[1:-1])
            else:
                keys.append(self._take(_BARE))
            self._skip(_SPACE)
            if not self.text.startswith(".", self.at):
                return keys
            self.at += 1

    def _value(self, path: Path) -> None:
        for opening, pattern in (('"""', _LONG_BASIC), ("'''", _LONG_LITERAL), ('"', _BASIC), ("'", _LITERAL)):
            if self.text.startswith(opening, self.at):
                self._skip(pattern)
                return
        match self.text[self.at]:
            case "[":
                self._list(path)
            case "{":
                self._inline_table(path)
            case _:
                self._skip(_SCALAR)

    def _list(self, path: Path) -> None:
        self.at += 1
        number = 0
        while self._after_blanks() != "]":
            self._note((*path, number), self._line())
            self._value((*path, number))
            number += 1
            if self._after_blanks() == ",":
                self.at += 1
        self.at += 1

    def _inline_table(self, path: Path) -> None:
        self.at += 1
        while self._after_blanks() != "}":
            self._pair(path)
            if self._after_blanks() == ",":
                self.at += 1
        self.at += 1

    def _after_blanks(self) -> str:
        self._skip(_BLANK)
        return self.text[self.at]

    def _skip(self, pattern: re.Pattern[str]) -> None:
        match = pattern.match(self.text, self.at)
        assert match is not None, "not TOML"
        self.at = match.end()

    def _take(self, pattern: re.Pattern[str]) -> str:
        start = self.at
        self._skip(pattern)
        return self.text[start : self.at]

    def _line(self) -> int:
        return bisect.bisect_left(self._ends, self.at) + 1
