"""Hooks that look: metrics, access log, admin endpoints. Floors 1 to 3 never import them."""
