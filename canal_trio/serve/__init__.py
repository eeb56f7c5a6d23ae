"""Sockets, signals and processes: from settings to a running gateway."""

from canal_trio.serve.listen import ListenError
from canal_trio.serve.run import Served, ServedGateway, run, serve
from canal_trio.serve.worker import work
from canal_trio.serve.workers import WorkerError, supervise

__all__ = ["ListenError", "Served", "ServedGateway", "WorkerError", "run", "serve", "supervise", "work"]
