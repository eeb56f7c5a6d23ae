"""Limits at work: who counts, where, and the hook that asks. The arithmetic is `policy.ratelimit`."""
