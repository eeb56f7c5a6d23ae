"""What the outside sees of a running gateway: metrics, the access log, the admin pages."""

from canal_trio.observe.accesslog import AccessLog
from canal_trio.observe.admin import Admin
from canal_trio.observe.lines import LineWriter
from canal_trio.observe.metrics import Metrics

__all__ = ["AccessLog", "Admin", "LineWriter", "Metrics"]
