"""The documents say what is true: every setting is there, links lead somewhere, the design's numbers are the code's."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from canal_trio.settings import Bounds, Deadlines, Key, Model, Upstream

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("record", [Bounds, Deadlines, Upstream, Model, Key], ids=lambda record: record.__name__)
def test_every_setting_is_documented(record: type):
    """Each field of each record of settings has a place in docs/settings.md."""
    text = (ROOT / "docs" / "settings.md").read_text()
    missing = [field.name for field in dataclasses.fields(record) if not re.search(rf"\b{field.name}\b", text)]
    assert missing == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path):
    """A relative link in a document names a file that exists."""
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"
