"""`python -m canal_trio`: the command line."""

from __future__ import annotations

from canal_trio.cli import main

if __name__ == "__main__":
    main()
