"""One exchange on one leased upstream connection: dialling, pooling, HTTP/1.1 of our own, the rest through httpcore."""
