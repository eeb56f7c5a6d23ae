"""Bytes in, values out: HTTP/1.1 heads and bodies, fields, targets, event streams. No I/O, no clock."""
