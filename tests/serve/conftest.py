"""What serves has the ledger and the limits in it: these tests read rows, and count in a real Redis."""

from __future__ import annotations

import sys
from pathlib import Path

for kit in ("observe", "quota"):
    sys.path.insert(0, str(Path(__file__).parent.parent / kit))
