"""Sockets, signals, draining: what turns a gateway into a service."""
