"""Sockets, signals and processes: from settings to a running gateway."""

from canal_trio.serve.listen import ListenError
from canal_trio.serve.run import Served, ServedGateway, run, serve

__all__ = ["ListenError", "Served", "ServedGateway", "run", "serve"]
