"""Pure decisions: what may be retried, which upstream, who holds which lease. `now` is always an argument."""
