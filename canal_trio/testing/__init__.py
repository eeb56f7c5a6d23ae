"""Public test kit: simulated streams and scripted upstreams. The product never imports it."""
