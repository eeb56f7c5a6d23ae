"""The tests: one folder per floor, then the whole over real sockets and with real clients."""
