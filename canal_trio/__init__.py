"""canal-trio: a streaming gateway for OpenAI-compatible APIs, in Python on Trio.

Three doors: the command line (`canal-trio serve`), the library (`canal_trio.relay`) and, for tests of programs that
stream, `canal_trio.testing`.
"""

__version__ = "0.1.0"
