"""The real Redis of the tests of limits is used here, too."""

from __future__ import annotations

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "quota"))
