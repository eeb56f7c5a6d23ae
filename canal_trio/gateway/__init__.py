"""The pipeline of one request: reader, driver, exchange, local answers. Its door is `Gateway`."""

from canal_trio.gateway.core import Gateway, GatewayStatistics
from canal_trio.gateway.exchange import ExchangeView

__all__ = ["ExchangeView", "Gateway", "GatewayStatistics"]
