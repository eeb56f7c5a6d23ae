"""One exchange on one leased upstream connection: dialling, proxies, pooling; HTTP/1.1 is ours, HTTP/2 httpcore's."""
