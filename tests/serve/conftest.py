"""What serves has the ledger in it: these tests read rows with the ledger's kit."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "observe"))
