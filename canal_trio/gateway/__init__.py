"""The pipeline of one request: reader, driver, exchange, local answers."""
