"""Load tests for streaming gateways: promises, measured from outside. Knows nothing of the insides of `canal_trio`
(but for `trials.ledger`, which says why).

The parts, from the bottom: `behaviour`, `bodies`, `wire`, `histogram`, `scenario`, `arrivals` are pure; `upstream` and
`engine` own sockets (one epoll loop each, no framework, so that what is measured is the gateway); `processes` and
`peers` start things; `promises`, `run`, `compare` and `report` are what the command line offers.
"""
