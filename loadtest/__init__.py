"""Load tests for streaming gateways: promises, measured from outside. Knows nothing of the insides of `canal_trio`."""
