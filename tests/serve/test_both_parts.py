"""A reload of ledger and limits as one: what fails of it leaves both as they were."""

from __future__ import annotations

from pathlib import Path

import pytest
from ledger_kit import outcomes
from test_ledger_reload_process import MANY, gateway, ledger


@pytest.mark.parametrize("workers", [1, 2])
async def test_limits_that_cannot_be_kept_leave_the_ledger(tmp_path: Path, workers: int) -> None:
    """A new ledger that was opened by then is closed again, and nothing is noted in it; a good file has both."""
    (tmp_path / "s").write_text("damaged")
    async with gateway(tmp_path, workers, ledger("a")) as here:
        await here.streams()
        await here.reload(ledger("b") + '[limits]\nstate = "s"\n', says="the old one stays: limits.state")
        assert here.journals("b") == []
        await here.streams()
        await here.has(a={"open": 2 * MANY})
        assert outcomes(here.file("b")) == {}
        await here.reload(ledger("b") + '[limits]\nstate = "t"\n')
        await here.streams()
        await here.end()
        await here.has(a={"completed": 2 * MANY}, b={"completed": MANY})
        await here.stops()
